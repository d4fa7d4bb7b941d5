"""Images with annotated nuclei: an instance folder, described by its dataset.csv.

One row an image: sample_id, image (RGB PNG), labels (uint16 PNG of instance ids, 0 = background), types (uint8 PNG of
class codes, or empty), source, split (train/val/test). Paths are relative to the folder. Images are at 40× (0.25 µm).
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hover_batch.errors import InputError
from hover_batch.taxonomy import CONSEP, Taxonomy

MPP = 0.25
"""Pixel size of the images in µm (40×)."""

CONSEP_MERGED = np.array([0, 1, 2, 3, 3, 4, 4, 4], np.uint8)
"""CoNSeP's codes (1 other, 2 inflammatory, 3 healthy and 4 malignant epithelial, 5 fibroblast, 6 muscle,
7 endothelial) → the ids of `hover_batch.taxonomy.CONSEP`, merged as HoVerNet does."""

TYPE_CODES = {"consep": CONSEP_MERGED}
"""Sources whose type codes are known; the types of others are not read."""


@dataclass(frozen=True)
class Sample:
    """One annotated image.

    image (y, x, 3) uint8 RGB · instances (y, x) int32, 0 = background · types (y, x) uint8 class ids of the
    data's taxonomy, or None where the source annotates none. `group`: patient or slide, as far as known.
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


@dataclass(frozen=True)
class Data:
    """Annotated images, and the classes that their types are ids of."""

    taxonomy: Taxonomy
    samples: list[Sample]


def read_data(path: Path, folds: Iterable[str], sources: Iterable[str] | None = None) -> Data:
    """Read the images of the given folds and of the named sources (None: of all), in the order of the data.

    `path`: an instance folder, whose splits are the folds; its types are those of CoNSeP, merged.
    Raises InputError where something is missing, cannot be read, or does not fit together.
    """
    wanted = list(folds)
    samples = [sample for fold in wanted for sample in read_instance_folder(path, fold, sources)]
    return Data(CONSEP, samples)


def read_instance_folder(folder: Path, split: str, sources: Iterable[str] | None) -> list[Sample]:
    """Read the images of one split and of the named sources (None: of all), in the order of dataset.csv.

    Raises InputError where dataset.csv is missing, a file cannot be read or the shapes of a row disagree.
    """
    table = folder / "dataset.csv"
    if not table.is_file():
        raise InputError(f"{table} is missing; --data names a folder with dataset.csv, images and labels")
    wanted = None if sources is None else set(sources)
    with table.open(newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["split"] == split and (wanted is None or r["source"] in wanted)]
    return [_read_sample(folder, row) for row in rows]


def _read_sample(folder: Path, row: dict[str, str]) -> Sample:
    image = _read_png(folder / row["image"], cv2.IMREAD_COLOR)
    instances = _read_png(folder / row["labels"], cv2.IMREAD_UNCHANGED)
    types = None
    if row["types"] and row["source"] in TYPE_CODES:
        codes = _read_png(folder / row["types"], cv2.IMREAD_UNCHANGED)
        table = TYPE_CODES[row["source"]]
        if codes.max() >= len(table):
            raise InputError(f"{row['types']}: class code {codes.max()} is not one of {row['source']}'s")
        types = table[codes]
    for name, array in (("labels", instances), ("types", types)):
        if array is not None and array.shape != image.shape[:2]:
            raise InputError(f"{row[name]}: shape {array.shape}, but its image has {image.shape[:2]}")
    return Sample(
        id=row["sample_id"],
        source=row["source"],
        group=row["group"],
        image=np.ascontiguousarray(image[..., ::-1]),  # OpenCV reads BGR
        instances=instances.astype(np.int32),
        types=types,
        tissue=row.get("tissue") or "",
        fold=row["split"],
    )


def _read_png(path: Path, flags: int) -> NDArray[np.uint8]:
    array = cv2.imread(str(path), flags)
    if array is None:
        raise InputError(f"{path} cannot be read as an image")
    return np.asarray(array)
