"""Nucleus ownership, and the context that a region needs.

An instance belongs to the region whose half-open core contains its anchor, its first pixel in raster order: an integer
position, hence exactly one owner in any tiling. A region reads a window, its core with a halo around it. A component of
the foreground that does not touch the window's margin gives the same instances there as in any other window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hover_batch.geometry import Box
from hover_batch.nuclei.measure import Nuclei

MARGIN = 16
"""Width in pixels of a window's margin; components that touch it may depend on pixels outside (≥ watershed.REACH)."""


def owned(core: Box, nuclei: Nuclei) -> Nuclei:
    """Return the nuclei whose anchor lies in `core`, in their order.

    `core`: box in the coordinates of the anchors; half-open. `nuclei`: nuclei to choose from.
    """
    x, y = nuclei.anchor_x, nuclei.anchor_y
    return nuclei.take((core.x0 <= x) & (x < core.x1) & (core.y0 <= y) & (y < core.y1))


def clear_of_margin(bounds: NDArray[np.int64], window: Box) -> NDArray[np.bool_]:
    """Return, for each box, True if it lies in `window` without touching its margin of MARGIN (16) pixels: (n,) bool.

    `bounds` (n, 4): x0, y0, x1, y1 of each box, half-open, relative to the window. `window`: only its size matters.
    """
    return np.asarray(
        (bounds[:, 0] >= MARGIN)
        & (bounds[:, 1] >= MARGIN)
        & (bounds[:, 2] <= window.width - MARGIN)
        & (bounds[:, 3] <= window.height - MARGIN)
    )
