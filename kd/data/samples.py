"""What annotated images are, wherever they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import relabel_sequential

from hover_batch.taxonomy import Taxonomy

MPP = 0.25
"""Pixel size of the images in µm (40×)."""
SHA_DIGITS = 16
"""How many hexadecimal digits of an image's hash a card records."""


@dataclass(frozen=True)
class Sample:
    """One annotated image.

    image (y, x, 3) uint8 RGB · instances (y, x) int32, 0 = background · types (y, x) uint8 class ids of the
    data's taxonomy, or None where the source annotates none; 0 on a nucleus says that the taxonomy has no class for
    it. `group`: patient or slide, as far as known.
    """

    id: str
    source: str
    group: str
    image: NDArray[np.uint8]
    instances: NDArray[np.int32]
    types: NDArray[np.uint8] | None
    tissue: str = ""
    fold: str = ""
    """What it is for: train, val, test, or the number of a published fold."""

    @cached_property
    def image_sha256(self) -> str:
        """Of the shape and the pixels: what knows an image again, whatever it is called and however it is stored."""
        digest = hashlib.sha256(f"{self.image.shape}".encode())
        digest.update(np.ascontiguousarray(self.image).tobytes())
        return digest.hexdigest()


def renumbered(instances: NDArray[np.int32]) -> NDArray[np.int32]:
    """Instances (y, x) as they are, or from 1 on where an id is past 16 bits: what looks at a crop has a row for every
    id up to the largest, and the float32 that labels are warped in tells ids apart up to 2^24."""
    if instances.max(initial=0) <= np.iinfo(np.uint16).max:
        return instances
    return np.asarray(relabel_sequential(instances)[0], np.int32)  # type: ignore[no-untyped-call]  # skimage's


def truth_sha256(samples: Iterable[Sample]) -> str:
    """Of instances and types of all samples, in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(np.ascontiguousarray(sample.instances).tobytes())
        digest.update(b"none" if sample.types is None else np.ascontiguousarray(sample.types).tobytes())
    return digest.hexdigest()


def hashes_of(samples: Iterable[Sample]) -> list[str]:
    """By what a card knows the images again, sorted: the first SHA_DIGITS of each `image_sha256`."""
    return sorted({sample.image_sha256[:SHA_DIGITS] for sample in samples})


@dataclass(frozen=True)
class Data:
    """Annotated images, and the classes that their types are ids of."""

    taxonomy: Taxonomy
    samples: list[Sample]
