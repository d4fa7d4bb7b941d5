"""Write names and values into SQL, so that none of them can end a string or begin a statement."""

from __future__ import annotations

from collections.abc import Iterable


def identifier(name: str) -> str:
    """Return the name of a column, table or view as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def text(value: object) -> str:
    """Return `str(value)` as an SQL string literal.

    Single quotes in it are doubled, the only escape that DuckDB's string literals have.
    """
    return "'" + str(value).replace("'", "''") + "'"


def text_list(values: Iterable[object]) -> str:
    """Return `values` as a DuckDB list of string literals, such as ['a', 'b']."""
    return f"[{', '.join(map(text, values))}]"
