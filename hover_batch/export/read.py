"""A slide's nuclei.parquet as its exporters read it: what its metadata say, and its rows a batch at a time."""

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
"""Rows of a batch: as Python objects some 50 MB at most, whatever the table's length."""

_COLUMNS = frozenset(
    ["slide_id", "nucleus_id", "centroid_x", "centroid_y", "bbox", "type_id", "type", "type_prob", "area_um2"]
    + ["eccentricity", "solidity", "touches_border", "seam_uncertain", "geometry"]
)
"""What is asked for by name; a table may hold more."""

_NAMESPACE = uuid.UUID("5f0c2f52-9a0b-5d0e-8f55-3c1f6f3f7c11")
"""Of the nuclei's UUIDs: any constant will do, so long as it stays."""


@dataclass(frozen=True)
class NucleiTable:
    """The table in the file `path`. `level0`: the canvas; `mpp`: of it. `bounds`: its scanned part in level-0 pixels,
    where the slide names one. `schema`: of the rows."""

    path: Path
    slide_id: str
    taxonomy: Taxonomy
    level0: Size
    mpp: Mpp
    bounds: Box | None
    rows: int
    schema: pa.Schema

    @classmethod
    def open(cls, path: Path) -> Self:
        """SlideError where the file is missing, harmed, or no table of nuclei."""
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
        """The float32 columns: probabilities, sizes, shapes and stain."""
        return [field.name for field in self.schema if field.type == pa.float32()]

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows in order, of these columns or all, at most BATCH at a time. SlideError where the file is harmed."""
        try:
            # Read ahead, a row group would lie in memory beside the one that is being worked on.
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                for batch in file.iter_batches(BATCH, columns=columns):
                    if "type_id" in batch.schema.names:
                        self._check_types(batch)
                    yield batch
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self.path, error) from error

    def _check_types(self, batch: pa.RecordBatch) -> None:
        """Damage that Parquet does not notice would be counted in classes that there are not."""
        known = len(self.taxonomy.classes)
        if (batch["type_id"].to_numpy() >= known).any():
            raise unreadable(self.path, ValueError(f"it has a type_id beyond its {known} classes"))

    def polygons(self, batch: pa.RecordBatch) -> NDArray[Any]:
        """(n,) shapely polygons in level-0 pixels of the full canvas. SlideError where the file is harmed."""
        try:
            return np.asarray(shapely.from_wkb(batch["geometry"].to_numpy(zero_copy_only=False)))
        except shapely.errors.ShapelyError as error:
            raise unreadable(self.path, error) from error

    def uuids(self, batch: pa.RecordBatch) -> list[str]:
        """One of each nucleus, by its slide and number: the same in every format and at every export."""
        return [str(uuid.uuid5(_NAMESPACE, f"{self.slide_id}/{number}")) for number in batch["nucleus_id"].to_pylist()]

    def measurements(self, batch: pa.RecordBatch) -> list[dict[str, float]]:
        """The `measured` columns of each nucleus, without what is not a number.

        A float32 becomes the shortest decimal that reads back as the same float32: 0.1, not 0.10000000149011612.
        """
        names = self.measured
        columns = [batch[name].cast(pa.string()).cast(pa.float64()).to_pylist() for name in names]
        return [
            {name: value for name, value in zip(names, values, strict=True) if math.isfinite(value)}
            for values in zip(*columns, strict=True)
        ]


def unreadable(path: Path, error: Exception) -> SlideError:
    """What to raise where the table in `path` turns out to be harmed."""
    return SlideError(f"{path}: is no table of nuclei that can be read ({error}); remove it and run the slide anew")
