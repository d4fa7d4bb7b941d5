"""Distance targets compared with a slow reference, written from the paper, one nucleus at a time."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kd.training.targets import hv_targets


def scaled(distance):
    """Each side of the centre by its own extreme, so that it spans [-1, 0] and [0, 1]."""
    out = np.zeros(distance.shape)
    if (distance < 0).any():
        out[distance < 0] = -distance[distance < 0] / distance.min()
    if (distance > 0).any():
        out[distance > 0] = distance[distance > 0] / distance.max()
    return out


def slow_targets(instances):
    """h and v (2, y, x): every pixel's distance to the centre of mass of its nucleus, to the nearest pixel."""
    hv = np.zeros((2, *instances.shape))
    for i in np.setdiff1d(np.unique(instances), [0]):
        ys, xs = np.nonzero(instances == i)
        hv[0, ys, xs] = scaled(xs - np.floor(xs.mean() + 0.5))
        hv[1, ys, xs] = scaled(ys - np.floor(ys.mean() + 0.5))
    return hv


@pytest.mark.parametrize("tile", ["consep_train_03", "consep_train_18"])
def test_real_tiles_with_touching_and_cut_nuclei(tile, data: Path):
    labels = cv2.imread(str(data / "nuclei" / "labels" / f"{tile}.png"), cv2.IMREAD_UNCHANGED)
    instances = np.ascontiguousarray(labels[:300, 400:800].astype(np.int32))
    right = (instances[:, 1:] != instances[:, :-1]) & (instances[:, 1:] > 0) & (instances[:, :-1] > 0)
    assert right.any()  # some nuclei touch
    assert instances[0].any() and instances[:, 0].any()  # and some are cut by the border
    got = hv_targets(instances)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, slow_targets(instances), atol=1e-6)


@given(arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 1, 2, 9])))
@settings(max_examples=200)
def test_any_map_agrees(instances):
    np.testing.assert_allclose(hv_targets(instances), slow_targets(instances), atol=1e-6)


def test_a_row_by_hand():
    # columns 1 … 6, centre of mass 3.5 → 4: three pixels to the left, two to the right
    h, v = hv_targets(np.array([[0, 5, 5, 5, 5, 5, 5, 0]], np.int32))
    np.testing.assert_allclose(h[0], [0, -1, -2 / 3, -1 / 3, 0, 1 / 2, 1, 0], atol=1e-7)
    assert not v.any()


def test_background_and_single_pixels_are_zero():
    instances = np.zeros((4, 4), np.int32)
    instances[2, 1] = 3
    assert not hv_targets(instances).any()


def test_both_ends_reach_one(data: Path):
    labels = cv2.imread(str(data / "nuclei" / "labels" / "consep_train_14.png"), cv2.IMREAD_UNCHANGED)
    h, v = hv_targets(labels.astype(np.int32))
    for i in np.unique(labels)[1:40]:
        for plane, axis in ((h, 1), (v, 0)):
            inside = labels == i
            if np.any(inside, axis=1 - axis).sum() >= 5:  # wide enough to have both sides
                assert (plane[inside].min(), plane[inside].max()) == (-1, 1)
