"""Load a table about patients (CSV or Parquet), to be joined with the slides of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa

from hover_batch.dataset.quoting import identifier, text, text_list
from hover_batch.errors import InputError
from hover_batch.formatting import counted, listed

_MISSING = ("", "NA")
"""Cells of a CSV that are missing values."""

_IS_TEXT = "^(0[0-9]+|[0-9]{16,})$"
"""Cells that look like numbers and are not, since a number would lose their zeros or last digits."""


def load_clinical(connection: duckdb.DuckDBPyConnection, path: Path, on: str, slides: pa.Table) -> list[str]:
    """Create the table `clinical` from the file `path`, and return notes about ids that only one of the tables has.

    Its column `on` is text without spaces around it; a column with values such as 007 is text, too. Rows without an id
    are left out. `slides`: table with the column `on`.

    InputError if the file cannot be read, a column `on` is missing, an id is in two rows, or no id is in `slides`.
    """
    flag = f"--join {path}"
    if on not in slides.column_names:
        raise InputError(f"--on {on}: is not a column of the slides; they have {', '.join(slides.column_names)}")
    if not path.is_file():
        raise InputError(f"{flag}: no such file")
    try:
        source = _source(connection, path, on)
        columns = connection.sql(f"FROM {source}").columns
        if on not in columns:
            raise InputError(f"{flag}: has no column {on}, but {', '.join(columns)}; give the right one with --on")
        connection.execute(
            f"CREATE TABLE clinical AS SELECT * REPLACE (trim(CAST({identifier(on)} AS VARCHAR)) AS {identifier(on)}) "
            f"FROM {source} WHERE trim(CAST({identifier(on)} AS VARCHAR)) <> ''"
        ).fetchall()
        ids = [row[0] for row in connection.sql(f"SELECT {identifier(on)} FROM clinical").fetchall()]
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{flag}: cannot be read as CSV (UTF-8, with a header) or Parquet ({reason}); save it as one of them"
        ) from error
    known = dict.fromkeys(value for value in slides[on].to_pylist() if value is not None)
    return _notes(path, on, ids, [str(value) for value in known])


def _source(connection: duckdb.DuckDBPyConnection, path: Path, on: str) -> str:
    """Return the table function that reads the file, with the types of its columns."""
    if path.suffix.lower() in (".parquet", ".pq"):
        return f"read_parquet({text_list([path])})"
    # Cells such as yes, no and 01/02/2026 stay text: their meaning as a truth value or a date would be a guess.
    kinds = f"{text_list(('BIGINT', 'DOUBLE', 'DATE', 'VARCHAR'))}, dateformat = '%Y-%m-%d'"
    options = f"header = true, nullstr = {text_list(_MISSING)}, sample_size = -1, auto_type_candidates = {kinds}"
    cells = f"read_csv({text_list([path])}, all_varchar = true, {options})"
    columns = connection.sql(f"FROM {cells}").columns
    tests = ", ".join(f"bool_or(regexp_matches(trim({identifier(name)}), {text(_IS_TEXT)}))" for name in columns)
    [found] = connection.sql(f"SELECT {tests} FROM {cells}").fetchall()
    as_text = [name for name, is_text in zip(columns, found, strict=True) if is_text or name == on]
    types = ", ".join(f"{text(name)}: 'VARCHAR'" for name in as_text)
    return f"read_csv({text_list([path])}, {options}, types = {{{types}}})"


def _notes(path: Path, on: str, ids: Sequence[str], known: Sequence[str]) -> list[str]:
    """Compare the ids in the table with those of the slides. InputError as in `load_clinical`."""
    if twice := [value for value, number in Counter(ids).items() if number > 1]:
        raise InputError(
            f"--join {path}: several rows have the same {on}: {listed(twice)}; keep one row of each, since the join "
            "would count nuclei more than once"
        )
    joined = set(ids) & set(known)
    if not joined:
        raise InputError(
            f"--join {path}: no {on} in it is in the data set; it has {listed(ids[:3]) or 'none'}, and the data set "
            f"{listed(known[:3]) or 'none'}: write them in the same way, or name another column with --on"
        )
    notes = []
    if missing := [value for value in known if value not in joined]:
        notes.append(
            f"{path}: no row for {len(missing):,} of the data set's {counted(len(known), on)}: {listed(missing)}"
        )
    if missing := [value for value in ids if value not in joined]:
        notes.append(f"{path}: not in the data set: {len(missing):,} of {counted(len(ids), on)}: {listed(missing)}")
    return notes
