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
from hover_batch.files import read_json, sha256_file
from hover_batch.geometry import Box, Grid, Mpp, Size
from hover_batch.taxonomy import Taxonomy
from hover_batch.uncertainty import CALIBRATED, calibrated_column

BATCH = 10_000
"""Rows per batch: at most about 50 MB as Python objects, independent of the table's length."""

_POSITIONS = ("centroid_x", "centroid_y")
_SHAPES = ("area_um2", "eccentricity", "solidity")
_COLUMNS = {
    **dict.fromkeys(("slide_id", "type"), "string"),
    "nucleus_id": "uint32",
    "type_id": "uint8",
    **dict.fromkeys(_POSITIONS, "double"),
    "bbox": "struct<xmin: double, ymin: double, xmax: double, ymax: double>",
    **dict.fromkeys(("type_prob", *_SHAPES), "float"),
    **dict.fromkeys(("touches_border", "seam_uncertain"), "bool"),
    "geometry": "binary",
}
"""Columns that the exporters need, with their Arrow types; a table may hold more."""

NAMESPACE = uuid.UUID("5f0c2f52-9a0b-5d0e-8f55-3c1f6f3f7c11")
"""Namespace of all UUIDs in exports. It must never change, or the UUIDs would."""


@dataclass(frozen=True)
class NucleiTable:
    """Table of one slide's nuclei in the file `path` (nuclei.parquet)."""

    path: Path
    """File of the table."""
    slide_id: str
    """Id of the slide."""
    taxonomy: Taxonomy
    """Classes of the nuclei."""
    level0: Size
    """Size of the slide in level-0 pixels, to which all positions refer."""
    mpp: Mpp
    """Pixel size of level 0 in µm."""
    grid: Grid
    """Inference grid, on whose pixels the nuclei were found."""
    bounds: Box | None
    """Scanned part of the slide in level-0 pixels; None if the file gives none."""
    software: str
    """Version of hover-batch that wrote the table."""
    rows: int
    """Number of nuclei."""
    schema: pa.Schema
    """Columns of the table."""
    model: str
    """Name of the model."""
    model_sha256: str
    """Hash of the model's package."""
    fingerprint: str
    """Hash of the slide's content, from the survey.json beside the table; that of the table if there is none."""
    dicom: Path | None = None
    """Folder of the DICOM slide that was segmented; None if the slide is not DICOM, or not available."""

    @classmethod
    def open(cls, path: Path, dicom: Path | None = None) -> Self:
        """Read the metadata of the table at `path` and check it. `batches` reads the rows.

        No file stays open. If there is a slide.json beside the table, the checksum of the whole file is computed and
        compared.

        `dicom`: folder of the DICOM slide that was segmented; None if the slide is not DICOM, or not available.

        SlideError if the file is missing, corrupted, or not a table of nuclei, or if slide.json records another table.
        """
        try:
            with pq.ParquetFile(path) as file:
                metadata_json = (file.metadata.metadata or {}).get(b"hover_batch")
                schema, rows = file.schema_arrow.remove_metadata(), file.metadata.num_rows
            if metadata_json is None:
                raise SlideError(f"{path}: is not a table of nuclei; give the nuclei.parquet of a slide")
            if missing := sorted(_COLUMNS.keys() - set(schema.names)):
                raise ValueError(f"it has no column {', '.join(missing)}")
            for name, kind in _COLUMNS.items():
                actual = str(schema.field(name).type).replace(" not null", "")
                if actual != kind:
                    raise ValueError(f"its column {name} is of the type {actual}, not {kind}")
            metadata = json.loads(metadata_json)
            finished = read_json(path.with_name("slide.json"))
            if finished is not None and finished.get("slide_id") != metadata["slide_id"]:
                raise ValueError(f"it is the table of the slide {metadata['slide_id']}")
            if finished is not None and finished.get("nuclei_sha256") != sha256_file(path):
                raise ValueError("checksum mismatch: slide.json records another table")
            level0, mpp = Size(**metadata["level0"]), Mpp(**metadata["mpp"])
            scale = metadata["inference_scale"]
            survey = read_json(path.with_name("survey.json"))
            return cls(
                path=path,
                slide_id=metadata["slide_id"],
                taxonomy=Taxonomy.from_json(metadata["taxonomy"]),
                level0=level0,
                mpp=mpp,
                grid=Grid.scaled(level0, mpp, scale["x"], scale["y"]),
                bounds=None if metadata["bounds"] is None else Box(**metadata["bounds"]),
                software=metadata["software"],
                rows=rows,
                schema=schema,
                model=metadata["model"]["id"],
                model_sha256=metadata["model"]["sha256"],
                fingerprint=sha256_file(path) if survey is None else survey["slide"]["fingerprint"],
                dicom=dicom,
            )
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise unreadable(path, error) from error

    @property
    def calibrated(self) -> list[str]:
        """Names of the columns that the table also has with calibrated values, in the order of CALIBRATED."""
        return [name for name in CALIBRATED if calibrated_column(name) in self.schema.names]

    @property
    def measured(self) -> list[str]:
        """Names of the float32 columns of the table: probabilities, sizes, shapes and stain densities."""
        return [field.name for field in self.schema if field.type == pa.float32()]

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order, in batches of at most BATCH rows.

        `columns`: names of the columns; None for all.

        SlideError if the file is corrupted, or was altered so that values are missing or impossible (see `checked`).
        """
        try:
            # Without read-ahead, only one row group at a time is in memory.
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                for batch in file.iter_batches(BATCH, columns=columns):
                    yield self.checked(batch)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self.path, error) from error

    def checked(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Check the values of `batch`, and return `batch` itself. Parquet does not check them.

        Contours are not checked here, but in `polygons`.

        SlideError if a value is missing (a null in a column that the exporters need or in a float32 column) or
        impossible (a centroid, bbox or shape that is not finite, a centroid below 0, or a type_id without a class).
        """
        if fault := self._fault_of(batch):
            raise unreadable(self.path, ValueError(fault))
        return batch

    def _fault_of(self, batch: pa.RecordBatch) -> str:
        known = len(self.taxonomy.classes)
        for name in (name for name in (*_COLUMNS, *self.measured) if name in batch.schema.names):
            column = batch[name]
            parts = column.flatten() if name == "bbox" else [column]
            if any(part.null_count for part in (column, *parts)):
                return f"its column {name} has missing values"
            if name in (*_POSITIONS, *_SHAPES, "bbox") and not all(np.isfinite(p.to_numpy()).all() for p in parts):
                return f"its column {name} has values that are not finite"
            if name in _POSITIONS and (column.to_numpy() < 0).any():
                return f"its column {name} has values below 0"
            if name == "type_id" and (column.to_numpy() >= known).any():
                return f"it has a type_id above {known - 1}, the last of its classes"
        return ""

    def polygons(self, batch: pa.RecordBatch) -> NDArray[Any]:
        """Return the batch's contours as an array (n,) of shapely polygons in level-0 pixels.

        `batch`: rows with the column `geometry`. SlideError if a contour is corrupted, empty or not a polygon, or has a
        coordinate that is not finite.
        """
        return read_polygons(self.path, batch["geometry"])

    def uuids(self, batch: pa.RecordBatch) -> list[str]:
        """Return the UUID of each nucleus in `batch`, in order.

        It depends only on slide_id and nucleus_id, so it is the same in all exports.
        """
        return [str(uuid.uuid5(NAMESPACE, f"{self.slide_id}/{number}")) for number in batch["nucleus_id"].to_pylist()]

    def measurements(self, batch: pa.RecordBatch) -> list[dict[str, float]]:
        """Return the finite values of the `measured` columns for each nucleus in `batch`, by column.

        A float32 becomes the shortest decimal number that reads back as the same float32, such as 0.1 instead of
        0.10000000149011612.
        """
        names = self.measured
        columns = [batch[name].cast(pa.string()).cast(pa.float64()).to_pylist() for name in names]
        return [
            {name: value for name, value in zip(names, values, strict=True) if math.isfinite(value)}
            for values in zip(*columns, strict=True)
        ]


