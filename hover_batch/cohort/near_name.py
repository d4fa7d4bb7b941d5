"""Remedies for a path that does not exist: Windows separators, and names that differ in Unicode form or case."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

_WINDOWS_ROOT = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def near_name(path: Path, base: Path) -> str:
    """Return what to add to the words "no such file"; "" where nothing on disk is like `path`.

    `base`: the absolute folder to which the user's paths are relative.
    """
    # Only the part that the user wrote: the folders above may contain backslashes.
    written = str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
    if _WINDOWS_ROOT.match(written):
        return "; give a Windows path as this machine sees it, with / between folders"
    slashed = base / written.replace("\\", "/")
    there = _existing(slashed)
    if "\\" in written:
        return "; write / between folders, not \\" + (f": {there} is there" if there else "")
    if there is None:
        return ""
    if _normal(str(there)) != _normal(str(slashed)):
        return f"; {there} is there, which differs in upper and lower case"
    form = next((form for form in ("NFC", "NFD") if unicodedata.is_normalized(form, there.name)), "mixed")
    return (
        f"; {there} is there, the same letters in another Unicode form ({form} on disk): copy the name from the folder "
        "into the CSV"
    )


def _existing(path: Path) -> Path | None:
    """Return the path on disk that is `path` but for case and Unicode form."""
    found = Path(path.anchor)
    for part in path.parts[1:]:
        step = found / part
        try:
            if not step.exists():
                like = [entry for entry in found.iterdir() if _normal(entry.name).lower() == _normal(part).lower()]
                if not like:
                    return None
                step = min(like)
        except OSError:
            return None
        found = step
    return found


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)
