"""Mask R-CNN's instances: pixels with one centre, and pieces of a nucleus that tiles cut, joined by IoU.

In each tile, the network has merged its nuclei by score, and stores for every pixel the way to the centre of its
nucleus's box. So touching pixels of one nucleus name the same centre. A nucleus on the edge of a tile is found in both
tiles, and each stores the part that it keeps: two pieces that touch, with nearly the same centre. They are joined like
boxes are suppressed within a tile, if the IoU of their boxes is above MIN_IOU. A box that is cut is completed by
symmetry about its centre; along the edge of the tile, where the smaller piece does not show the whole side, both have
the larger side.

Where tiles lie is not used, so an instance depends on the stored maps of its component alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.measure import label

from hover_batch.nuclei.components import Components, without_debris
from hover_batch.nuclei.markers import MIN_PIXELS

MIN_IOU = 0.5
"""IoU of boxes above which touching pieces are one nucleus."""
_BEYOND = 128
"""Largest distance in pixels of a centre from the window, the largest that a byte can store."""


class JoinedPieces:
    """Splitter of Mask R-CNN."""

    def split(self, planes: NDArray[np.uint8], components: Components, chosen: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Split components of a window into instances. Return the instances (y, x) int32, 0 = background.

        Instances are numbered 1 … n by their first pixels in raster order. Components and instances of fewer than
        MIN_PIXELS pixels are dropped.

        `planes` (2, y, x) uint8: stored distances to the centre along x and y, whole pixels as two's-complement bytes.
        `components`: components of the same window. `chosen` (n,): whether each component is split; the others become
        background.
        """
        height, width = components.labels.shape
        y, x = np.nonzero((chosen & components.large)[components.labels])
        to_centre = np.ascontiguousarray(planes[:, y, x]).view(np.int8).astype(np.int32)
        centre_of_pixel = to_centre + [x, y] + _BEYOND
        number = np.zeros((height, width), np.int32)
        number[y, x] = centre_of_pixel[1] * (width + 2 * _BEYOND) + centre_of_pixel[0] + 1
        pieces = label(number, background=0, connectivity=1)  # type: ignore[no-untyped-call]  # untyped in scikit-image
        piece = pieces[y, x]
        n = int(pieces.max()) + 1
        centre, reach = np.zeros((2, n), np.int64), np.zeros((2, n), np.int64)
        centre[:, piece] = centre_of_pixel
        for axis in range(2):
            np.maximum.at(reach[axis], piece, np.abs(to_centre[axis]))
        side = 2 * reach + 1
        links = np.concatenate([_same(_touching(pieces, axis), axis, centre, side) for axis in range(2)], axis=1)
        graph = coo_array((np.ones(links.shape[1], np.bool_), (links[0], links[1])), shape=(n, n))
        _, joined = connected_components(graph, directed=False)
        return without_debris(joined.astype(np.int32)[pieces], MIN_PIXELS)


def _touching(pieces: NDArray[np.int64], axis: int) -> NDArray[np.int64]:
    """Return the pairs (2, n) of different pieces of an image (y, x), 0 = background, that touch along x or y.

    `axis`: 0 for pieces beside each other, 1 for pieces one above the other.
    """
    a, b = (pieces[:, 1:], pieces[:, :-1]) if axis == 0 else (pieces[1:], pieces[:-1])
    touching = (a != b) & (a > 0) & (b > 0)
    return np.unique(np.sort(np.stack([a[touching], b[touching]]), axis=0), axis=1)


def _same(pairs: NDArray[np.int64], axis: int, centre: NDArray[np.int64], side: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return those of the `pairs` (2, n) of pieces that are of one nucleus: (2, m).

    `axis`: as in `_touching`. `centre`, `side` (2, pieces): x and y of the centre, and of the sides, of each box.
    """
    sides = side[:, pairs]
    sides[1 - axis] = sides[1 - axis].max(axis=0)
    doubled = 2 * centre[:, pairs]  # so that all numbers are whole
    low, high = (doubled - sides).max(axis=1), (doubled + sides).min(axis=1)
    common = np.maximum(high - low, 0).prod(axis=0)
    union = 4 * sides.prod(axis=0).sum(axis=0) - common
    return pairs[:, common > MIN_IOU * union]
