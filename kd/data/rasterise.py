"""Draw the outlines of nuclei as instances: a pixel belongs to a nucleus if its centre lies in or on its outline.

So the outlines of our own tables, which run through the centres of the border pixels, give back the pixels that they
were made from, and outlines that were drawn by hand are neither grown nor shrunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

SMALLEST = 10
"""Smallest number of pixels of a nucleus, HoVerNet's; anything smaller is a slip of the mouse."""
_STEPS = 16
"""Positions are rounded to this fraction of a pixel (16 nm). QuPath writes two decimals of level-0 pixels; without
rounding, a border pixel whose centre lies on the outline would be lost at random."""


@dataclass(frozen=True)
class Raster:
    """Instances that were drawn from outlines."""

    instances: NDArray[np.int32]
    """Instances (y, x) int32: 0 = background, k + 1 = outline k."""
    small: int
    """Number of outlines with fewer than SMALLEST pixels, which are left out."""
    overlapping: int
    """Number of nuclei that lost pixels to a smaller nucleus."""
    covered: int
    """Number of nuclei that lost all their pixels, and are left out."""


def rasterise(outlines: NDArray[np.object_], shape: tuple[int, int]) -> Raster:
    """Draw outlines as instances of an image.

    Where nuclei overlap, pixels belong to the smaller one. A nucleus inside another one therefore remains. If their
    areas are equal, pixels belong to the first one. Parts outside the image are cut off. Outlines that had fewer than
    SMALLEST (10) pixels before they were cut are left out.

    `outlines` (n,): polygons or multipolygons, in pixels of the image, where pixel (i, j) covers [i, i+1) × [j, j+1).
    They are rounded to sixteenths of a pixel. `shape`: (y, x) of the image.
    """
    instances = np.zeros(shape, np.int32)
    rounded = shapely.transform(outlines, lambda points: np.rint(points * _STEPS) / _STEPS)
    shapely.prepare(rounded)
    small = 0
    drawn: set[int] = set()
    losers: set[int] = set()
    for k in np.lexsort((-np.arange(len(rounded)), -shapely.area(rounded))).tolist():
        x, y = _pixels(rounded[k])
        if len(x) < SMALLEST:
            small += 1
            continue
        inside = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])
        x, y = x[inside], y[inside]
        losers.update(np.unique(instances[y, x]).tolist())
        instances[y, x] = k + 1
        if len(x):
            drawn.add(k + 1)
    covered = drawn - set(np.unique(instances).tolist())
    return Raster(instances, small, len(losers - {0}), len(covered))


def _pixels(outline: shapely.Geometry) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the columns and rows of the pixels whose centres lie in or on an outline."""
    x0, y0, x1, y1 = shapely.bounds(outline)
    columns = np.arange(np.ceil(x0 - 0.5), np.floor(x1 - 0.5) + 1)
    rows = np.arange(np.ceil(y0 - 0.5), np.floor(y1 - 0.5) + 1)
    x, y = np.meshgrid(columns, rows)
    inside = shapely.intersects_xy(outline, x + 0.5, y + 0.5)
    return x[inside].astype(np.int64), y[inside].astype(np.int64)
