"""Read a slide's nuclei.parquet for export: its metadata, and its rows batch by batch."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from hover_batch.errors import SlideError
from hover_batch.geometry import Box, Mpp, Size
from hover_batch.taxonomy import Taxonomy

BATCH = 10_000
"""Rows per batch: at most about 50 MB as Python objects, independent of the table's length."""

_COLUMNS = frozenset(
    ["slide_id", "nucleus_id", "centroid_x", "centroid_y", "bbox", "type_id", "type", "type_prob", "area_um2"]
    + ["eccentricity", "solidity", "touches_border", "seam_uncertain", "geometry"]
)
"""Columns that the exporters need; a table may have more."""

_NAMESPACE = uuid.UUID("5f0c2f52-9a0b-5d0e-8f55-3c1f6f3f7c11")
"""Namespace of the nuclei's UUIDs. It must never change, or the UUIDs would."""


@dataclass(frozen=True)
class NucleiTable:
    """Table of one slide's nuclei in the file `path` (nuclei.parquet)."""

    path: Path
    """File of the table."""
    slide_id: str
    taxonomy: Taxonomy
    """Classes of the nuclei."""
    level0: Size
    """Size of the slide in level-0 pixels, to which all positions refer."""
    mpp: Mpp
    """Pixel size of level 0 in µm."""
    bounds: Box | None
    """Scanned part of the slide in level-0 pixels; None if the file gives none."""
    rows: int
    """Number of nuclei."""
    schema: pa.Schema
    """Columns of the table."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the table. SlideError if the file is missing, corrupted, or not a table of nuclei."""
        try:
            with pq.ParquetFile(path) as file:
                about = (file.metadata.metadata or {}).get(b"hover_batch")
                schema, rows = file.schema_arrow.remove_metadata(), file.metadata.num_rows
            if about is None:
                raise ValueError("another program wrote it")
            if missing := sorted(_COLUMNS.difference(schema.names)):
                raise ValueError(f"it has no column {', '.join(missing)}")
            held = json.loads(about)
            return cls(
                path=path,
                slide_id=held["slide_id"],
                taxonomy=Taxonomy.from_json(held["taxonomy"]),
                level0=Size(**held["level0"]),
                mpp=Mpp(**held["mpp"]),
                bounds=None if held["bounds"] is None else Box(**held["bounds"]),
                rows=rows,
                schema=schema,
            )
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise unreadable(path, error) from error

    @property
    def measured(self) -> list[str]:
        """Names of the float32 columns: probabilities, sizes, shapes and stain."""
        return [field.name for field in self.schema if field.type == pa.float32()]

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order, at most BATCH at a time, with `columns`; with all columns if None.

        SlideError if the file is corrupted.
        """
        try:
            # Without read-ahead, only one row group at a time is in memory.
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                for batch in file.iter_batches(BATCH, columns=columns):
                    if "type_id" in batch.schema.names:
                        self._check_types(batch)
                    yield batch
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self.path, error) from error

    def _check_types(self, batch: pa.RecordBatch) -> None:
        """Raise SlideError for class ids that do not exist, a corruption that Parquet does not detect."""
        known = len(self.taxonomy.classes)
        if (batch["type_id"].to_numpy() >= known).any():
            raise unreadable(self.path, ValueError(f"it has a type_id above {known - 1}, the last of its classes"))

    def polygons(self, batch: pa.RecordBatch) -> NDArray[Any]:
        """Return the batch's contours as an array (n,) of shapely polygons in level-0 pixels.

        SlideError if one is corrupted.
        """
        try:
            return np.asarray(shapely.from_wkb(batch["geometry"].to_numpy(zero_copy_only=False)))
        except shapely.errors.ShapelyError as error:
            raise unreadable(self.path, error) from error

    def uuids(self, batch: pa.RecordBatch) -> list[str]:
        """Return the UUID of each nucleus. It depends on slide_id and nucleus_id only, and is equal in all exports."""
        return [str(uuid.uuid5(_NAMESPACE, f"{self.slide_id}/{number}")) for number in batch["nucleus_id"].to_pylist()]

    def measurements(self, batch: pa.RecordBatch) -> list[dict[str, float]]:
        """Return the `measured` columns of each nucleus by name, without values that are not finite.

        A float32 becomes the shortest decimal that reads back as the same float32, such as 0.1, not
        0.10000000149011612.
        """
        names = self.measured
        columns = [batch[name].cast(pa.string()).cast(pa.float64()).to_pylist() for name in names]
        return [
            {name: value for name, value in zip(names, values, strict=True) if math.isfinite(value)}
            for values in zip(*columns, strict=True)
        ]


def unreadable(path: Path, error: Exception) -> SlideError:
    """Return a SlideError for the table `path`, which is missing or corrupted, with `error` as the reason."""
    return SlideError(
        f"{path}: cannot be read as a table of nuclei ({error}); remove it and repeat the segment command"
    )
