"""The H&E field that ships with a dependency, as slides."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from hover_batch.cohort.record import SlideRecord
from hover_batch.geometry import Grid, Mpp, Size
from hover_batch.slide.example import write_example
from hover_batch.slide.reader import open_slide, peek


def test_the_example_is_two_slides_of_one_field(tmp_path: Path) -> None:
    cohort = write_example(tmp_path / "new" / "folder")
    rows = list(csv.DictReader(cohort.read_text().splitlines()))
    assert [row["slide_id"] for row in rows] == ["he_0.25", "he_0.5"]
    first, second = (SlideRecord(row["slide_id"], cohort.parent / row["path"], 2) for row in rows)
    assert peek(first).mpp == Mpp(0.25, 0.25) and peek(first).level0 == Size(1000, 1000)
    assert peek(second).mpp == Mpp(0.5, 0.5) and peek(second).level0 == Size(500, 500)
    assert peek(first).vendor == "generic-tiff" and len(peek(first).downsamples) > 1
    with open_slide(first) as slide, open_slide(second) as reduced:
        import tiatoolbox  # after open_slide, which imports it quietly

        grid = Grid.over(slide.info.level0, slide.info.mpp, 0.25)
        field = slide.read(grid.size.box, grid)
        with Image.open(Path(tiatoolbox.__file__).parent / "data" / "target_image.png") as packaged:
            assert np.array_equal(field, np.asarray(packaged))
        enlarged = reduced.read(grid.size.box, Grid.over(reduced.info.level0, reduced.info.mpp, 0.25))
        assert np.abs(enlarged.astype(int) - field).mean() < 8


def test_writing_again_touches_nothing_that_is_the_same(tmp_path: Path) -> None:
    cohort = write_example(tmp_path)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    (tmp_path / "he_0.5.tif").write_bytes(b"torn")
    assert write_example(tmp_path) == cohort
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    assert after.keys() == before.keys() == {"he_0.25.tif", "he_0.5.tif", "cohort.csv"}
    assert after["he_0.25.tif"] == before["he_0.25.tif"] and after["cohort.csv"] == before["cohort.csv"]
    assert after["he_0.5.tif"][1] == before["he_0.5.tif"][1]
