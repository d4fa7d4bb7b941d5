"""Kernels compared with the library functions that they replace, with ties, edges and tiny windows."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from skimage.measure import label
from skimage.segmentation import watershed
from synthetic_maps import LAYOUT, random_canvas

from hover_batch.nuclei.components import Components
from hover_batch.nuclei.energy import HV_STEPS, energy_around, sobel_extremes
from hover_batch.nuclei.flood import flood
from hover_batch.nuclei.measure import measure
from hover_batch.nuclei.outlines import _repaired, outlines
from hover_batch.nuclei.watershed import SobelConstants

SIDES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def sobel(plane: NDArray[np.uint8], dx: int, dy: int) -> NDArray[np.float64]:
    return np.asarray(cv2.Sobel(plane.view(np.int8).astype(np.int16), cv2.CV_64F, dx, dy, ksize=21))


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), shape=SIDES, largest=st.sampled_from([1, 127]))
def test_sobel_rows_equal_opencv(seed: int, shape: tuple[int, int], largest: int) -> None:
    rng = np.random.default_rng(seed)
    h, v = rng.integers(-largest, largest + 1, (2, *shape)).astype(np.int8).view(np.uint8)
    x, y = sobel(h, 1, 0), sobel(v, 0, 1)
    np.testing.assert_array_equal(sobel_extremes(h, v), [x.min(), x.max(), y.min(), y.max()])
    labels = rng.integers(0, 2, shape).astype(np.int32)
    scales, lows = (1e-11 / HV_STEPS, 1.1e-11 / HV_STEPS), (-0.4, -0.5)
    slopes = [np.float32(1) - (s * k - low).astype(np.float32) for s, k, low in zip((x, y), scales, lows, strict=True)]
    expected = np.where(labels > 0, np.maximum(np.maximum(*slopes), 0), 1)
    around = cv2.copyMakeBorder(expected, 1, 1, 1, 1, cv2.BORDER_REFLECT_101)
    (y0, y1), (x0, x1) = (sorted(rng.choice(side + 1, 2, replace=False).tolist()) for side in shape)
    found = energy_around(
        h.view(np.int8), v.view(np.int8), np.array([False, True]), labels, (x0, y0, x1, y1), scales, lows
    )
    np.testing.assert_array_equal(found, around[y0 : y1 + 2, x0 : x1 + 2])


def test_the_steepest_maps_do_not_overflow() -> None:
    steep = np.where(np.arange(60) < 30, -127, 127).astype(np.int8).view(np.uint8)
    h, v = np.tile(steep, (60, 1)), np.tile(steep[:, None], (1, 60))
    x, y = sobel(h, 1, 0), sobel(v, 0, 1)
    np.testing.assert_array_equal(sobel_extremes(h, v), [x.min(), x.max(), y.min(), y.max()])


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), shape=SIDES, share=st.sampled_from([0.0, 0.3, 0.6, 0.95, 1.0]))
def test_components_are_those_of_opencv(seed: int, shape: tuple[int, int], share: float) -> None:
    foreground = (np.random.default_rng(seed).random(shape) < share).astype(np.uint8)
    found = Components.of(foreground * np.uint8(128))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(foreground, connectivity=4, ltype=cv2.CV_32S)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.pixels[1:], stats[1:, cv2.CC_STAT_AREA])
    sides = found.bounds[1:, 2:] - found.bounds[1:, :2]
    np.testing.assert_array_equal(np.hstack([found.bounds[1:, :2], sides]), stats[1:, :4])


@settings(max_examples=150)
@given(seed=st.integers(0, 10**6), shape=SIDES, values=st.sampled_from([2, 5, 50, 2**24]))
@example(seed=1, shape=(1, 26), values=2)
def test_flooding_equals_scikit_image(seed: int, shape: tuple[int, int], values: int) -> None:
    """Few values make many ties, on which the order of the heap decides: here the heap of one component."""
    rng = np.random.default_rng(seed)
    height, width = shape
    components = Components.of(np.where(rng.random(shape) < 0.9, 255, 0).astype(np.uint8))
    foreground = components.labels > 0
    energy = (rng.integers(0, values + 1, shape) / values).astype(np.float32)
    energy = np.where(foreground, (energy * 2**24).round() / 2**24, 1).astype(np.float32)
    markers = np.zeros(shape, np.int32)
    for k in range(1, 6):
        y, x = rng.integers(0, height), rng.integers(0, width)
        markers[y : y + 4, x : x + 4] = k
    landscape = -cv2.GaussianBlur(1.0 - energy.astype(np.float64), (3, 3), 0)
    around = cv2.copyMakeBorder(energy, 1, 1, 1, 1, cv2.BORDER_REFLECT_101)
    for component in range(1, len(components.bounds)):
        mask = components.labels == component
        own_markers = np.where(mask, markers, 0).astype(np.int32)
        x0, y0, x1, y1 = components.bounds[component]
        crop = np.s_[y0:y1, x0:x1]
        found = flood(mask[crop], around[y0 : y1 + 2, x0 : x1 + 2], own_markers[crop])
        np.testing.assert_array_equal(found, watershed(landscape, own_markers, mask=mask)[crop])


@settings(max_examples=200)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))).filter(np.any))
def test_a_followed_border_equals_the_repaired_one(mask: NDArray[np.bool_]) -> None:
    y, x = np.nonzero(mask)
    bounds = np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1]])
    found = outlines(mask.astype(np.int32), bounds, x[:1], np.array([len(x)]), (7, -3))[0]
    crop = mask[y.min() : y.max() + 1, x.min() : x.max() + 1].copy()
    np.testing.assert_array_equal(found, _repaired([crop])[0] + bounds[0, :2] + (7, -3))


def test_borders_of_round_instances_are_followed_not_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[:40, :40]
    disc = np.hypot(x - 20, y - 20) < 15
    disc[18:22, 18:22] = False  # a hole does not matter
    instances = label(disc).astype(np.int32)
    monkeypatch.setattr("hover_batch.nuclei.outlines.cv2", None)
    ring = measure(instances, np.zeros((LAYOUT.planes, 40, 40), np.uint8), LAYOUT).contours[0]
    assert len(ring) > 20


@pytest.mark.parametrize("seed", range(8))
def test_all_components_together_equal_each_alone(seed: int) -> None:
    """Rings, nested blobs and diagonal chains among them: no component's instances depend on which others are done."""
    maps = random_canvas(seed, 200, 170).maps
    np_map, h, v = maps[LAYOUT.NP], maps[LAYOUT.H], maps[LAYOUT.V]
    constants = SobelConstants(-1.8e10, 1.3e10, -1.7e10, 1.3e10)
    components = Components.of(np_map)
    together = constants.split(np.stack([h, v]), components, components.large)
    last = 0
    for component in np.flatnonzero(components.large):
        chosen = np.arange(len(components.large)) == component
        alone = constants.split(np.stack([h, v]), components, chosen)
        np.testing.assert_array_equal(
            np.where(alone > 0, alone + last, 0), np.where(components.labels == component, together, 0)
        )
        last += int(alone.max())
    assert last == together.max() > 0
