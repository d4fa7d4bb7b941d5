"""Who owns a nucleus, and what a region must see to tell all about those that it owns.

An instance belongs to the region whose half-open core holds its anchor, its first pixel in raster order: an integer
position, hence exactly one owner in any tiling. A region looks through a window, its core and a halo around it; a
component of the foreground that stays clear of the window's margin is seen there exactly as anywhere else.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hover_batch.geometry import Box
from hover_batch.nuclei.measure import Nuclei

MARGIN = 16
"""Pixels along a window's edge where a component is not trusted: watershed.REACH, rounded up."""


def owned(core: Box, nuclei: Nuclei) -> Nuclei:
    """Those nuclei whose anchor lies in `core`."""
    x, y = nuclei.anchor_x, nuclei.anchor_y
    return nuclei.take((core.x0 <= x) & (x < core.x1) & (core.y0 <= y) & (y < core.y1))


def keeps_clear(bounds: NDArray[np.int64], window: Box) -> NDArray[np.bool_]:
    """Which boxes (n, 4) x0, y0, x1, y1, half-open and relative to `window`, keep off its margin."""
    return np.asarray(
        (bounds[:, 0] >= MARGIN)
        & (bounds[:, 1] >= MARGIN)
        & (bounds[:, 2] <= window.width - MARGIN)
        & (bounds[:, 3] <= window.height - MARGIN)
    )
