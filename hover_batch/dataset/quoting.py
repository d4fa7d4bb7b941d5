"""Write names and values into SQL, so that none of them can end a string or begin a statement."""

from __future__ import annotations

from collections.abc import Iterable


def identifier(name: str) -> str:
    """Return `name`, of a column or view, as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def text(value: object) -> str:
    """Return `str(value)` as an SQL string literal; in DuckDB, a doubled quote is the only escape."""
    return "'" + str(value).replace("'", "''") + "'"


def text_list(values: Iterable[object]) -> str:
    """Return `values` as an SQL list of string literals, each from `text`."""
    return f"[{', '.join(map(text, values))}]"
