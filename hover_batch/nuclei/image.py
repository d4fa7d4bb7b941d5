"""Nuclei of an image whose maps fit in memory, as a run reports them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hover_batch.config import PostSettings
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.measure import Nuclei, measure
from hover_batch.nuclei.watershed import SobelConstants, instance_map, without_debris


def instances_of(
    planes: NDArray[np.uint8], constants: SobelConstants | None, min_area_px: int = PostSettings.min_area_px
) -> NDArray[np.int32]:
    """Return the instances (y, x) int32 of stored np, h and v (3, y, x) uint8 of at least `min_area_px` pixels."""
    return without_debris(instance_map(planes[0], planes[1], planes[2], constants), min_area_px)


def nuclei_of(
    maps: NDArray[np.uint8],
    constants: SobelConstants | None,
    layout: MapLayout,
    min_area_px: int = PostSettings.min_area_px,
) -> tuple[NDArray[np.int32], Nuclei]:
    """Return the instances (y, x) int32 of stored maps (plane, y, x) uint8, and their measurements.

    `constants`: None normalises the Sobel maps by their own extremes (see `instance_map`).
    """
    found = instances_of(maps[[layout.NP, layout.H, layout.V]], constants, min_area_px)
    return found, measure(found, maps, layout)


def types_by_id(found: NDArray[np.int32], nuclei: Nuclei) -> NDArray[np.uint8]:
    """Return the class ids (n,) uint8 ordered by instance id; `nuclei` are ordered by anchor."""
    return nuclei.type_id[np.argsort(found[nuclei.anchor_y, nuclei.anchor_x])]
