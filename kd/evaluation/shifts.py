"""Fixed changes of annotated images, which show what a model tolerates: other stains, scanners, pixel sizes."""

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


def _as_it_is(image: Image) -> Image:
    return image


@dataclass(frozen=True)
class Shift:
    """A change of appearance, or of the pixel size `mpp` in µm, of which the model is not told."""

    name: str
    change: Callable[[Image], Image] = _as_it_is
    """Image (y, x, 3) uint8 → the changed image, of the same size."""
    mpp: float = MPP

    def of(self, sample: Sample) -> Sample:
        """The changed image, with its labels."""
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
"""Nuclei are black at gamma 2.5, as on dark, sharpened scans; smaller pixels make them 25 % longer, larger ones 17 %
shorter than those that models for 0.25 µm have learned."""


def _nearest(labels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Labels (y, x) at another size, each pixel that of the nearest centre; OpenCV's nearest is half a pixel off."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip((height, width), labels.shape, strict=True)
    )
    return np.asarray(labels[rows[:, None], columns])
