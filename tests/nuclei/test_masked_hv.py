"""Masking h and v far from nuclei leaves the nuclei as they are, wherever units and regions are cut."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from synthetic_maps import LAYOUT, Canvas, random_canvas
from test_stitch import assert_same, tiled, whole

from hover_batch.config import PostSettings
from hover_batch.geometry import cell_box
from hover_batch.nuclei.energy import mask_hv


def masked(canvas: Canvas, unit: int) -> Canvas:
    """The canvas as a store holds it whose shards have `unit` pixels."""
    maps = canvas.maps.copy()
    for column, row in canvas.box.cells(unit):
        rows, columns = cell_box(column, row, unit).intersect(canvas.box).slices_in(canvas.box)
        shard = np.ascontiguousarray(maps[:, rows, columns])
        mask_hv(shard)
        maps[:, rows, columns] = shard
    return Canvas(maps)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(40, 260), st.integers(40, 260)),
    unit=st.integers(22, 200),
    core=st.integers(48, 256),
)
@example(seed=1, size=(256, 256), unit=64, core=64)
@example(seed=2, size=(250, 190), unit=23, core=100)
def test_the_nuclei_are_the_same(seed: int, size: tuple[int, int], unit: int, core: int) -> None:
    canvas = random_canvas(seed, *size)
    close = masked(canvas, unit)
    assert_same(whole(close), whole(canvas))
    assert_same(tiled(close, core, (0, 0), PostSettings(min_area_px=0)), whole(canvas))


def test_only_pixels_far_from_nuclei_and_edges_are_zeroed() -> None:
    maps = np.full((LAYOUT.planes, 100, 120), 7, np.uint8)
    maps[LAYOUT.NP, 50, 60] = LAYOUT.NP_NUCLEUS
    before = maps.copy()
    mask_hv(maps)
    kept = np.zeros((100, 120), bool)
    kept[40:61, 50:71] = True
    kept[:10] = kept[-10:] = kept[:, :10] = kept[:, -10:] = True
    for plane in (LAYOUT.H, LAYOUT.V):
        assert np.array_equal(maps[plane] != 0, kept)
    others = [plane for plane in range(LAYOUT.planes) if plane not in (LAYOUT.H, LAYOUT.V)]
    assert np.array_equal(maps[others], before[others])


def test_masked_gradients_of_real_nuclei(noisy_tiles) -> None:
    """Most of the background is zero, and the nuclei are the same."""
    maps = noisy_tiles[0].maps.copy()
    mask_hv(maps)
    background = (maps[LAYOUT.NP] < 128).sum()
    assert (maps[LAYOUT.H] == 0).sum() > background / 4
    assert_same(whole(Canvas(maps)), whole(Canvas(noisy_tiles[0].maps)))
