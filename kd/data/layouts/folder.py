"""Read an instance folder: images and label images that a table describes.

dataset.csv has one row per image, with the columns sample_id, image (RGB PNG), labels (uint16 PNG of instance ids, 0 =
background), types (uint8 PNG of class codes, or empty), source and split (train, val, test or a fold's number).
Optional columns are group (patient or slide), tissue and magnification, which must be 40. Paths are relative to the
folder. Images must be at 40× (0.25 µm).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator
from itertools import zip_longest
from pathlib import Path

from hover_batch.errors import InputError
from hover_batch.files import sha256_file
from hover_batch.taxonomy import Taxonomy
from kd.data.classes import CODES, class_ids
from kd.data.layouts.pictures import read_codes, read_image, read_instances
from kd.data.samples import Sample, renumbered

TABLE = "dataset.csv"
"""Name of the table."""
COLUMNS = ("sample_id", "image", "labels", "types", "source", "split")
"""Required columns."""
SPLITS = r"train|val|test|\d"
"""Values of split: folds for training, validation and testing, or published folds of a cross-validation."""
FILES = ("image", "labels", "types")
"""Columns with paths."""
MAGNIFICATION = 40
"""Magnification of the images."""


class InstanceFolder:
    """Images of an instance folder; `len` gives their number.

    Raises InputError if dataset.csv is not a CSV in UTF-8, has no rows, lacks a column or a value, repeats a sample_id,
    or states another magnification than 40.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            text = (folder / TABLE).read_bytes().decode("utf-8-sig")  # spreadsheets write a byte order mark
        except UnicodeDecodeError as error:
            raise InputError(f"{folder / TABLE}: not UTF-8; save it as CSV UTF-8") from error
        cells = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
        try:
            header, *rows = [[cell.strip() for cell in row] for row in cells if row] or [[]]
        except csv.Error as error:
            raise InputError(f"{folder / TABLE} cannot be read as CSV ({error}); save it again as CSV UTF-8") from error
        if missing := [c for c in COLUMNS if c not in header]:
            raise InputError(
                f"{folder / TABLE}: no column {', '.join(missing)}; add it, and separate columns by commas"
            )
        self._rows = [dict(zip_longest(header, row[: len(header)], fillvalue="")) for row in rows]
        if not self._rows:
            raise InputError(f"{folder / TABLE}: it lists no image; add one row per image")
        lines: dict[str, int] = {}
        for line, row in enumerate(self._rows, start=2):
            if empty := [c for c in COLUMNS if not row[c] and c != "types"]:
                raise InputError(f"{folder / TABLE}: row {line} has no {', '.join(empty)}; fill it in")
            if not re.fullmatch(SPLITS, row["split"]):
                raise InputError(
                    f"{folder / TABLE}: row {line} has the split {row['split']}; write train, val or test, or the "
                    "number of a published fold"
                )
            if (first := lines.setdefault(row["sample_id"], line)) != line:
                raise InputError(
                    f"{folder / TABLE}: rows {first} and {line} have the same sample_id {row['sample_id']}; change one"
                )
            scanned = re.match(r"\d+(\.\d+)?", row.get("magnification") or "")
            if scanned and float(scanned[0]) != MAGNIFICATION:
                raise InputError(
                    f"{folder / TABLE}: row {line} has magnification {scanned[0]}; rescale images and labels to "
                    f"{MAGNIFICATION} (0.25 µm per pixel)"
                )

    @staticmethod
    def recognises(folder: Path) -> bool:
        """Return whether the folder has a dataset.csv."""
        return (folder / TABLE).is_file()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def classes(self) -> str:
        """Name in `kd.data.classes.TAXONOMIES` of the taxonomy that fits its types best."""
        return "pannuke" if any(row["source"] == "pannuke" and row["types"] for row in self._rows) else "consep"

    @property
    def unread_types(self) -> list[str]:
        """Names of sources whose types are not read, because the meaning of their codes is unknown."""
        return [s for s in self.sources if s not in CODES and any(r["types"] for r in self._rows if r["source"] == s)]

    @property
    def folds(self) -> list[str]:
        """Names of the folds, in the order in which they appear."""
        return list(dict.fromkeys(row["split"] for row in self._rows))

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order in which they appear."""
        return list(dict.fromkeys(row["source"] for row in self._rows))

    def fingerprints(self) -> list[str]:
        """Return a text for each image, in the order of the table, that differs if its row or a file of it differs.

        Raises InputError if a file cannot be read.
        """
        try:
            return [
                f"{row} {[sha256_file(self.folder / row[kind]) for kind in FILES if row[kind]]}" for row in self._rows
            ]
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; add it, or correct {TABLE}") from error

    def samples(
        self, taxonomy: Taxonomy, fold: str | None = None, sources: Collection[str] | None = None
    ) -> Iterator[Sample]:
        """Yield the images of one fold and of the given sources (None for all), in the order of the table.

        Types are mapped to `taxonomy`, one of TAXONOMIES. Raises InputError if an image cannot be read.
        """
        for row in self._rows:
            if fold in (None, row["split"]) and (sources is None or row["source"] in sources):
                yield self._read(row, taxonomy)

    def _read(self, row: dict[str, str], taxonomy: Taxonomy) -> Sample:
        image = read_image(self.folder / row["image"])
        instances = read_instances(self.folder / row["labels"], image.shape[:2])
        types = None
        if row["types"]:
            codes = read_codes(self.folder / row["types"], image.shape[:2])
            types = class_ids(codes, row["source"], taxonomy, str(self.folder / row["types"]))
        return Sample(
            id=row["sample_id"],
            source=row["source"],
            group=row.get("group") or "",
            image=image,
            instances=renumbered(instances),
            types=types,
            tissue=row.get("tissue") or "",
            fold=row["split"],
        )
