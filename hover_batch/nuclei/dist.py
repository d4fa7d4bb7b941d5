"""DIST's instances: the dynamic watershed of the distances to the nucleus's edge, one component at a time.

Source: Naylor et al. 2018, IEEE Transactions on Medical Imaging 38(2), "Segmentation of nuclei in histopathology images
by deep regression of the distance map". Two maxima of the distance belong to different nuclei if the path between them
falls at least DYNAMIC below the lower one; flooding from the maxima that remain divides the component. The comparison
of the HoVerNet paper uses the same post-processing with a threshold of half a pixel, and distances cut to whole pixels,
so that a maximum is at least one pixel high (`src/postproc/dist.py` of vqdang/hover_net). The reference removes the
line between two nuclei; here its pixels belong to one of them.

The distance outside of a component counts as zero, so its instances depend on no pixel outside of it.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hover_batch.model.heads import DISTANCE_PX
from hover_batch.nuclei.components import Components
from hover_batch.nuclei.energy import HV_STEPS
from hover_batch.nuclei.flood import flood

DYNAMIC = round(HV_STEPS / DISTANCE_PX)
"""Stored steps by which a maximum must exceed the highest path to a higher one: a pixel."""


class DynamicWatershed:
    """Splitter of DIST."""

    def split(self, planes: NDArray[np.uint8], components: Components, chosen: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Split components of a window into instances. Return the instances (y, x) int32, 0 = background.

        Instances are numbered 1 … n by component, then by the first pixel of their maximum. Components of fewer than
        MIN_PIXELS (10) pixels are dropped.

        `planes` (2, y, x) uint8: the stored distance, and a plane that is not used. `components`: components of the
        same window. `chosen` (n,): whether each component is split; the others become background.
        """
        distance = np.ascontiguousarray(planes[0]).view(np.int8)
        return np.asarray(_split(distance, components.labels, components.bounds, chosen & components.large), np.int32)


@njit(cache=True, nogil=True)
def _split(
    distance: NDArray[np.int8], labels: NDArray[np.int32], bounds: NDArray[np.int64], chosen: NDArray[np.bool_]
) -> NDArray[np.int32]:
    instances = np.zeros(labels.shape, np.int32)
    numbered = 0
    for component in np.flatnonzero(chosen):
        x0, y0, x1, y1 = bounds[component]
        own = labels[y0:y1, x0:x1] == component
        height, width = own.shape
        inside = np.zeros((height, width), np.int8)
        energy = np.ones((height + 2, width + 2), np.float32)
        for y in range(height):
            for x in range(width):
                if own[y, x]:
                    inside[y, x] = max(distance[y0 + y, x0 + x], 0)
                    energy[y + 1, x + 1] = 1 - inside[y, x] / np.float32(128)
        markers, number = maxima(own, inside, DYNAMIC)
        if number > 1:
            markers = flood(own, energy, markers)
        for y in range(height):
            for x in range(width):
                if own[y, x]:
                    instances[y0 + y, x0 + x] = numbered + (markers[y, x] if number > 1 else 1)
        numbered += number
    return instances


@njit(cache=True, nogil=True)
def maxima(own: NDArray[np.bool_], height_of: NDArray[np.int8], dynamic: int) -> tuple[NDArray[np.int32], int]:
    """Return the maxima of a component that are at least `dynamic` high, (y, x) int32, 0 = none, and their number.

    The height of a maximum is its value minus the lowest value on the path to a higher maximum, along the path where
    this lowest value is highest. The highest maximum of the component always remains, so the number is at least 1. A
    maximum consists of the pixels of its basin that are less than `dynamic` below its highest value. Maxima are
    numbered by their first pixels.

    Pixels are added from the highest to the lowest, equal ones in raster order. A pixel that joins two basins merges
    them if the lower one is less than `dynamic` high.

    `own` (y, x): the component's pixels in its bounding box. `height_of` (y, x) int8: stored heights, at least 0.
    `dynamic`: smallest height in stored steps.
    """
    rows, columns = own.shape
    basin_of = np.full((rows, columns), -1, np.int64)
    capacity = np.count_nonzero(own)
    # Basins are numbered from the highest to the lowest.
    parent, top = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    basins = 0
    pixels = _descending(own, height_of)
    for i in range(len(pixels)):
        y, x = pixels[i, 0], pixels[i, 1]
        found = -1
        for ny, nx in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
            if ny < 0 or nx < 0 or ny == rows or nx == columns or basin_of[ny, nx] < 0:
                continue
            basin = _root(parent, basin_of[ny, nx])
            high, low = min(basin, found), max(basin, found)
            if found >= 0 and high != low and top[low] - height_of[y, x] < dynamic:
                parent[low] = high
            found = high if found >= 0 else basin
        if found < 0:
            found = basins
            parent[basins], top[basins] = basins, height_of[y, x]
            basins += 1
        basin_of[y, x] = found
    markers = np.zeros((rows, columns), np.int32)
    number_of = np.zeros(capacity, np.int32)
    number = 0
    for y in range(rows):
        for x in range(columns):
            if own[y, x]:
                root = _root(parent, basin_of[y, x])
                if height_of[y, x] > top[root] - dynamic:
                    if number_of[root] == 0:
                        number += 1
                        number_of[root] = number
                    markers[y, x] = number_of[root]
    return markers, number


@njit(cache=True, nogil=True)
def _descending(own: NDArray[np.bool_], height_of: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return (y, x) of the component's pixels, the highest first, equal ones in raster order: (n, 2)."""
    starts = np.zeros(129, np.int64)
    for y in range(own.shape[0]):
        for x in range(own.shape[1]):
            if own[y, x]:
                starts[128 - height_of[y, x]] += 1
    starts = np.cumsum(starts)
    pixels = np.empty((starts[-1], 2), np.int64)
    for y in range(own.shape[0]):
        for x in range(own.shape[1]):
            if own[y, x]:
                place = starts[127 - height_of[y, x]]
                pixels[place, 0], pixels[place, 1] = y, x
                starts[127 - height_of[y, x]] += 1
    return pixels


@njit(cache=True, nogil=True)
def _root(parent: NDArray[np.int64], basin: int) -> int:
    """Return the basin into which a basin was merged. The links that lead to it are shortened."""
    while parent[basin] != basin:
        parent[basin] = parent[parent[basin]]
        basin = parent[basin]
    return basin
