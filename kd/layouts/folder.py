"""An instance folder: images with label images, described by a table.

dataset.csv has a row for each image: sample_id, image (RGB PNG), labels (uint16 PNG of instance ids, 0 = background),
types (uint8 PNG of class codes, or empty), source, split (train/val/test); where known, group (patient or slide) and
tissue. Paths are relative to the folder. Images are at 40× (0.25 µm).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hover_batch.errors import InputError
from hover_batch.taxonomy import Taxonomy
from kd.classes import CODES, class_ids
from kd.samples import Sample

TABLE = "dataset.csv"
COLUMNS = ("sample_id", "image", "labels", "types", "source", "split")
"""Those that every table has."""


class InstanceFolder:
    """The images of `folder` / dataset.csv. InputError where it is not UTF-8, or lacks a column or field."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            text = (folder / TABLE).read_bytes().decode("utf-8-sig")  # spreadsheets begin UTF-8 with a mark
        except UnicodeDecodeError as error:
            raise InputError(f"{folder / TABLE}: is not UTF-8; save it as CSV UTF-8") from error
        table = csv.DictReader(io.StringIO(text, newline=""))
        missing = [c for c in COLUMNS if c not in (table.fieldnames or ())]
        if missing:
            raise InputError(f"{folder / TABLE}: no column {', '.join(missing)}")
        self._rows = list(table)
        for line, row in enumerate(self._rows, start=2):
            if empty := [c for c in COLUMNS if not row[c] and c != "types"]:
                raise InputError(f"{folder / TABLE}: row {line} has no {', '.join(empty)}")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def classes(self) -> str:
        """The taxonomy of `kd.classes.TAXONOMIES` that is nearest to its types."""
        return "pannuke" if any(row["source"] == "pannuke" and row["types"] for row in self._rows) else "consep"

    @property
    def unread_types(self) -> list[str]:
        """Sources that have types whose codes are not known here, so that they are not read."""
        return [s for s in self.sources if s not in CODES and any(r["types"] for r in self._rows if r["source"] == s)]

    @property
    def folds(self) -> list[str]:
        return list(dict.fromkeys(row["split"] for row in self._rows))

    @property
    def sources(self) -> list[str]:
        """In the order in which they appear."""
        return list(dict.fromkeys(row["source"] for row in self._rows))

    def samples(
        self, taxonomy: Taxonomy, fold: str | None = None, sources: Collection[str] | None = None
    ) -> Iterator[Sample]:
        """The images of one fold (None: of all) and of the named sources (None: of all), in the table's order."""
        for row in self._rows:
            if fold in (None, row["split"]) and (sources is None or row["source"] in sources):
                yield self._read(row, taxonomy)

    def _read(self, row: dict[str, str], taxonomy: Taxonomy) -> Sample:
        image = read_picture(self.folder / row["image"], cv2.IMREAD_COLOR)
        instances = read_picture(self.folder / row["labels"], cv2.IMREAD_UNCHANGED)
        types = None
        if row["types"]:
            codes = read_picture(self.folder / row["types"], cv2.IMREAD_UNCHANGED)
            types = class_ids(codes, row["source"], taxonomy, row["types"])
        for name, array in (("labels", instances), ("types", types)):
            if array is not None and array.shape != image.shape[:2]:
                raise InputError(f"{row[name]}: shape {array.shape}, but its image has {image.shape[:2]}")
        return Sample(
            id=row["sample_id"],
            source=row["source"],
            group=row.get("group") or "",
            image=np.ascontiguousarray(image[..., ::-1]),  # OpenCV reads BGR
            instances=instances.astype(np.int32),
            types=types,
            tissue=row.get("tissue") or "",
            fold=row["split"],
        )


def read_picture(path: Path, flags: int) -> NDArray[np.uint8]:
    """What OpenCV makes of the file with `flags`, in its order of colours. InputError where it cannot."""
    array = cv2.imread(str(path), flags)
    if array is None:
        raise InputError(f"{path} cannot be read as an image")
    return np.asarray(array)
