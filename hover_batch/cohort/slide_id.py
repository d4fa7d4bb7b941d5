"""Slide ids that are valid folder names on every file system, and suggestions for others."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container

_FITS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MAX_LENGTH = 128
"""Far below the 255 bytes of common file systems, so that whole paths stay short enough, too."""
_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))]
)
"""Names that Windows and its network shares reserve for devices, with any suffix."""


def fold(slide_id: str) -> str:
    """Return `slide_id` in lower case.

    Ids that name the same file on a case-insensitive file system become equal.
    """
    return slide_id.lower()


def fault_in(slide_id: str) -> str | None:
    """Return why `slide_id` cannot name a folder, as the predicate of a sentence about the id; None if it can."""
    if not _FITS.fullmatch(slide_id):
        return "may contain only A-Z a-z 0-9 . _ - and must start with a letter or digit"
    if len(slide_id) > _MAX_LENGTH:
        return f"is longer than {_MAX_LENGTH} characters"
    if slide_id.endswith("."):
        return "ends with a dot, which some file systems drop"
    if fold(slide_id).split(".")[0] in _DEVICES:
        return "is a device name on some file systems"
    return None


def suggest(text: str, taken: Container[str]) -> str:
    """Return a valid slide_id, similar to `text`, that is not in use.

    `text`: id or name that is not valid or already in use. `taken`: ids in use, in lower case (see `fold`).
    """
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_text)
    # Room is left for the counter below.
    base = base.strip("._-")[: _MAX_LENGTH - 12].rstrip("._-") or "slide"
    if fault_in(base):
        base = f"slide-{base}"
    candidate, count = base, 1
    while fold(candidate) in taken:
        count += 1
        candidate = f"{base}-{count}"
    return candidate
