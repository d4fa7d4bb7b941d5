"""Compute the limits of a model card: the range of nuclei in annotated images, to flag slides that look different."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hover_batch.model.predict import stain_density
from kd.data.samples import MPP, Sample

MIN_IMAGES = 20
"""Minimum number of images; the extremes of fewer say little about other images."""
_MARGIN = 1.5
"""Factor by which limits extend beyond the images, since a slide that is slightly paler is not a new kind of image."""


def slide_limits(samples: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """Return the limits (lowest, highest) of `area_um2`, `h_od` and `e_od` for a card, by name.

    They limit the median area of an image's nuclei in µm², and the mean optical densities of hematoxylin and eosin in
    its nuclei. They are the 1st percentile over images with nuclei, divided by 1.5, and the 99th percentile, multiplied
    by 1.5; the lowest `e_od` is 0. See `hover_batch.quality.flags.LIMITS`.

    The result is empty if fewer than MIN_IMAGES (20) images have nuclei.

    `samples`: images in which all nuclei are outlined.
    """
    measured = np.array([_measures(sample) for sample in samples if sample.instances.any()]).reshape(-1, 3)
    if len(measured) < MIN_IMAGES:
        return {}
    lowest, highest = np.percentile(measured, (1, 99), axis=0)
    area, hematoxylin, eosin = (
        (float(low / _MARGIN), float(high * _MARGIN)) for low, high in zip(lowest, highest, strict=True)
    )
    return {"area_um2": area, "h_od": hematoxylin, "e_od": (0.0, eosin[1])}  # nuclei may be without eosin


def _measures(sample: Sample) -> tuple[float, float, float]:
    """Return the median area of the nuclei in µm², and the mean densities of hematoxylin and eosin in them."""
    areas = np.unique(sample.instances[sample.instances > 0], return_counts=True)[1]
    densities = stain_density(torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None])[0].numpy()
    hematoxylin, eosin = densities[:, sample.instances > 0].mean(axis=1)
    return float(np.median(areas)) * MPP**2, float(hematoxylin), float(eosin)
