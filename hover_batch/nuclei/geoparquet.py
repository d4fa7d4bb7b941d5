"""Write GeoParquet 1.1 files of nuclei, one row group at a time.

The geometry is WKB, and the column `bbox` is declared as its covering, so that readers of a field skip row groups by
its statistics. Format: https://geoparquet.org/releases/v1.1.0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

BBOX = pa.struct([pa.field(name, pa.float64(), nullable=False) for name in ("xmin", "ymin", "xmax", "ymax")])
"""Type of the column `bbox`, in level-0 pixels."""

DICTIONARY = ["slide_id", "type_id", "type"]
"""Columns with few distinct values; dictionaries of other columns would be built and then discarded."""

WriteGroup = Callable[[pa.Table], None]
"""Function that writes a table, whose columns have one chunk each, as one row group."""


@contextmanager
def geoparquet_writer(path: Path, schema: pa.Schema, metadata: Mapping[str, Any]) -> Iterator[WriteGroup]:
    """Return a context manager that creates a GeoParquet file and yields the function that writes its row groups.

    The file is complete when the block ends. If the block raises an error, the file lacks its metadata. A group must
    not be empty, and each of its columns must have one chunk.

    `path`: file to write. `schema`: columns, among them `bbox` and `geometry`. `metadata`: JSON values by name, for the
    entry `hover_batch` of the file's metadata.

    OSError if the file cannot be written.
    """
    extent = np.array([np.inf, np.inf, -np.inf, -np.inf])
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=DICTIONARY,
        # Statistics of WKB bytes are meaningless; readers skip row groups by those of bbox.
        write_statistics=[c for c in _leaves(schema) if c != "geometry"],
    ) as writer:

        def write(group: pa.Table) -> None:
            nonlocal extent
            extent = _union(extent, group["bbox"].chunk(0))
            writer.write_table(group, row_group_size=len(group))

        yield write
        geo = _geo(extent.tolist() if np.isfinite(extent).all() else None)
        writer.add_key_value_metadata({"geo": _json(geo), "hover_batch": _json(metadata)})


def _union(extent: NDArray[np.float64], bbox: pa.StructArray) -> NDArray[np.float64]:
    """Return `extent` [xmin, ymin, xmax, ymax] expanded to contain all of `bbox`."""
    xmin, ymin, xmax, ymax = (bbox.field(i).to_numpy() for i in range(4))
    low = np.minimum(extent[:2], [xmin.min(), ymin.min()])
    high = np.maximum(extent[2:], [xmax.max(), ymax.max()])
    return np.concatenate([low, high])


def _geo(box: list[float] | None) -> dict[str, Any]:
    """Return GeoParquet's file metadata; `crs: null` because coordinates are pixels, not positions on Earth."""
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": ["Polygon"],
        "crs": None,
        "covering": {"bbox": {name: ["bbox", name] for name in ("xmin", "ymin", "xmax", "ymax")}},
    }
    if box is not None:
        column["bbox"] = box
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}


def _leaves(schema: pa.Schema) -> list[str]:
    """Return column paths as in Parquet, with the members of structs."""
    return [
        f"{field.name}.{member.name}" if member is not field else field.name
        for field in schema
        for member in (field.type if pa.types.is_struct(field.type) else [field])
    ]


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))
