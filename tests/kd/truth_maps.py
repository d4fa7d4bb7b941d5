"""Stored maps that a perfect network would predict."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hover_batch.model.heads import MapLayout
from kd.training.targets import hv_targets


def maps_of_truth(instances: NDArray[np.int32], types: NDArray[np.uint8], n_types: int) -> NDArray[np.uint8]:
    """Instances and class ids (y, x) → the stored maps (plane, y, x) of a model of `n_types` classes."""
    layout = MapLayout(n_types)
    maps = np.zeros((layout.planes, *instances.shape), np.uint8)
    maps[layout.NP] = np.where(instances > 0, 255, 0)
    maps[layout.H : layout.V + 1] = np.round(127 * hv_targets(instances)).astype(np.int8).view(np.uint8)
    for i in range(n_types):
        maps[layout.tp.start + i] = np.where(types == i, 255, 0)
    return maps
