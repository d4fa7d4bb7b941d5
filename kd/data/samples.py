"""Represent annotated images, independent of the layout that they were read from."""

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
"""Number of hexadecimal digits of an image's hash that a model card records."""


@dataclass(frozen=True)
class Sample:
    """One annotated image with pixels of MPP."""

    id: str
    """Id, unique in a data set."""
    source: str
    """Data set that the image is from."""
    group: str
    """Patient or slide; empty if unknown."""
    image: NDArray[np.uint8]
    """Image (y, x, 3) uint8 RGB."""
    instances: NDArray[np.int32]
    """Ids of nuclei (y, x) int32, 0 = background."""
    types: NDArray[np.uint8] | None
    """Class ids (y, x) uint8 in the taxonomy of the data, 0 on nuclei without a class; None if types are not
    annotated."""
    tissue: str = ""
    """Tissue; empty if unknown."""
    fold: str = ""
    """train, val, test, or the number of a published fold."""

    @cached_property
    def image_sha256(self) -> str:
        """Hex SHA-256 of shape and pixels. It identifies an image independently of its name and file format."""
        digest = hashlib.sha256(f"{self.image.shape}".encode())
        digest.update(np.ascontiguousarray(self.image).tobytes())
        return digest.hexdigest()


def renumbered(instances: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return instances (y, x) int32, renumbered from 1 on if an id needs more than 16 bits.

    Otherwise the result is `instances` itself. Training has a table row for every id up to the largest, and warps ids
    as float32, which is exact only up to 2^24.
    """
    if instances.max(initial=0) <= np.iinfo(np.uint16).max:
        return instances
    return np.asarray(relabel_sequential(instances)[0], np.int32)  # type: ignore[no-untyped-call]  # skimage's


def truth_sha256(samples: Iterable[Sample]) -> str:
    """Return the hex SHA-256 of the instances and types of all `samples`, in order.

    Samples without types are accepted.
    """
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(np.ascontiguousarray(sample.instances).tobytes())
        digest.update(b"none" if sample.types is None else np.ascontiguousarray(sample.types).tobytes())
    return digest.hexdigest()


def hashes_of(samples: Iterable[Sample]) -> list[str]:
    """Return the first SHA_DIGITS (16) digits of each sample's `image_sha256`, for a model card.

    They are sorted and without duplicates.
    """
    return sorted({sample.image_sha256[:SHA_DIGITS] for sample in samples})


@dataclass(frozen=True)
class Data:
    """Annotated images, and the taxonomy of their types."""

    taxonomy: Taxonomy
    """Classes of the types."""
    samples: list[Sample]
    """Annotated images, in order."""
