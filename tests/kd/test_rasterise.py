"""Outlines as instances: the pixels of our own tables come back, and drawn outlines keep their size."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from published import tiles
from skimage.measure import regionprops
from skimage.segmentation import relabel_sequential

from hover_batch.nuclei.outlines import outlines
from kd.data.rasterise import SMALLEST, rasterise


def polygons(*shapes: shapely.Geometry) -> np.ndarray:
    return np.array(shapes, object)


@pytest.mark.parametrize("scale", [1, 0.5, 0.25, 1.087])
def test_outlines_of_a_table_give_back_their_pixels(scale):
    """As QuPath writes them: two decimals of level-0 pixels, of which `scale` are an inference pixel."""
    instances = relabel_sequential(tiles(1, 250)[0][1])[0].astype(np.int32)
    found = regionprops(instances)
    bounds = np.array([np.take(nucleus.bbox, (1, 0, 3, 2)) for nucleus in found], np.int64)
    anchors = np.array([min(map(tuple, nucleus.coords))[1] for nucleus in found], np.int64)
    areas = np.array([nucleus.area for nucleus in found], np.int64)
    rings = outlines(instances, bounds, anchors, areas, (0, 0))
    raster = rasterise(polygons(*[shapely.Polygon(np.round(ring * scale, 2) / scale) for ring in rings]), (250, 250))
    plain = [n.label for n in found if n.area >= SMALLEST and n.euler_number == 1]  # one piece without holes
    same = [np.array_equal(raster.instances == i, instances == i) for i in plain]
    assert len(plain) > 30 and np.mean(same) > 0.95
    assert np.mean((raster.instances > 0) == (instances > 0)) > 0.999


def test_a_pixel_belongs_to_the_outline_on_its_centre():
    square = shapely.box(3, 4, 9, 8)  # along the edges of pixels
    through_centres = shapely.box(3.5, 4.5, 8.5, 7.5)
    expected = np.zeros((12, 12), np.int32)
    expected[4:8, 3:9] = 1
    for shape in (square, through_centres):
        assert np.array_equal(rasterise(polygons(shape), (12, 12)).instances, expected)


def test_holes_parts_and_edges():
    ring = shapely.box(1, 1, 11, 11).difference(shapely.box(4, 4, 8, 8))
    parts = shapely.MultiPolygon([shapely.box(14, 1, 18, 5), shapely.box(14, 8, 18, 12)])
    cut = shapely.box(-5, 14, 3, 30)
    raster = rasterise(polygons(ring, parts, cut), (20, 20))
    assert [np.count_nonzero(raster.instances == i) for i in (1, 2, 3)] == [100 - 16, 32, 18]
    assert (raster.small, raster.overlapping, raster.covered) == (0, 0, 0)


def test_the_smaller_of_two_keeps_the_pixels_in_any_order():
    large, small = shapely.box(0, 0, 10, 10), shapely.box(5, 5, 12, 12)
    for order, sizes in (((large, small), [75, 49]), ((small, large), [49, 75])):
        raster = rasterise(polygons(*order), (20, 20))
        assert [np.count_nonzero(raster.instances == i) for i in (1, 2)] == sizes
        assert (raster.overlapping, raster.covered) == (1, 0)
    twice = rasterise(polygons(small, small), (20, 20))
    assert set(np.unique(twice.instances)) == {0, 1} and (twice.overlapping, twice.covered) == (1, 1)


def test_slips_of_the_mouse_are_left_out():
    raster = rasterise(polygons(shapely.box(0, 0, 3, 3), shapely.box(5, 5, 10, 7)), (20, 20))
    assert set(np.unique(raster.instances)) == {0, 2} and raster.small == 1
