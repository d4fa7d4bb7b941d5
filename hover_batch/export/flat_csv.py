"""A CSV for spreadsheets and scripts: every column of the table but the polygons, the bounding box as four."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from hover_batch.export.read import NucleiTable
from hover_batch.files import replacing


def write_csv(nuclei: NucleiTable, path: Path) -> None:
    """Write `nuclei` to `path` (.csv), as a stream. Numbers have the digits that bring back the same ones."""
    schema = pa.schema([field for field in nuclei.schema if field.name != "geometry"])
    with replacing(path) as temporary, pa.csv.CSVWriter(temporary, _flat(schema.empty_table()).schema) as writer:
        for batch in nuclei.batches(schema.names):
            writer.write_table(_flat(pa.Table.from_batches([batch])))


def _flat(table: pa.Table) -> pa.Table:
    flat = table.flatten()
    return flat.rename_columns([name.removeprefix("bbox.") for name in flat.column_names])
