"""Fixtures of the tests of exports."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_tables import BOUNDS, annotated, drawn, write_table

from hover_batch.export import read
from hover_batch.export.read import NucleiTable


@pytest.fixture(params=["annotated", "drawn"])
def nuclei(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NucleiTable:
    """A table of several batches: of an annotated image, or of drawn nuclei on a slide of finer pixels with bounds."""
    monkeypatch.setattr(read, "BATCH", 100)
    if request.param == "drawn":
        return write_table(tmp_path, *drawn(), scale=1.087, bounds=BOUNDS)
    instances, types = annotated(request.getfixturevalue("data"))
    return write_table(tmp_path, instances, types)