def read_polygons(path: Path, geometry: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """Return the contours of a table as an array (n,) of shapely polygons in level-0 pixels.

    `path`: file of the table, for the message. `geometry`: its column `geometry` (WKB).

    SlideError if a contour is corrupted, empty or not a polygon, or has a coordinate that is not finite.
    """
    try:
        with np.errstate(invalid="ignore"):  # NaN is refused below
            polygons: NDArray[Any] = np.asarray(shapely.from_wkb(geometry.to_numpy(zero_copy_only=False)))
    except (TypeError, shapely.errors.ShapelyError) as error:
        raise unreadable(path, error) from error
    if not ((shapely.get_type_id(polygons) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(polygons)).all():
        raise unreadable(path, ValueError("its geometry holds something else than polygons"))
    if not np.isfinite(shapely.get_coordinates(polygons)).all():
        raise unreadable(path, ValueError("its geometry has coordinates that are not finite"))
    return polygons


def unreadable(path: Path, error: Exception) -> SlideError:
    """Return a SlideError which says that the table of nuclei at `path` is missing or corrupted, and what to do.

    `error`: the reason, for the message.
    """
    if isinstance(error, FileNotFoundError):
        return SlideError(f"{path}: is missing; repeat the segment command")
    return SlideError(
        f"{path}: cannot be read as a table of nuclei ({error}); remove it and repeat the segment command"
    )
