"""Hints for a path that does not exist: Windows separators, shell variables, URIs, and similar names."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from urllib.parse import unquote

_SHELL = re.compile(r"~|\$")
"""What a shell replaces, at the beginning of a path."""
_WINDOWS_ROOT = re.compile(r"/?[A-Za-z]:[\\/]|\\\\")
"""With a slash before it in file:///C:/…"""


def near_name(path: Path, base: Path) -> str:
    """Return a hint to append to the message that `path` does not exist; "" if there is none.

    The hint names a file whose name differs only in upper and lower case or Unicode form, or the missing target of a
    link. For a Windows path, a URI, or a path that begins with ~ or a variable, it says how to write it.

    `path`: absolute path. `base`: absolute folder to which the user's paths are relative.
    """
    # Only the part that the user wrote: the folders above may contain backslashes.
    written = str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
    if _WINDOWS_ROOT.match(written):
        return "; give a Windows path as this machine sees it, with / between folders"
    link = base / written
    if link.is_symlink():
        return f"; it is a link to {link.readlink()}, which does not exist: fetch that file, or copy it here"
    if _SHELL.match(written):
        return "; ~ and variables are not replaced: write the whole path"
    if written.startswith("file:") or (base / unquote(written)).exists():
        return f"; write a path, not a URI: {unquote(written.removeprefix('file:'))}"
    slashed = base / written.replace("\\", "/")
    similar = _existing(slashed)
    if "\\" in written:
        return "; write / between folders, not \\" + (f": {similar} exists" if similar else "")
    if similar is None:
        return ""
    # `_existing` ignores both case and Unicode form: find out which of them differs.
    if _normal(str(similar)) != _normal(str(slashed)):
        return f"; {similar} exists, which differs in upper and lower case"
    form = next((form for form in ("NFC", "NFD") if unicodedata.is_normalized(form, similar.name)), "mixed")
    return (
        f"; {similar} exists, the same letters in another Unicode form ({form} on disk): copy the name from the folder "
        "into the CSV"
    )


def _existing(path: Path) -> Path | None:
    """Return the path on disk that equals `path` except for case and Unicode form; None if there is none."""
    existing = Path(path.anchor)
    for part in path.parts[1:]:
        step = existing / part
        try:
            if not step.exists():
                like = [entry for entry in existing.iterdir() if _normal(entry.name).lower() == _normal(part).lower()]
                if not like:
                    return None
                step = min(like)
        except OSError:
            return None
        existing = step
    return existing


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)
