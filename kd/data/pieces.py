"""Count the connected pieces of annotated nuclei."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label


def pieces_of(instances: NDArray[np.int32], smallest: int = 1) -> NDArray[np.int64]:
    """Return the number of connected pieces of each of the n nuclei, (n,) int64, in the order of their ids.

    Pixels that touch at a corner are connected.

    `instances`: (y, x) int32 ids, 0 = background. `smallest`: number of pixels below which a piece is not counted.
    """
    pieces, n = label(instances, connectivity=2, return_num=True)  # type: ignore[no-untyped-call]  # skimage's
    id_of_piece = np.zeros(n + 1, np.int32)
    id_of_piece[pieces] = instances
    counted = np.bincount(pieces.ravel(), minlength=n + 1)[1:] >= smallest
    ids, nucleus_of_piece = np.unique(id_of_piece[1:], return_inverse=True)
    return np.bincount(nucleus_of_piece[counted], minlength=len(ids)).astype(np.int64)
