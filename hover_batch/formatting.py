"""Format counts, durations and lists of names for messages."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

LISTED = 10
"""Maximum number of names in a message; a cohort may have thousands."""
_UNITS = (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600), ("days", 86400, math.inf))
"""Unit, its seconds, and the seconds from which a longer unit is used."""


def counted(number: int, noun: str) -> str:
    """Format `number` with `noun`, such as `1 slide` or `1,200 slides`; the plural is the noun with an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Format `seconds` in a suitable unit, such as `3.4 s`, `12 min`, `1.5 h` or `2 days`.

    Numbers below 10 have one decimal, unless it is 0.
    """
    unit, length = next((unit, length) for unit, length, below in _UNITS if seconds < below)
    value = seconds / length
    number = f"{value:.1f}".removesuffix(".0") if value < 9.95 else f"{value:,.0f}"
    return f"{number} {unit}"


def listed(names: Collection[str]) -> str:
    """Join the first LISTED of `names` with commas, followed by an ellipsis if there are more."""
    return ", ".join(islice(names, LISTED)) + (", …" if len(names) > LISTED else "")


def nearest(name: str, known: Collection[str]) -> str:
    """Return the name in `known` that is most similar to `name`; "" if none is similar."""
    return next(iter(get_close_matches(name, known, 1)), "")


def suggestion(name: str, known: Collection[str], prefix: str = "") -> str:
    """Return `; did you mean …?` with the name in `known` that is most similar to `name`; "" if none is similar.

    `prefix`: text in front of the name that is found.
    """
    similar = nearest(name, known)
    return f"; did you mean {prefix}{similar}?" if similar else ""


def encoding_fault(name: str) -> str | None:
    """Return what is wrong with the characters of a file's name, and what to do, as a predicate; None if nothing is.

    The name must be UTF-8, which pyarrow and zarr need, and must fit the encoding in which Python reads file names.
    This is ASCII if LC_ALL=C is enforced.
    """
    try:
        os.fsencode(name)
        name.encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        if encoding.lower() != "utf-8":
            return f"its name does not fit the encoding of this environment, {encoding}; export LC_ALL=C.UTF-8"
        return "its name is not valid UTF-8; rename it"
    return None


def plain_console(**options: Any) -> Console:
    """Return a rich Console that prints text unchanged: without highlighting, `[b]` markup and `:x:` emoji.

    `options`: further arguments of rich's Console.
    """
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, **options)
