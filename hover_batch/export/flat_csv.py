"""Write a CSV for spreadsheets and scripts.

It has all columns of the table except the polygons, and the bounding box as four columns.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from hover_batch.export.read import NucleiTable
from hover_batch.files import replacing


def write_csv(nuclei: NucleiTable, path: Path) -> None:
    """Write the table `nuclei` to `path` (.csv), batch by batch, with enough digits to restore each number exactly.

    The CSV has all columns of the table except `geometry`. Instead of `bbox`, it has the columns xmin, ymin, xmax and
    ymax. An existing file is replaced only when all is written.

    OSError if the file cannot be written, SlideError if the table is corrupted.
    """
    schema = pa.schema([field for field in nuclei.schema if field.name != "geometry"])
    with replacing(path) as temporary, pa.csv.CSVWriter(temporary, _flat(schema.empty_table()).schema) as writer:
        for batch in nuclei.batches(schema.names):
            writer.write_table(_flat(pa.Table.from_batches([batch])))


def _flat(table: pa.Table) -> pa.Table:
    """Return the table with the fields of `bbox` as columns."""
    flat = table.flatten()
    return flat.rename_columns([name.removeprefix("bbox.") for name in flat.column_names])
