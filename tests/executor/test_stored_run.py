"""New tables from stored predictions: the same bytes on both backends, without slides or networks; the run is only
read."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from accelerators import LoadQuick, load_nothing
from cohort_runs import SETTINGS, Run, runner
from test_contract import events, tables

from hover_batch.config import PostSettings
from hover_batch.stored_run import StoredRun

OTHER = PostSettings(
    min_area_px=150, class_map={"round": ["spindle"], "other": ["inflammatory", "epithelial", "miscellaneous"]}
)


def content(folder: Path) -> dict[str, str]:
    """What every file under `folder` holds, and when it was written."""
    return {
        str(path): f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_new_tables_from_stored_predictions(
    fields: Callable[..., Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slides are gone. The store of a is intact, a shard of b is corrupted, c is not done."""
    source, same, other, reference = (tmp_path / name for name in ("source", "same", "other", "reference"))
    local = runner("local", monkeypatch)
    cohort = fields("a", "b", "c")
    local(cohort, source, LoadQuick())
    local(cohort, reference, LoadQuick(), settings=replace(SETTINGS, post=OTHER))
    shutil.rmtree(cohort.parent)
    made = tables(source)

    shard = source / "slides" / "b" / "predictions.zarr" / "c" / "0" / "1" / "1"
    shard.write_bytes(shard.read_bytes()[:-10])
    (source / "slides" / "c" / "slide.json").unlink()
    before = content(source)
    stored = StoredRun.open(source)

    outcome = run(stored, same, load_nothing, settings=stored.settings)
    assert outcome.exit_code == 3 and outcome.model_busy is None
    assert tables(same) == {"a": made["a"]}
    reasons = pd.read_csv(same / "failures.csv").set_index("slide_id").reason
    assert list(reasons.index) == ["b", "c"]
    assert "checksum mismatch in unit r00001_c00001" in reasons["b"] and "is not done" in reasons["c"]

    settings = replace(stored.settings, post=OTHER)
    run(stored, other, load_nothing, settings=settings)
    assert tables(other) == {"a": tables(reference)["a"]} != {"a": made["a"]}

    # What was done is not done again: one region's part is missing, and the table.
    slide = other / "slides" / "a"
    for name in ("slide.json", "nuclei.parquet", "parts/1_1.parquet"):
        (slide / name).unlink()
    done = len(events(other, "region_done"))
    run(stored, other, load_nothing, settings=settings)
    assert tables(other)["a"] == tables(reference)["a"]
    assert [(e["column"], e["row"]) for e in events(other, "region_done")[done:]] == [(1, 1)]
    assert content(source) == before
