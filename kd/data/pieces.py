"""Count the connected pieces of annotated nuclei."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label


def pieces_of(instances: NDArray[np.int32], smallest: int = 1) -> NDArray[np.int64]:
    """Return the number of connected pieces (n,) int64 of each of the n nuclei, in the order of their ids.

    `instances`: (y, x) int32 ids, 0 = background. Pixels that touch at a corner are connected. Pieces with fewer than
    `smallest` pixels are not counted.
    """
    components, n = label(instances, connectivity=2, return_num=True)  # type: ignore[no-untyped-call]  # skimage's
    id_of = np.zeros(n + 1, np.int32)
    id_of[components] = instances
    counted = np.bincount(components.ravel(), minlength=n + 1)[1:] >= smallest
    ids, rank = np.unique(id_of[1:], return_inverse=True)
    return np.bincount(rank[counted], minlength=len(ids)).astype(np.int64)
