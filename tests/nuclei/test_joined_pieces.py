"""Post-processing of Mask R-CNN: pieces that the edges of tiles cut are joined, and different nuclei are not."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hover_batch.nuclei.systems import splitter
from hover_batch.nuclei.watershed import instance_map

SIDE = 160


def discs(seed: int) -> np.ndarray:
    """Nuclei (SIDE, SIDE) int32 that may touch, but do not overlap."""
    rng = np.random.default_rng(seed)
    nuclei = np.zeros((SIDE, SIDE), np.int32)
    for _ in range(60):
        one = np.zeros_like(nuclei)
        centre, axes = rng.integers(0, SIDE, 2).tolist(), rng.integers(8, 17, 2).tolist()
        cv2.ellipse(one, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        if one.sum() > 150 and not nuclei[one > 0].any():
            nuclei[one > 0] = nuclei.max() + 1
    return nuclei


def planes_by_tiles(nuclei: np.ndarray, tile: int, offset: tuple[int, int], error: int, seed: int = 0) -> np.ndarray:
    """np, h and v (3, y, x) uint8 as Mask R-CNN stores them if each tile places the centres with its own error."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(nuclei.shape)
    tiles = (y + offset[0]) // tile * 1000 + (x + offset[1]) // tile
    h, v = np.zeros((2, *nuclei.shape), np.int8)
    for number in range(1, nuclei.max() + 1):
        own = nuclei == number
        centre_y, centre_x = ((np.flatnonzero(own.any(axis))[[0, -1]].sum() + 1) // 2 for axis in (1, 0))
        for one_tile in np.unique(tiles[own]):
            piece = own & (tiles == one_tile)
            h[piece] = centre_x + rng.integers(-error, error + 1) - x[piece]
            v[piece] = centre_y + rng.integers(-error, error + 1) - y[piece]
    return np.stack([np.where(nuclei > 0, 255, 0).astype(np.uint8), h.view(np.uint8), v.view(np.uint8)])


def found_in(planes: np.ndarray) -> np.ndarray:
    return instance_map(*planes, splitter("mask-rcnn", {}))


def assert_same_nuclei(found: np.ndarray, nuclei: np.ndarray) -> None:
    pairs = np.unique(np.stack([found.ravel(), nuclei.ravel()]), axis=1)
    assert pairs.shape[1] == len(np.unique(found)) == len(np.unique(nuclei))


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    tile=st.integers(20, 200),
    offset=st.tuples(st.integers(0, 199), st.integers(0, 199)),
    error=st.integers(0, 1),
)
def test_nuclei_do_not_depend_on_tiles_that_nearly_agree(
    seed: int, tile: int, offset: tuple[int, int], error: int
) -> None:
    nuclei = discs(seed)
    assert_same_nuclei(found_in(planes_by_tiles(nuclei, tile, offset, error, seed)), nuclei)


def test_without_joining_a_nucleus_on_a_corner_of_tiles_would_be_several(monkeypatch: pytest.MonkeyPatch) -> None:
    nuclei = np.zeros((SIDE, SIDE), np.int32)
    cv2.circle(nuclei, (80, 80), 14, 1, -1)
    planes = planes_by_tiles(nuclei, 80, (0, 0), 1)
    assert found_in(planes).max() == 1
    monkeypatch.setattr("hover_batch.nuclei.mask_rcnn.MIN_IOU", 1.0)
    assert found_in(planes).max() > 2


def test_nuclei_that_touch_at_an_edge_of_tiles_stay_two() -> None:
    nuclei = np.zeros((SIDE, SIDE), np.int32)
    cv2.ellipse(nuclei, (64, 60), (15, 20), 0, 0, 360, 1, -1)
    cv2.ellipse(nuclei, (95, 60), (15, 20), 0, 0, 360, 2, -1)
    assert np.any((nuclei[:, 79] == 1) & (nuclei[:, 80] == 2))
    assert_same_nuclei(found_in(planes_by_tiles(nuclei, 80, (0, 0), 1)), nuclei)


def test_a_nucleus_that_hides_the_middle_of_another_leaves_two_pieces() -> None:
    nuclei = np.zeros((SIDE, SIDE), np.int32)
    nuclei[40:60, 20:100] = 1
    planes = planes_by_tiles(nuclei, SIDE, (0, 0), 0)
    above = np.zeros_like(nuclei)
    above[35:65, 70:80] = 1
    planes = np.where(above > 0, planes_by_tiles(above, SIDE, (0, 0), 0), planes)
    assert np.bincount(found_in(planes).ravel())[1:].tolist() == [300, 1000, 400]


def test_small_pieces_are_dropped() -> None:
    nuclei = np.zeros((SIDE, SIDE), np.int32)
    nuclei[2:5, 2:5], nuclei[10:14, 10:14] = 1, 2
    assert np.bincount(found_in(planes_by_tiles(nuclei, SIDE, (0, 0), 0)).ravel())[1:].tolist() == [16]


def test_a_nucleus_in_the_box_of_a_slanting_one_is_another() -> None:
    nuclei = np.zeros((SIDE, SIDE), np.int32)
    cv2.ellipse(nuclei, (80, 80), (40, 6), 45, 0, 360, 1, -1)
    cv2.circle(nuclei, (90, 76), 7, 2, -1)
    for offset in ((0, 30), (30, 0)):  # the edge of a tile along x or y, in the middle of both
        assert_same_nuclei(found_in(planes_by_tiles(nuclei, 80, offset, 1)), nuclei)
