"""Show the result of a query on the terminal, or write it to a file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hover_batch.cohort.record import Url
from hover_batch.files import check_output_file, replacing
from hover_batch.formatting import counted

if TYPE_CHECKING:
    import duckdb

ROWS = 40
"""Maximum number of rows on the terminal, except for a description of columns, which is shown whole."""
_READ = 10_000
"""Rows that are read to be shown; DuckDB does not count more."""
_CELL = 60
"""Maximum number of characters in a cell on the terminal; a polygon has hundreds."""
_BATCH = 100_000
"""Rows in memory while a file is written."""
_IN_CSV = ("BOOLEAN", "INT", "INTEGER", "FLOAT", "DOUBLE", "VARCHAR", "DATE", "TIMESTAMP")
"""Ends of the types that are written to a CSV by their values; all others, such as lists, become text."""


def check_output(path: Path | None, dataset: Path | Url, join: Path | None) -> None:
    """Check, before a query runs, that its result can be written to `path`.

    `path`: value of --output, which must end in .csv or .parquet; None without it. `dataset`: folder or URL of the data
    set. `join`: value of --join.

    InputError if it cannot be written there, or is in the data set or the file of --join.
    """
    if path is not None:
        read = [place for place in (dataset, join) if isinstance(place, Path)]
        check_output_file("-o", path, (".csv", ".parquet"), read)


def print_notes(notes: Iterable[str]) -> None:
    """Print each of `notes`, which are about a result, to stderr as the line `note: TEXT`."""
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def deliver(result: duckdb.DuckDBPyRelation, output: Path | None) -> None:
    """Write `result` to the file `output`, or show it on the terminal if `output` is None.

    The suffix of the file, .csv or .parquet, gives the format. An existing file is replaced. After writing, the path is
    printed on stdout, and the number of rows on stderr.

    InputError if the query fails, KeyboardInterrupt if a signal interrupts it, OSError if the file cannot be written.
    """
    from hover_batch.dataset.opened import query_errors

    with query_errors():
        if output is None:
            _show(result)
        else:
            rows = _write(result, output)
            typer.echo(output)
            typer.echo(counted(rows, "row"), err=True)


def _show(result: duckdb.DuckDBPyRelation) -> None:
    """Print the first and last rows, as many columns as fit, and how many rows there are and are hidden."""
    from hover_batch.dataset.quoting import identifier

    columns = (_rounded(identifier(name), str(kind)) for name, kind in zip(result.columns, result.types, strict=True))
    shown = result.limit(_READ).project(", ".join(columns)).materialize()
    width = shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else 1_000_000
    most = _READ if result.columns[:2] == ["column_name", "column_type"] else ROWS
    shown.show(max_rows=most, max_width=width, max_col_width=_CELL)
    if (rows := len(shown)) > most:
        hidden = f"{rows - most:,}" if rows < _READ else "most"
        print_notes([f"{hidden} rows are hidden; -o FILE.csv writes all of them"])


def _rounded(column: str, kind: str) -> str:
    """Return the SQL that selects a column; DOUBLE is rounded to eight digits, but no digit before the point is lost.

    `column`: quoted name. `kind`: its type.
    """
    if kind != "DOUBLE":
        return column
    digits = f"greatest(0, 7 - CAST(floor(log10(abs({column}))) AS INT))"
    return (
        f"CASE WHEN isfinite({column}) AND {column} <> 0 THEN round({column}, {digits}) ELSE {column} END AS {column}"
    )


def _write(result: duckdb.DuckDBPyRelation, path: Path) -> int:
    """Write a CSV or Parquet file batch by batch, and return the number of rows."""
    import pyarrow.csv
    import pyarrow.parquet

    from hover_batch.dataset.opened import cast

    is_csv = path.suffix.lower() == ".csv"
    if is_csv:
        result = cast(result, lambda kind: None if kind.endswith(_IN_CSV) else "VARCHAR")
    rows = 0
    with result.to_arrow_reader(_BATCH) as batches, replacing(path) as temporary:
        kind: Any = pyarrow.csv.CSVWriter if is_csv else pyarrow.parquet.ParquetWriter
        with kind(temporary, batches.schema) as file:
            for batch in batches:
                file.write_batch(batch)
                rows += len(batch)
    return rows
