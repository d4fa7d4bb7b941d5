"""Positions on a Hilbert curve, along which neighbours on the slide are close to each other in a file.

The conversion is the one in Wikipedia's article on the Hilbert curve, for arrays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ORDER = 16
"""Bits of x and of y: cells of at most four pixels on a slide of 200,000 pixels."""


def hilbert_index(x: NDArray[np.float64], y: NDArray[np.float64], width: float, height: float) -> NDArray[np.uint32]:
    """Return the positions (n,) uint32 of points on a Hilbert curve through a square that contains the slide.

    Points outside the square are moved to its edge. `x`, `y`: positions of the points, each (n,), in level-0 pixels.
    `width`, `height`: size of the slide in level-0 pixels.
    """
    cells = 1 << _ORDER
    scale = cells / max(width, height, 1.0)
    column = np.clip(x * scale, 0, cells - 1).astype(np.uint32)
    row = np.clip(y * scale, 0, cells - 1).astype(np.uint32)
    index: NDArray[np.uint32] = np.zeros(len(column), np.uint32)
    for bit in range(_ORDER - 1, -1, -1):
        right, lower = column >> bit & 1, row >> bit & 1
        index = (index << 2 | (3 * right ^ lower)).astype(np.uint32)
        # Turn the quadrant, so that its part of the curve begins and ends next to its neighbours' parts.
        turned = np.where((lower == 0) & (right == 1), np.uint32(cells - 1), np.uint32(0))
        column, row = column ^ turned, row ^ turned
        column, row = np.where(lower == 0, row, column), np.where(lower == 0, column, row)
    return index
