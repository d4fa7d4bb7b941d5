"""`hover-batch view` of a data set shows a slide as its run has it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made_run import write_field, write_run
from viewed import viewing

from hover_batch.dataset.update import add_run
from hover_batch.errors import InputError
from hover_batch.view.serve import serve


def test_slides_of_a_data_set(tmp_path: Path) -> None:
    field = write_field(tmp_path)
    runs = [write_run(tmp_path / name, *field, done=ids).root for name, ids in (("one", ["a", "b"]), ("two", ["c"]))]
    dataset = tmp_path / "dataset"
    for run in runs:
        add_run(run, dataset, (), lambda line: None)
    with viewing(dataset, "c") as (server, told):
        assert server.url and told[0] == "c: opening …"
    for slide_id, message in (
        (None, "has 3 slides; choose one .*: a, b, c"),
        ("d", "not a slide of this data set.*a, b, c"),
    ):
        with pytest.raises(InputError, match=message):
            serve(dataset, slide_id, 0, lambda line: None)
    shutil.move(runs[1], tmp_path / "moved")
    with pytest.raises(InputError, match="two: the run of this slide is not there any more"):
        serve(dataset, "c", 0, lambda line: None)
