"""Units and their tiles."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hover_batch.geometry import Box, Grid, Mpp, Size, cell_box
from hover_batch.slide.tiles import TISSUE_REACH, plan_units
from hover_batch.slide.tissue import TissueMask


def laid(array: np.ndarray[Any, np.dtype[np.bool_]], level0: Size) -> TissueMask:
    return TissueMask(array, (level0.width / array.shape[1], level0.height / array.shape[0]))


@settings(max_examples=50)
@given(
    arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.sampled_from([False, False, True])),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([0.16, 0.25, 0.5]),
    st.sampled_from([128, 256]),
)
def test_tiles_are_those_near_tissue_whatever_the_unit(
    array: np.ndarray[Any, np.dtype[np.bool_]], width: int, height: int, slide_mpp: float, tile_side: int
) -> None:
    level0 = Size(width, height)
    grid, mask = Grid.over(level0, Mpp(slide_mpp, slide_mpp), 0.25), laid(array, level0)
    expected = [
        box
        for box in (cell_box(c, r, tile_side) for c, r in grid.size.box.cells(tile_side))
        if mask.meets(box.expand(TISSUE_REACH), grid)
    ]
    for unit in (256, 1024, 4096):
        units = plan_units(grid, mask, unit, tile_side)
        tiles = [tile for u in units for tile in u.tiles]
        assert len(tiles) == len(set(tiles)) and set(tiles) == set(expected)
        assert [(u.row, u.column) for u in units] == sorted((u.row, u.column) for u in units)
        for u in units:
            cell = cell_box(u.column, u.row, unit)
            assert u.tiles and u.box == cell.intersect(grid.size.box) and not u.box.empty
            assert all(cell.contains_box(tile) for tile in u.tiles)
            assert list(u.tiles) == sorted(u.tiles, key=lambda tile: (tile.y0, tile.x0))


def test_names_and_edges() -> None:
    level0 = Size(5000, 9000)
    grid = Grid.over(level0, Mpp(0.25, 0.25), 0.25)
    units = plan_units(grid, laid(np.ones((1, 1), bool), level0), 4096, 256)
    assert [u.unit_id for u in units] == [
        "r00000_c00000", "r00000_c00001", "r00001_c00000", "r00001_c00001", "r00002_c00000", "r00002_c00001",
    ]  # fmt: skip
    assert units[-1].box == Box(4096, 8192, 5000, 9000)
    assert units[-1].tiles[-1] == Box(4864, 8960, 5120, 9216)  # reaches past the slide
    assert sum(len(u.tiles) for u in units) == 20 * 36


def test_no_tissue_no_units() -> None:
    level0 = Size(5000, 5000)
    assert plan_units(Grid.over(level0, Mpp(0.25, 0.25), 0.25), laid(np.zeros((9, 9), bool), level0), 4096, 256) == ()


def test_a_unit_that_the_kept_tile_does_not_divide_is_refused() -> None:
    level0 = Size(5000, 5000)
    with pytest.raises(ValueError, match="whole tiles of 512"):
        plan_units(Grid.over(level0, Mpp(0.25, 0.25), 0.25), laid(np.ones((1, 1), bool), level0), 768, 512)


def test_a_very_large_slide_is_planned_in_seconds() -> None:
    level0 = Size(100_000, 100_000)
    y, x = np.mgrid[:3125, :3125]
    mask = laid((x - 1500) ** 2 + (y - 1500) ** 2 < 1200**2, level0)
    start = time.perf_counter()
    units = plan_units(Grid.over(level0, Mpp(0.25, 0.25), 0.25), mask, 4096, 256)
    assert time.perf_counter() - start < 20
    tiles = sum(len(u.tiles) for u in units)
    assert tiles * 256**2 / 100_000**2 == pytest.approx(np.pi * 1200**2 / 3125**2, rel=0.05)
