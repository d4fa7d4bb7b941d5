"""The cache: packages that are found by their names, and the published files that they were made of.

    HOVER_BATCH_CACHE/                          by default ~/.cache/hover-batch, or XDG's
      models/NAME.safetensors                   what `--model NAME` finds
      downloads/NAME.pth                        of a published name
      downloads/<hash of the URL>/FILE          of a URL
      downloads/….sha256                        what was in the file when it was first used, as sha256sum writes it

A file's hash is recorded at its first use, unless it was demanded, and compared at every use ever after.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hover_batch.errors import DISK_FULL, PackageError
from hover_batch.files import sha256_file, write_atomically

VARIABLE = "HOVER_BATCH_CACHE"


def cache_folder() -> Path:
    """What HOVER_BATCH_CACHE says, else the user's folder for such things."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hover-batch"


def is_name(text: str) -> bool:
    """Whether it can name a package of the cache, other than `starter`: no path and no URL."""
    return text != "starter" and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", text) is not None


def cached_package(name: str) -> Path:
    """Where the package of this name lies, or would."""
    return cache_folder() / "models" / f"{name}.safetensors"


def cached_packages() -> list[Path]:
    """All of them, by name."""
    return sorted((cache_folder() / "models").glob("*.safetensors"))


def cached_downloads() -> Iterator[Path]:
    """The files that were fetched or brought there, and used at least once."""
    for record in sorted((cache_folder() / "downloads").rglob("*.sha256")):
        yield record.with_suffix("")


def download_path(source: str) -> Path:
    """Where the file of a URL, or of a published name, lies in the cache, or would."""
    downloads = cache_folder() / "downloads"
    if "://" not in source:
        return downloads / f"{source}.pth"
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", unquote(urlsplit(source).path).rpartition("/")[2]).lstrip(".") or "file"
    return downloads / hashlib.sha256(source.encode()).hexdigest()[:16] / name


def check_download(path: Path, demanded: str | None = None) -> None:
    """Compare the file's hash with what was demanded, or was recorded at its first use; record it where it is new.

    Raises PackageError where it differs, cannot be read, or its hash cannot be recorded.
    """
    record = path.with_name(f"{path.name}.sha256")
    try:
        found = sha256_file(path)
        held = record.read_text("utf-8", "replace").split() if record.is_file() else []
    except OSError as error:
        raise PackageError(f"{path}: cannot be read ({error.strerror}); fetch it again, or remove {record}") from error
    recorded = held[0] if held else None
    if demanded is not None and demanded.lower() != found:
        raise PackageError(f"{path}: its sha256 is {found}, not {demanded}; remove the file and fetch it again")
    if demanded is None and recorded not in (None, found):
        raise PackageError(
            f"{path}: its sha256 is {found}, and was {recorded} when it was first used; remove the file and fetch it "
            f"again. Where its authors have replaced it, and you trust the new one: --sha256 {found}"
        )
    if recorded != found:
        try:
            write_atomically(record, f"{found}  {path.name}\n")
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise PackageError(
                f"{record}: cannot be written ({error.strerror}); name a cache that can be by {VARIABLE}"
            ) from error
