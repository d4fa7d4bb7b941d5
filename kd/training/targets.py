"""Compute HoVerNet's distance targets from an instance map.

Source: Graham et al. 2019 (HoVer-Net), section 3.1; the scaling of each side by its own extreme and the rounding of
the centroid follow the reference implementation's `gen_instance_hv_map`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def hv_targets(instances: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return distance maps (2, y, x) float32 in [-1, 1], h (along x) then v (along y), zero on the background.

    Along each axis, the distance of a pixel to the rounded centroid of its instance is divided by the largest distance
    on the same side, so the outermost pixels have -1 and 1. The number of passes over the pixels does not depend on the
    number of instances.

    `instances`: (y, x) int32 ids, values up to 0 = background.
    """
    height, width = instances.shape
    n = int(instances.max()) + 1
    count = np.zeros(n, np.int64)  # number of pixels, by id
    sum_y = np.zeros(n, np.int64)
    sum_x = np.zeros(n, np.int64)
    for y in range(height):
        for x in range(width):
            i = instances[y, x]
            if i > 0:
                count[i] += 1
                sum_y[i] += y
                sum_x[i] += x
    centre = np.zeros((n, 2), np.int64)
    for i in range(1, n):
        if count[i]:
            centre[i, 0] = int(sum_x[i] / count[i] + 0.5)
            centre[i, 1] = int(sum_y[i] / count[i] + 0.5)
    low = np.zeros((n, 2), np.int64)  # extreme distances from the centre, by id, along x and y
    high = np.zeros((n, 2), np.int64)
    for y in range(height):
        for x in range(width):
            i = instances[y, x]
            if i > 0:
                dx = x - centre[i, 0]
                dy = y - centre[i, 1]
                low[i, 0] = min(low[i, 0], dx)
                high[i, 0] = max(high[i, 0], dx)
                low[i, 1] = min(low[i, 1], dy)
                high[i, 1] = max(high[i, 1], dy)
    hv = np.zeros((2, height, width), np.float32)
    for y in range(height):
        for x in range(width):
            i = instances[y, x]
            if i > 0:
                dx = x - centre[i, 0]
                dy = y - centre[i, 1]
                if dx < 0:
                    hv[0, y, x] = -dx / low[i, 0]
                elif dx > 0:
                    hv[0, y, x] = dx / high[i, 0]
                if dy < 0:
                    hv[1, y, x] = -dy / low[i, 1]
                elif dy > 0:
                    hv[1, y, x] = dy / high[i, 1]
    return hv
