"""Load a table about patients (CSV or Parquet), to be joined with the slides of a data set."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from hover_batch.cohort.csv_rows import MISSING, is_spreadsheet
from hover_batch.dataset.quoting import identifier, text, text_list
from hover_batch.errors import InputError
from hover_batch.formatting import counted, listed, nearest, suggestion

_ON = "name another column with --on (in Python, the argument `on`)"

_DECIMAL_COMMA = "^[-+]?[0-9]+,[0-9]+$"
"""Numbers as Excel writes them in countries with a decimal comma."""
_THOUSANDS = "^[-+]?[1-9][0-9]{0,2}([.][0-9]{3})+(,[0-9]+)?$"
"""Numbers whose points separate thousands, in a table with decimal commas."""
_OTHER_NUMBER = "^[-+]?([0-9]{4,}[.][0-9]+|0[.][0-9]+|[0-9]+[.]([0-9]{1,2}|[0-9]{4,})|[1-9][0-9]{0,2},[0-9]{3})$"
"""Numbers with a decimal point, and those whose comma may separate thousands: beside them, commas are not decimal."""

_NUMBER = "^[-+]?[.,]?[0-9][0-9.,]*([eE][-+]?[0-9]+)?$"
"""Cells that a person would take for a number."""

_IS_TEXT = "^(0[0-9]+|[0-9]{16,}|[-+]?0[xXbB].*)$"
"""Cells that stay text: leading zeros and digits beyond the 15th would be lost, and 0x10 would become 16."""


def load_clinical(connection: duckdb.DuckDBPyConnection, path: Path, on: str, slides: pa.Table) -> list[str]:
    """Create the table `clinical` from the file `path`. Return notes for the user.

    They name ids that only one of the tables has, and columns of a CSV that became text although at least half of their
    cells look like numbers.

    The values of the column `on` become text without spaces around them. In a CSV, a column with values such as 007 or
    0x10, or of 16 or more digits, becomes text, too. Empty cells and those in MISSING are missing values. Cells may be
    quoted by " only, and # begins no comment. If semicolons or tabs separate the cells, numbers may have decimal
    commas, and points that separate thousands. In a Parquet file, NaN is a missing value. Rows without an id are left
    out.

    `connection`: DuckDB connection in which the table is created. `path`: CSV or Parquet file. `on`: column with the
    ids, in the file and in `slides`; in the file, upper and lower case do not matter. `slides`: table of the slides.

    InputError if the file cannot be read or is a spreadsheet, no column or several columns are named `on`, an id is in
    two rows, or no id is in `slides`.
    """
    if on not in slides.column_names:
        raise InputError(
            f"{on}: is not a column of the slides, so a table cannot be joined by it; {_ON}, one of "
            f"{', '.join(slides.column_names)}{suggestion(on, slides.column_names)}"
        )
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "no such file"
        raise InputError(f"{path}: {fault}; give another one with --join (in Python, the argument `clinical`)")
    try:
        source, column, as_text = _source(connection, path, on)
        given = connection.sql(f"FROM {source}")
        kinds = dict(zip(given.columns, map(str, given.types), strict=True))
        # Some programs store text in Parquet as bytes, which CAST would escape.
        decoded = f"decode({identifier(column)})" if kinds[column] == "BLOB" else identifier(column)
        values = f"trim(CAST({decoded} AS VARCHAR))"
        replaced = [f"{values} AS {identifier(column)}"]
        for name, kind in kinds.items():
            if kind in ("FLOAT", "DOUBLE") and name != column:
                value = identifier(name)
                # By its text: DuckDB takes isnan for false where the file's statistics, which leave NaN out, say so.
                replaced.append(f"CAST(nullif(CAST({value} AS VARCHAR), 'nan') AS {kind}) AS {value}")
        rows = f"SELECT * REPLACE ({', '.join(replaced)}) FROM {source} WHERE {values} <> ''"
        connection.execute(f"CREATE TABLE clinical AS {rows}").fetchall()
        ids = [row[0] for row in connection.sql(f"SELECT {identifier(column)} FROM clinical").fetchall()]
        doubtful = [name for name, kind in kinds.items() if kind == "VARCHAR" and name not in as_text]
        doubts = _doubts_of_text(connection, path, doubtful)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make the file readable") from error
    except (duckdb.Error, pa.ArrowException) as error:
        reason = " ".join(str(error).split("\n\n")[0].splitlines()[:2])
        raise InputError(
            f"{path}: cannot be read as CSV (UTF-8, a header, equally many cells in all rows) or Parquet ({reason})"
        ) from error
    known = dict.fromkeys(value for value in slides[on].to_pylist() if value is not None)
    return doubts + _notes(path, on, ids, [str(value) for value in known])


def _source(connection: duckdb.DuckDBPyConnection, path: Path, on: str) -> tuple[str, str, set[str]]:
    """Return the table function that reads the file, its name of the column `on`, and the columns that must be text.

    The name may differ in upper and lower case, which SQL ignores. InputError if there is no such column or several, or
    the file is a spreadsheet.
    """

    def name_in(columns: Sequence[str]) -> str:
        for name in columns:
            if name.casefold() == on.casefold():
                return name
        raise InputError(
            f"{path}: has no column {on}, but {', '.join(columns)}; rename {nearest(on, columns) or 'a column'} to "
            f"{on}, or {_ON}"
        )

    def check_once(columns: Sequence[str]) -> None:
        """Raise InputError if several columns have this name; DuckDB would rename all but the first."""
        names = [name for name in columns if name.casefold() == on.casefold()]
        if len(names) > 1:
            raise InputError(f"{path}: several columns are named {on}, by any case: {listed(names)}; keep one")

    if path.suffix.lower() in (".parquet", ".pq"):
        check_once(pq.read_schema(path).names)
        source = f"read_parquet({text_list([path])})"
        names = connection.sql(f"FROM {source}").columns
        return source, name_in(names), set(names)
    with path.open("rb") as binary:
        if is_spreadsheet(binary.read(8)):
            raise InputError(f"{path}: is a spreadsheet or an archive, not a CSV; save the table as CSV UTF-8")
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
        if for_excel := header.lower().startswith(("sep=", '"sep=')):
            header = file.readline()
    options = {
        "header": "true",
        "skip": str(int(for_excel)),
        # DuckDB would find a delimiter for which rows of different lengths are one column.
        "delim": text(delimiter := max(",;\t", key=header.count)),
        # DuckDB would guess these from the rows, in which apostrophes and # are common.
        "quote": text('"'),
        "escape": text('"'),
        "comment": text(""),
        "nullstr": text_list(["", *(cell for name in MISSING for cell in (name, f" {name}", f"{name} "))]),
        "sample_size": "-1",
        # Cells such as yes, no and 01/02/2026 stay text: their meaning as a truth value or a date would be a guess.
        "auto_type_candidates": text_list(("BIGINT", "DOUBLE", "DATE", "VARCHAR")),
        "dateformat": text("%Y-%m-%d"),
    }
    check_once(next(csv.reader([header], delimiter=delimiter), []))
    cells = _read_csv(path, options | {"all_varchar": "true"})
    columns = connection.sql(f"FROM {cells}").columns
    column = name_in(columns)

    def having(pattern: str) -> list[str]:
        """Return the columns with a cell that matches the pattern."""
        tests = ", ".join(f"bool_or(regexp_matches(trim({identifier(name)}), {text(pattern)}))" for name in columns)
        [found] = connection.sql(f"SELECT {tests} FROM {cells}").fetchall()
        return [name for name, matches in zip(columns, found, strict=True) if matches]

    as_text = {*having(_IS_TEXT), column}
    if options["delim"] != text(",") and having(_DECIMAL_COMMA) and not having(_OTHER_NUMBER):
        options["decimal_separator"] = text(",")
        if having(_THOUSANDS):
            options["thousands"] = text(".")
    types = ", ".join(f"{text(name)}: 'VARCHAR'" for name in columns if name in as_text)
    return _read_csv(path, options | {"types": f"{{{types}}}"}), column, as_text


def _doubts_of_text(connection: duckdb.DuckDBPyConnection, path: Path, columns: Sequence[str]) -> list[str]:
    """Return a note for each text column of `clinical` in which at least half of the cells look like numbers."""
    notes = []
    for name in columns:
        cell = f"trim({identifier(name)})"
        like = f"regexp_matches({cell}, {text(_NUMBER)})"
        found = f"avg(CAST({like} AS INT)), min({cell}) FILTER ({like}), min({cell}) FILTER (NOT {like})"
        [(share, number, other)] = connection.sql(f"SELECT {found} FROM clinical").fetchall()
        if share is not None and share >= 0.5:
            beside = f", and {other!r}" if other is not None else ""
            notes.append(
                f"{path}: the column {name} is read as text, with cells such as {number!r}{beside}; if these are "
                "numbers, write all of them in the same way"
            )
    return notes


def _read_csv(path: Path, options: Mapping[str, str]) -> str:
    return f"read_csv({text_list([path])}, {', '.join(f'{name} = {value}' for name, value in options.items())})"


def _notes(path: Path, on: str, ids: Sequence[str], known: Sequence[str]) -> list[str]:
    """Compare the ids in the table with those of the slides. InputError as in `load_clinical`."""
    if twice := [value for value, number in Counter(ids).items() if number > 1]:
        raise InputError(
            f"{path}: several rows have the same {on}: {listed(twice)}; keep one row of each, since the join "
            "would count nuclei more than once"
        )
    joined = set(ids) & set(known)
    if not joined:
        raise InputError(
            f"{path}: no {on} in it is in the data set; it has {listed(ids[:3]) or 'none'}, and the data set "
            f"{listed(known[:3]) or 'none'}: write them in the same way, or {_ON}"
        )
    notes = []
    if missing := [value for value in known if value not in joined]:
        notes.append(
            f"{path}: no row for {len(missing):,} of the data set's {counted(len(known), on)}: {listed(missing)}"
        )
    if missing := [value for value in ids if value not in joined]:
        notes.append(f"{path}: not in the data set: {len(missing):,} of {counted(len(ids), on)}: {listed(missing)}")
    return notes
