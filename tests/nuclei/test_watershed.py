"""Instance maps compared with HoVerNet's post-processing and with the annotations behind the maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic_maps import LAYOUT, Canvas, draw_diagonal_ring, random_canvas

from hover_batch.errors import PackageError
from hover_batch.geometry import Box
from hover_batch.nuclei.watershed import REACH, SobelConstants, instance_map

Oracle = Callable[[NDArray[np.uint8]], NDArray[np.int32]]


@pytest.fixture(scope="module")
def oracle(hovernet: Any) -> Oracle:
    """tiatoolbox's post-processing of stored maps (plane, y, x)."""

    def process(maps: NDArray[np.uint8]) -> NDArray[np.int32]:
        hv = np.stack([maps[LAYOUT.H], maps[LAYOUT.V]], -1).view(np.int8).astype(np.float32) / 127
        return np.asarray(hovernet._proc_np_hv(maps[LAYOUT.NP, ..., None] / np.float32(256), hv), np.int32)

    return process


def ours(maps: NDArray[np.uint8], constants: SobelConstants | None = None) -> NDArray[np.int32]:
    return instance_map(maps[LAYOUT.NP], maps[LAYOUT.H], maps[LAYOUT.V], constants)


def differing(a: NDArray[np.int32], b: NDArray[np.int32]) -> NDArray[np.int64]:
    """Instances of `a` that are not, pixel for pixel, an instance of `b`."""
    n = int(b.max()) + 1
    pairs, overlap = np.unique(a.astype(np.int64) * n + b, return_counts=True)
    size_a, size_b = np.bincount(a.ravel()), np.bincount(b.ravel())
    i, j = pairs // n, pairs % n
    same = (i > 0) & (j > 0) & (overlap == size_a[i]) & (overlap == size_b[j])
    return np.setdiff1d(np.unique(a)[1:], i[same])


def panoptic_quality(truth: NDArray[np.int32], found: NDArray[np.int32]) -> float:
    """Kirillov et al. 2019, for one class: pairs of IoU > 0.5 are unique matches."""
    n = int(found.max()) + 1
    pairs, overlap = np.unique(truth.astype(np.int64) * n + found, return_counts=True)
    i, j = pairs // n, pairs % n
    size_i, size_j = np.bincount(truth.ravel()), np.bincount(found.ravel())
    iou = (overlap / (size_i[i] + size_j[j] - overlap))[(i > 0) & (j > 0)]
    matched = iou[iou > 0.5]
    count = np.count_nonzero(size_i[1:]) + np.count_nonzero(size_j[1:])
    return float(matched.sum() / (count / 2))


def test_window_mode_equals_the_reference_on_real_nuclei(noisy_tiles, oracle: Oracle) -> None:
    nuclei = 0
    for tile in noisy_tiles:
        expected, found = oracle(tile.maps), ours(tile.maps)
        assert len(differing(expected, found)) == len(differing(found, expected)) == 0, tile.name
        nuclei += int(expected.max())
    assert nuclei > 1000


@pytest.mark.parametrize("seed", range(20))
def test_window_mode_equals_the_reference_on_random_blobs(seed: int, oracle: Oracle) -> None:
    """Where instances differ, the reference has filled a hole of a ring with another component's pixels."""
    maps = random_canvas(seed, 300, 260).maps
    expected, found = oracle(maps), ours(maps)
    for i in differing(expected, found):
        assert reaches_into_a_hole(expected == i, maps[LAYOUT.NP] >= 128)


def reaches_into_a_hole(instance: NDArray[np.bool_], foreground: NDArray[np.bool_]) -> bool:
    from scipy import ndimage

    components, _ = ndimage.label(foreground)
    return len(np.unique(components[instance])) > 1


def ramps(size: int) -> NDArray[np.uint8]:
    """Maps (plane, y, x) without foreground, of little energy everywhere but at the far edges."""
    maps = np.zeros((LAYOUT.planes, 2 * size, 2 * size), np.uint8)
    ramp = np.linspace(-100, 100, size).round().astype(np.int8).view(np.uint8)
    maps[LAYOUT.H, :, :size] = ramp
    maps[LAYOUT.V, :size] = ramp[:, None]
    return maps


