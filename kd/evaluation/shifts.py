"""Change annotated images in fixed ways that simulate other stains, scanners and pixel sizes: shifts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kd.data.appearance import blur, change_gamma, change_stain, jpeg
from kd.data.samples import MPP, Sample

Image = NDArray[np.uint8]
"""(y, x, 3) uint8 RGB."""


@dataclass(frozen=True)
class Shift:
    """Change of the appearance or of the pixel size of images."""

    name: str
    """Name in tables."""
    change: Callable[[Image], Image] = lambda image: image
    """Function from an image (y, x, 3) uint8 RGB to the changed image of the same size."""
    mpp: float = MPP
    """Pixel size in µm to which images are resampled; the model still assumes MPP."""

    def apply(self, sample: Sample) -> Sample:
        """Return a copy of `sample` with the shift applied to its image.

        If the shift changes the pixel size, image and labels are resampled to pixels of `mpp`. Labels are resampled by
        nearest neighbour, the image by area averages to larger pixels and by bicubic interpolation to smaller ones.
        """
        image = self.change(sample.image)
        if self.mpp == MPP:
            return replace(sample, image=image)
        height, width = (round(side * MPP / self.mpp) for side in sample.instances.shape)
        interpolation = cv2.INTER_AREA if self.mpp > MPP else cv2.INTER_CUBIC
        return replace(
            sample,
            image=np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), np.uint8),
            instances=_nearest(sample.instances, height, width),
            types=None if sample.types is None else _nearest(sample.types, height, width),
        )


UNCHANGED = Shift("unchanged")
"""Shift that changes nothing."""
SHIFTS = (
    Shift("dark, gamma 1.6", partial(change_gamma, exponent=1.6)),
    Shift("darker, gamma 2.5", partial(change_gamma, exponent=2.5)),
    Shift("light, gamma 0.6", partial(change_gamma, exponent=0.6)),
    Shift("hematoxylin × 1.4", partial(change_stain, factors=(1.4, 1, 1))),
    Shift("hematoxylin × 0.7", partial(change_stain, factors=(0.7, 1, 1))),
    Shift("eosin × 1.5", partial(change_stain, factors=(1, 1.5, 1))),
    Shift("blur 1 px", partial(blur, sigma=1)),
    Shift("blur 2 px", partial(blur, sigma=2)),
    Shift("JPEG quality 30", partial(jpeg, quality=30)),
    Shift("pixels of 0.20 µm", mpp=0.2),
    Shift("pixels of 0.30 µm", mpp=0.3),
)
"""All shifts. At gamma 2.5, nuclei are black, as on dark and sharpened scans. In images with pixels of 0.20 µm, nuclei
are 25 % larger in each direction than models for 0.25 µm expect; with 0.30 µm, they are 17 % smaller."""


def _nearest(labels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Return labels (y, x) resampled by nearest pixel centres; OpenCV's nearest neighbour is off by half a pixel."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip((height, width), labels.shape, strict=True)
    )
    return np.asarray(labels[rows[:, None], columns])
