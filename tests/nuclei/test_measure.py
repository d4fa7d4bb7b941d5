"""Measurements compared with scikit-image's regionprops and tiatoolbox's instances; votes and outlines by hand."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from skimage.measure import label, regionprops
from synthetic_maps import LAYOUT, random_canvas

from hover_batch.nuclei.measure import Nuclei, concatenate, measure, no_nuclei
from hover_batch.nuclei.watershed import SobelConstants, instance_map


def blank(shape: tuple[int, int]) -> NDArray[np.uint8]:
    return np.zeros((LAYOUT.planes, *shape), np.uint8)


def one(mask: NDArray[np.bool_], maps: NDArray[np.uint8] | None = None, origin: tuple[int, int] = (0, 0)) -> Nuclei:
    return measure(mask.astype(np.int32), blank(mask.shape) if maps is None else maps, LAYOUT, origin)


def assert_shapes_are_regionprops(instances: NDArray[np.int32]) -> None:
    nuclei = measure(instances, blank(instances.shape), LAYOUT)
    regions = regionprops(instances)
    regions.sort(key=lambda region: tuple(region.coords[0]))
    assert len(nuclei) == len(regions)

    def of(*names: str) -> list[NDArray[np.float64]]:
        return [np.array([region[name] for region in regions], np.float64) for name in names]

    anchors = np.array([region.coords[0] for region in regions])
    np.testing.assert_array_equal(np.stack([nuclei.anchor_y, nuclei.anchor_x], 1), anchors)
    area, perimeter, major, minor, eccentricity, solidity = of(
        "area", "perimeter", "axis_major_length", "axis_minor_length", "eccentricity", "solidity"
    )
    np.testing.assert_array_equal(nuclei.area_px, area)
    np.testing.assert_array_equal(nuclei.bbox[:, [1, 0, 3, 2]], np.array([region.bbox for region in regions]))
    centroids = np.array([region.centroid for region in regions]) + 0.5
    np.testing.assert_allclose(np.stack([nuclei.centroid_y, nuclei.centroid_x], 1), centroids, rtol=1e-12)
    np.testing.assert_allclose(nuclei.perimeter_px, perimeter, rtol=1e-6)
    np.testing.assert_allclose(nuclei.major_axis_px, major, rtol=1e-6)
    np.testing.assert_allclose(nuclei.minor_axis_px, minor, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(nuclei.eccentricity, eccentricity, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(nuclei.solidity, solidity, rtol=1e-6)


def test_shapes_of_real_nuclei_equal_regionprops(perfect_tiles) -> None:
    instances = perfect_tiles[0].instances
    _, dense = np.unique(instances, return_inverse=True)
    assert_shapes_are_regionprops(dense.reshape(instances.shape).astype(np.int32))


@pytest.mark.parametrize("seed", range(3))
def test_shapes_of_random_blobs_equal_regionprops(seed: int) -> None:
    noisy = np.random.default_rng(seed).random((80, 90)) < 0.55
    assert_shapes_are_regionprops(label(noisy, connectivity=1).astype(np.int32))


def test_types_and_outlines_equal_tiatoolbox(noisy_tiles, constants: SobelConstants, hovernet: Any) -> None:
    compared = 0
    for tile in noisy_tiles[:2]:
        maps = tile.maps
        instances = instance_map(maps[LAYOUT.NP], maps[LAYOUT.H], maps[LAYOUT.V], constants)
        nuclei = measure(instances, maps, LAYOUT)
        expected = hovernet.get_instance_info(instances, maps[LAYOUT.tp].argmax(axis=0), verbose=False)
        ids = instances[nuclei.anchor_y, nuclei.anchor_x]
        for row, i in enumerate(ids.tolist()):
            np.testing.assert_array_equal(nuclei.bbox[row], expected[i]["box"])
            centroid = (nuclei.centroid_x[row], nuclei.centroid_y[row])
            np.testing.assert_allclose(centroid, expected[i]["centroid"] + 0.5, rtol=1e-12)
            assert nuclei.type_id[row] == expected[i]["type"]
            outline = expected[i]["contours"] + 0.5
            if shapely.Polygon(outline).is_valid:
                np.testing.assert_array_equal(nuclei.contours[row], [*outline, outline[0]])
                compared += 1
    assert compared > 1000


@settings(max_examples=200)
@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))).filter(np.any))
def test_outlines_of_any_pixels_are_valid(mask: NDArray[np.bool_]) -> None:
    ring = one(mask).contours[0]
    polygon = shapely.Polygon(ring)
    assert ring.shape[0] >= 4 and (ring[0] == ring[-1]).all()
    assert polygon.is_valid and polygon.area > 0
    y, x = np.nonzero(mask)
    assert shapely.box(x.min(), y.min(), x.max() + 1, y.max() + 1).covers(polygon)


def test_an_outline_runs_through_the_centres_of_the_outermost_pixels() -> None:
    mask = np.zeros((9, 9), bool)
    mask[2:6, 3:8] = True
    polygon = shapely.Polygon(one(mask, origin=(100, 50)).contours[0])
    assert polygon.equals(shapely.box(103.5, 52.5, 107.5, 55.5))


@pytest.mark.parametrize("pixels", [[(4, 5)], [(4, 5), (4, 6)], [(1, 1), (2, 2), (3, 3)], [(2, 2), (3, 2), (4, 2)]])
def test_an_outline_without_area_is_the_bounding_rectangle(pixels: list[tuple[int, int]]) -> None:
    mask = np.zeros((9, 9), bool)
    y, x = np.array(pixels).T
    mask[y, x] = True
    polygon = shapely.Polygon(one(mask).contours[0])
    assert polygon.equals(shapely.box(x.min(), y.min(), x.max() + 1, y.max() + 1))


def test_an_outline_drops_parts_one_pixel_wide() -> None:
    mask = np.zeros((20, 20), bool)
    mask[5:10, 5:10] = True
    mask[7, 10:18] = True
    # The outline steps diagonally into the thread's first pixel and back; beyond it encloses nothing.
    root = shapely.Polygon([(9.5, 6.5), (10.5, 7.5), (9.5, 8.5)])
    assert shapely.Polygon(one(mask).contours[0]).equals(shapely.box(5.5, 5.5, 9.5, 9.5).union(root))


def classed(*pixels: tuple[int, ...]) -> Nuclei:
    """One nucleus in a row, each pixel with its softmax in stored steps, background first."""
    maps = blank((1, len(pixels)))
    maps[LAYOUT.tp, 0] = np.array(pixels).T
    return one(np.ones((1, len(pixels)), bool), maps)


def test_most_pixels_decide_the_class() -> None:
    nucleus = classed((0, 0, 255, 0, 0), (0, 0, 130, 125, 0), (0, 0, 0, 255, 0))
    assert nucleus.type_id.tolist() == [2]
    np.testing.assert_allclose(nucleus.class_probs[0], [0, 385 / 765, 380 / 765, 0], rtol=1e-6)
    np.testing.assert_allclose(nucleus.type_prob, [385 / 765], rtol=1e-6)


def test_the_background_gives_way_to_the_runner_up() -> None:
    nucleus = classed((200, 55, 0, 0, 0), (200, 55, 0, 0, 0), (0, 0, 0, 0, 255))
    assert nucleus.type_id.tolist() == [4]
    np.testing.assert_allclose(nucleus.class_probs[0], [110 / 365, 0, 0, 255 / 365], rtol=1e-6)


def test_if_all_is_background_the_most_probable_class_is_taken() -> None:
    assert classed((200, 10, 0, 45, 0), (200, 20, 0, 35, 0)).type_id.tolist() == [3]


def test_of_equal_classes_the_lower_id_is_taken() -> None:
    assert classed((0, 0, 0, 0, 255), (0, 0, 255, 0, 0)).type_id.tolist() == [2]
    assert classed((0, 0, 127, 127, 0)).type_id.tolist() == [2]
    assert classed((250, 0, 5, 5, 0)).type_id.tolist() == [2]


def test_certain_background_leaves_all_classes_equally_probable() -> None:
    nucleus = classed((255, 0, 0, 0, 0))
    assert nucleus.type_id.tolist() == [1] and nucleus.class_probs.tolist() == [[0.25] * 4]


def test_scores_and_stain_are_means_over_the_pixels() -> None:
    maps = blank((1, 2))
    maps[LAYOUT.NP] = [[128, 255]]
    maps[LAYOUT.hematoxylin] = [[40, 120]]
    maps[LAYOUT.eosin] = [[8, 0]]
    nucleus = one(np.ones((1, 2), bool), maps)
    np.testing.assert_allclose(nucleus.seg_score, [(191.5 + 0.5) / 256], rtol=1e-6)
    np.testing.assert_allclose(nucleus.h_od, [1.0], rtol=1e-6)
    np.testing.assert_allclose(nucleus.e_od, [0.05], rtol=1e-6)


def test_parts_are_concatenated_in_the_order_of_their_anchors() -> None:
    canvas = random_canvas(3, 120, 100)
    instances = label(canvas.maps[LAYOUT.NP] >= 128, connectivity=1).astype(np.int32)
    nuclei = measure(instances, canvas.maps, LAYOUT)
    assert len(nuclei) > 5
    order = np.lexsort((nuclei.anchor_x, nuclei.anchor_y))
    np.testing.assert_array_equal(order, np.arange(len(nuclei)))
    odd = np.arange(len(nuclei)) % 2 == 1
    again = concatenate([no_nuclei(LAYOUT.n_types), nuclei.take(odd), nuclei.take(~odd)])
    np.testing.assert_array_equal(again.anchor_x, nuclei.anchor_x)
    np.testing.assert_array_equal(again.class_probs, nuclei.class_probs)
    for ring, other in zip(again.contours, nuclei.contours, strict=True):
        np.testing.assert_array_equal(ring, other)


def test_a_waist_and_a_spur_leave_the_largest_part_not_its_rectangle() -> None:
    """Two discs joined by one pixel, with a line one pixel wide: make_valid returns a collection for such a contour."""
    own = np.zeros((40, 70), np.uint8)
    cv2.circle(own, (16, 20), 14, 1, -1)
    cv2.circle(own, (46, 20), 10, 1, -1)
    own[20, 28:40] = 1
    own[2:8, 16] = 1
    own[20, 55:68] = 1
    instances = own.astype(np.int32)
    ring = shapely.Polygon(measure(instances, np.zeros((LAYOUT.planes, 40, 70), np.uint8), LAYOUT).contours[0])
    disc = np.pi * 14**2
    assert ring.is_valid and abs(ring.area / disc - 1) < 0.15
