"""The synthetic slide has the properties that tests and measurements rely on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
from synthetic_slide import write_synthetic_slide


def test_openslide_opens_it_and_nuclei_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    centres = write_synthetic_slide(path, (3000, 2504), mpp=0.25, tissue_fraction=0.25)
    with openslide.OpenSlide(str(path)) as slide:
        assert slide.dimensions == (3000, 2504) and slide.level_count == 4
        assert float(slide.properties["openslide.mpp-x"]) == 0.25
        full, half = (np.asarray(slide.read_region((0, 0), i, slide.level_dimensions[i]))[..., :3] for i in (0, 1))
    assert abs((full.min(axis=2) < 250).mean() - 0.25) < 0.01
    assert len(centres) > 200
    x, y = np.rint(centres - 0.5).astype(int).T
    assert (full[y, x, 0] < 150).all()
    assert (half[y // 2, x // 2, 0] < 150).all()


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_synthetic_slide(tmp_path / name, (600, 500), seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c
