"""Polars reads a data set as the guide says. Skipped without it: uv run --group interop pytest tests/dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from asked import make

import hover_batch
from hover_batch.geometry import Size


def test_polars_finds_the_nuclei_of_a_window(nuclei: tuple[Any, Size], small_files: None, tmp_path: Path) -> None:
    pl = pytest.importorskip("polars")
    asked = make(tmp_path, *nuclei)
    slides = pl.read_parquet(asked.root / "slides.parquet")
    files = {f"{asked.root}/{name}" for names in slides["nuclei_files"] for name in names}
    scanned = pl.scan_parquet(sorted(files), hive_partitioning=True)
    counts = scanned.group_by("slide_id", "model").len().collect().join(slides, on=["slide_id", "model"])
    assert counts["len"].to_list() == counts["nuclei_rows"].to_list() and len(counts) == 8
    with hover_batch.open_cohort(asked.root) as cohort:
        wanted = cohort.window("s6", (100, 200, 400, 300))
    side = pl.col("bbox").struct.field
    window = scanned.filter(
        pl.col("slide_id") == "s6", side("xmax") > 100, side("xmin") < 400, side("ymax") > 200, side("ymin") < 300
    )
    found = window.sort("nucleus_id").collect()
    assert found["nucleus_id"].to_list() == wanted.nucleus_id.tolist() and len(found) > 10
    assert found["geometry"].to_list() == [shape.wkb for shape in wanted.geometry]
    everything = pl.scan_parquet(f"{asked.root}/nuclei/**/*.parquet")
    assert everything.select(pl.len()).collect().item() == len(asked.nuclei())
