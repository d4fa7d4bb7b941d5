"""Post-processing of systems other than HoVerNet's: what it finds, and that seams do not change it."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import KDTree
from skimage.morphology import local_maxima, reconstruction
from synthetic_maps import LAYOUT, Canvas, random_canvas
from test_stitch import assert_same

from hover_batch.config import PostSettings
from hover_batch.errors import InputError
from hover_batch.geometry import Box
from hover_batch.model.heads import DISTANCE_PX
from hover_batch.model.package import find_package
from hover_batch.nuclei.components import Components, Splitter
from hover_batch.nuclei.dist import DYNAMIC, maxima
from hover_batch.nuclei.measure import concatenate
from hover_batch.nuclei.stitch import nuclei_of_region
from hover_batch.nuclei.systems import splitter, splitter_of
from hover_batch.nuclei.watershed import instance_map

DIST, MICRONET, MASK_RCNN = (splitter(system, {}) for system in ("dist", "micronet", "mask-rcnn"))
CROSS = ndimage.generate_binary_structure(2, 1)


def distances(foreground: np.ndarray, noise_px: float) -> np.ndarray:
    """The stored distance of a mask, with the noise of a network."""
    noise = np.random.default_rng(int(foreground.sum())).normal(0, noise_px, foreground.shape)
    distance = cv2.distanceTransform(foreground.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) + noise
    return np.round(127 * np.clip(distance / DISTANCE_PX, -1, 1)).astype(np.int8)


def to_centres(seed: int, width: int, height: int) -> np.ndarray:
    """The stored distances to the nearest of random centres, (2, y, x) uint8."""
    points = np.random.default_rng(seed).integers(0, (width, height), (80, 2))
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=2)
    _, nearest = KDTree(points).query(pixels)
    return np.moveaxis(points[nearest] - pixels, 2, 0).clip(-128, 127).astype(np.int8).view(np.uint8)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    core=st.integers(32, 200),
    halo=st.integers(0, 64),
    offset=st.integers(0, 31),
    system=st.sampled_from([DIST, MICRONET, MASK_RCNN]),
)
def test_any_tiling_equals_the_whole(seed: int, core: int, halo: int, offset: int, system: Splitter) -> None:
    maps = random_canvas(seed, 220, 180).maps
    if system is MASK_RCNN:
        maps[LAYOUT.H : LAYOUT.V + 1] = to_centres(seed, 220, 180)
    else:
        maps[LAYOUT.H] = distances(maps[LAYOUT.NP] >= LAYOUT.NP_NUCLEUS, 0.3).view(np.uint8)
    canvas, post = Canvas(maps), PostSettings(min_area_px=0, halo=halo)
    starts = [(x, y) for y in range(-offset, 180, core) for x in range(-offset, 220, core)]
    cores = [Box(x, y, x + core, y + core) for x, y in starts]
    tiled = concatenate([nuclei_of_region(canvas.read, box, LAYOUT, post, system) for box in cores])
    assert_same(tiled, nuclei_of_region(canvas.read, canvas.box, LAYOUT, post, system))


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), dynamic=st.integers(1, 9))
def test_maxima_are_those_of_morphological_reconstruction(seed: int, dynamic: int) -> None:
    rng = np.random.default_rng(seed)
    heights = cv2.GaussianBlur(rng.integers(0, 128, (30, 40)).astype(np.uint8), (5, 5), 1)
    own = ndimage.label(rng.random(heights.shape) < 0.8)[0] == 1
    markers, number = maxima(own, heights.astype(np.int8), dynamic)
    # High above the outside, so that the highest one always counts.
    surface = np.where(own, heights.astype(int) + 300, 0)
    # A maximum of whole numbers is `dynamic` high if it exceeds every path by more than dynamic - 1.
    levelled = reconstruction(surface - (dynamic - 1), surface, footprint=CROSS)
    expected, n = ndimage.label(local_maxima(levelled, connectivity=1) & own, CROSS)
    assert number == n == markers.max()
    # Each of scikit-image's is in one of ours.
    pairs = {(int(a), int(b)) for a, b in zip(expected[expected > 0], markers[expected > 0], strict=True)}
    assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs) == list(range(1, n + 1))
    assert not markers[~own].any()


def test_dist_divides_touching_discs_and_keeps_a_bumpy_one() -> None:
    foreground = np.zeros((60, 110), np.uint8)
    for x in (25, 47, 85):
        cv2.circle(foreground, (x, 30), 13, 1, -1)
    distance = distances(foreground > 0, 0)
    distance[foreground > 0] += np.random.default_rng(0).integers(0, DYNAMIC, int(foreground.sum())).astype(np.int8)
    np_map = foreground * np.uint8(255)
    found = instance_map(np_map, distance.view(np.uint8), np.zeros_like(np_map), DIST)
    assert found.max() == 3 and len({int(found[30, x]) for x in (25, 47, 85)}) == 3
    np.testing.assert_array_equal(found > 0, foreground > 0)
    whole = instance_map(np_map, distance.view(np.uint8), np.zeros_like(np_map), MICRONET)
    assert whole.max() == 2
    np.testing.assert_array_equal(whole > 0, foreground > 0)


def test_small_components_are_dropped() -> None:
    np_map = np.zeros((20, 20), np.uint8)
    np_map[2:5, 2:5] = np_map[10:14, 10:14] = 255
    for system in (DIST, MICRONET):
        assert np.bincount(instance_map(np_map, np_map // 4, np_map, system).ravel())[1:].tolist() == [16]
    components = Components.of(np_map)
    assert not MICRONET.split(np.stack([np_map] * 2), components, np.zeros_like(components.large)).any()


def test_window_normalisation_is_for_sobel_maps_only() -> None:
    card = find_package("starter").card

    assert splitter_of(card, "window") is None
    with pytest.raises(InputError, match="--sobel-norm window: .* leave the option out"):
        splitter_of(replace(card, system="dist", sobel={}), "window")
