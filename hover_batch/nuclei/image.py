"""Find the nuclei of an image whose maps fit in memory, with the same results as a run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hover_batch.config import PostSettings
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.components import Splitter, without_debris
from hover_batch.nuclei.measure import Nuclei, measure
from hover_batch.nuclei.watershed import instance_map


def instances_of(
    planes: NDArray[np.uint8], splitter: Splitter | None, min_area_px: int = PostSettings.min_area_px
) -> NDArray[np.int32]:
    """Return the instances of an image, (y, x) int32, numbered 1 … n, 0 = background.

    `planes` (3, y, x) uint8: stored planes np, h and v (see `MapLayout`). `splitter`: post-processing of the model's
    system; None for HoVerNet's with Sobel maps normalised by their own extremes (see `instance_map`). `min_area_px`:
    number of pixels below which instances are dropped.
    """
    return without_debris(instance_map(planes[0], planes[1], planes[2], splitter), min_area_px)


def nuclei_of(
    maps: NDArray[np.uint8],
    splitter: Splitter | None,
    layout: MapLayout,
    min_area_px: int = PostSettings.min_area_px,
) -> tuple[NDArray[np.int32], Nuclei]:
    """Return the instances (y, x) int32, numbered 1 … n, 0 = background, and their measurements in pixels of the image.

    The measurements are sorted by anchor, not by instance; `types_by_id` relates the two.

    `maps` (plane, y, x) uint8: stored maps in the planes of `layout`. `splitter`: post-processing of the model's
    system; None for HoVerNet's with Sobel maps normalised by their own extremes (see `instance_map`). `min_area_px`:
    number of pixels below which instances are dropped.
    """
    instances = instances_of(maps[[layout.NP, layout.H, layout.V]], splitter, min_area_px)
    return instances, measure(instances, maps, layout)


def types_by_id(instances: NDArray[np.int32], nuclei: Nuclei) -> NDArray[np.uint8]:
    """Return the class id of each instance, (n,) uint8, in the order of the instance ids.

    `instances` (y, x) int32: instance map. `nuclei`: its measurements, in pixels of the map and in any order.
    """
    instance_ids = instances[nuclei.anchor_y, nuclei.anchor_x]
    return nuclei.type_id[np.argsort(instance_ids)]