def test_a_nested_component_stays_separate(oracle: Oracle) -> None:
    maps = ramps(100)
    y, x = np.mgrid[:200, :200]
    radius = np.hypot(y - 50, x - 50)
    inner = radius < 8
    maps[LAYOUT.NP][((radius > 18) & (radius < 30)) | inner] = 255
    found, expected = ours(maps), oracle(maps)
    assert np.unique(found[inner]).tolist() != [0]
    assert found.max() == 2 and not set(np.unique(found[inner])) & set(np.unique(found[radius > 18]))
    # The reference gives the inner blob to the ring.
    assert expected.max() == 1 and (expected[inner] == 1).all()


def test_components_that_close_a_ring_diagonally_stay_apart(oracle: Oracle) -> None:
    maps = ramps(100)
    bars = np.zeros((200, 200), np.int32)
    draw_diagonal_ring(bars, 30, 30, 40, 10)
    maps[LAYOUT.NP][bars > 0] = 255
    assert len(differing(bars, ours(maps))) == 0
    assert oracle(maps).max() == 1


def test_fixed_constants_equal_window_mode_on_their_window(noisy_tiles) -> None:
    for tile in noisy_tiles[:2]:
        framed = Canvas(tile.maps).read(Box(0, 0, 1000, 1000).expand(2 * REACH))
        extremes = SobelConstants.of_window(framed[LAYOUT.H], framed[LAYOUT.V])
        np.testing.assert_array_equal(ours(framed, extremes), ours(framed))


def test_instances_of_perfect_maps_are_the_annotated_nuclei(perfect_tiles, constants: SobelConstants) -> None:
    """Also on a tile of 63 nuclei, where the window's extremes lose a third of them."""
    for tile in perfect_tiles:
        fixed = panoptic_quality(tile.instances, ours(tile.maps, constants))
        assert fixed >= 0.94, tile.name
        assert fixed >= panoptic_quality(tile.instances, ours(tile.maps)), tile.name


def test_pixels_beyond_the_edge_are_background(noisy_tiles, constants: SobelConstants) -> None:
    maps = noisy_tiles[0].maps[:, 100:400, 200:500]
    framed = Canvas(maps).read(Box(-50, -40, 330, 345))
    np.testing.assert_array_equal(ours(framed, constants)[40:340, 50:350], ours(maps, constants))


def test_the_smallest_component_has_ten_pixels() -> None:
    maps = ramps(100)
    maps[LAYOUT.NP, 40:43, 40:43] = 255  # 9 pixels
    maps[LAYOUT.NP, 60:65, 60:65] = 255
    found = ours(maps)
    assert found.max() == 1 and (found > 0).sum() == 25 and found[62, 62] == 1


def test_a_component_without_marker_is_no_instance() -> None:
    maps = ramps(100)
    maps[LAYOUT.NP, 20:22, 10:60] = 255  # too thin to survive the opening
    maps[LAYOUT.NP, 60:80, 60:80] = 255
    found = ours(maps)
    assert found.max() == 1 and not found[20:22].any()


def test_an_empty_window_has_no_instances(constants: SobelConstants) -> None:
    maps = np.zeros((LAYOUT.planes, 40, 30), np.uint8)
    for chosen in (None, constants):
        found = ours(maps, chosen)
        assert found.shape == (40, 30) and found.dtype == np.int32 and not found.any()


def test_constants_survive_a_model_card(constants: SobelConstants) -> None:
    assert SobelConstants.from_json(constants.to_json()) == constants


@pytest.mark.parametrize(
    "card", [{}, {"h_min": 1, "h_max": 0, "v_min": 0, "v_max": 1}, {"h_min": "x", "h_max": 0, "v_min": 0, "v_max": 1}]
)
def test_constants_that_cannot_be_used_are_refused(card: dict[str, object]) -> None:
    with pytest.raises(PackageError):
        SobelConstants.from_json(card)
