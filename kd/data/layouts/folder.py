"""Read an instance folder: images and label images that a table describes.

dataset.csv has one row per image, with the columns sample_id, image (RGB PNG), labels (uint16 PNG of instance ids, 0 =
background), types (uint8 PNG of class codes, or empty), source and split (train, val, test or a fold's number).
Optional columns are group (patient or slide), tissue, magnification, which must be 40, and mpp, or mpp_x and mpp_y,
which must be 0.25 µm per pixel. Upper and lower case of column names do not matter.
Paths are relative to the folder. Images must be at 40× (0.25 µm).
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Iterator
from itertools import zip_longest
from pathlib import Path

from hover_batch.errors import InputError
from hover_batch.files import sha256_file
from hover_batch.taxonomy import Taxonomy
from kd.data.classes import CODES, class_ids
from kd.data.layouts.pictures import read_codes, read_image, read_instances
from kd.data.samples import MPP, Sample, renumbered

TABLE = "dataset.csv"
"""Name of the table."""
COLUMNS = ("sample_id", "image", "labels", "types", "source", "split")
"""Required columns."""
SPLITS = r"train|val|test|[0-9]"
"""Values of split: folds for training, validation and testing, or published folds of a cross-validation."""
FILES = ("image", "labels", "types")
"""Columns with paths."""
MAGNIFICATION = 40
"""Magnification of the images."""
SCALES = {"magnification": MAGNIFICATION, "mpp": MPP, "mpp_x": MPP, "mpp_y": MPP}
"""Optional columns that state the scale of an image, and the value that they must have."""
_NUMBER = re.compile(r"[-+]?(\d+([.,]\d*)?|[.,]\d+)(e[-+]?\d+)?", re.IGNORECASE)


class InstanceFolder:
    """Images of an instance folder; `len` gives their number.

    `folder`: folder that contains dataset.csv.

    Raises InputError if dataset.csv is not a CSV in UTF-8, lists no image, lacks a required column, has no value in one
    (types may be empty), has an unknown split, repeats a column or a sample_id, or states a magnification or pixel size
    that is not within 5 % of 40 or 0.25 µm.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, table = folder, folder / TABLE
        try:
            text = table.read_bytes().decode("utf-8-sig")  # spreadsheets write a byte order mark
        except UnicodeDecodeError as error:
            raise InputError(f"{table}: not UTF-8; save it as CSV UTF-8") from error
        reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
        try:
            # Rows are counted as a spreadsheet shows them, with blank ones.
            lines = {row: [cell.strip() for cell in cells] for row, cells in enumerate(reader, 1) if cells}
        except csv.Error as error:
            raise InputError(f"{table} cannot be read as CSV ({error}); save it again as CSV UTF-8") from error
        header = [name.lower() for name in lines.pop(min(lines))] if lines else []
        if repeated := sorted({c for c in header if c and header.count(c) > 1}):
            raise InputError(f"{table}: several columns {', '.join(repeated)}; keep one of each")
        if missing := [c for c in COLUMNS if c not in header]:
            raise InputError(f"{table}: no column {', '.join(missing)}; add it, and separate columns by commas")
        self._rows = [dict(zip_longest(header, cells[: len(header)], fillvalue="")) for cells in lines.values()]
        if not self._rows:
            raise InputError(f"{table}: it lists no image; add one row per image")
        row_of_id: dict[str, int] = {}
        for number, row in zip(lines, self._rows, strict=True):
            if empty := [c for c in COLUMNS if not row[c] and c != "types"]:
                raise InputError(f"{table}: row {number} has no {', '.join(empty)}; fill it in")
            if not re.fullmatch(SPLITS, row["split"]):
                raise InputError(
                    f"{table}: row {number} has the split {row['split']}; write train, val or test, or the number of a "
                    "published fold"
                )
            if (first := row_of_id.setdefault(row["sample_id"], number)) != number:
                raise InputError(
                    f"{table}: rows {first} and {number} have the same sample_id {row['sample_id']}; change one"
                )
            for column, expected in SCALES.items():
                stated = _NUMBER.search(row.get(column) or "")
                if stated and not math.isclose(float(stated[0].replace(",", ".")), expected, rel_tol=0.05):
                    raise InputError(
                        f"{table}: row {number} has {column} {row[column]}; rescale images and labels to "
                        f"{MAGNIFICATION} ({MPP} µm per pixel)"
                    )

    @staticmethod
    def recognises(folder: Path) -> bool:
        """True if `folder` has a dataset.csv. Its content is not checked."""
        return (folder / TABLE).is_file()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def classes(self) -> str:
        """Name in `kd.data.classes.TAXONOMIES` of the taxonomy that fits the annotated types best.

        It is pannuke if an image of the source pannuke has types, else consep.
        """
        return "pannuke" if any(row["source"] == "pannuke" and row["types"] for row in self._rows) else "consep"

    @property
    def notes(self) -> list[str]:
        """One sentence that names the sources whose types are not read; empty if all types are read."""
        unread = [s for s in self.sources if s not in CODES and any(r["types"] for r in self._rows if r["source"] == s)]
        known = ", ".join(CODES)
        note = f"the types of {', '.join(unread)} are not read, because the meaning of codes is known only for {known}"
        return [note] if unread else []

    @property
    def folds(self) -> list[str]:
        """Names of the folds, in the order in which they appear."""
        return list(dict.fromkeys(row["split"] for row in self._rows))

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order in which they appear."""
        return list(dict.fromkeys(row["source"] for row in self._rows))

    def fingerprints(self) -> list[str]:
        """Return one text per image, in the order of the table, that changes with the image's row or files.

        It consists of the row and the SHA-256 of each file. All files are read.

        Raises InputError if a file cannot be read.
        """
        texts = []
        try:
            for row in self._rows:
                hashes = [sha256_file(self.folder / row[column]) for column in FILES if row[column]]
                texts.append(f"{row} {hashes}")
            return texts
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; add it, or correct {TABLE}") from error

    def samples(
        self, taxonomy: Taxonomy, fold: str | None = None, sources: Collection[str] | None = None
    ) -> Iterator[Sample]:
        """Yield images in the order of the table.

        `taxonomy`: one of TAXONOMIES, to which types are mapped. `fold`: fold of the images; None for all. `sources`:
        their sources; None for all.

        Raises InputError if a file of an image cannot be read or is invalid, or a type code does not exist in its
        source.
        """
        for row in self._rows:
            if (fold is None or row["split"] == fold) and (sources is None or row["source"] in sources):
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
