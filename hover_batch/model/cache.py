"""Cache of model packages, found by name, and of the published files that they were made from.

    HOVER_BATCH_CACHE/                          by default ~/.cache/hover-batch (XDG_CACHE_HOME is respected)
      models/NAME.safetensors                   package for `--model NAME`
      downloads/NAME.pth                        file of a published name
      downloads/<hash of the URL>/FILE          file of a URL
      downloads/….sha256                        SHA-256 of the file at its first use, in the format of sha256sum
      openvino/KEY/                             converted network of a package (see `hover_batch.model.openvino`)

A file's hash is recorded at its first use and compared at every later one.
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
INSTALLED = ("starter", "starter-open")
"""Names of the packages that are installed with hover-batch; no package in the cache has such a name."""


def cache_folder() -> Path:
    """Return the path of the cache. The folder may not exist.

    It is the value of the environment variable HOVER_BATCH_CACHE. If that is not set, it is the folder `hover-batch` in
    XDG_CACHE_HOME, or in ~/.cache.
    """
    if configured := os.environ.get(VARIABLE):
        return Path(os.path.expanduser(configured)).absolute()
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "hover-batch"


def is_package_name(text: str) -> bool:
    """True if `text` can be the name of a package in the cache.

    A name consists of ASCII letters, digits and the characters . _ + -, and begins with a letter or digit. False for
    the names in `INSTALLED`. True for a file name such as model.safetensors, so `find_package` gives existing files
    precedence.
    """
    return text not in INSTALLED and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", text) is not None


def cached_package(name: str) -> Path:
    """Return the path of the package `name` in the cache, models/NAME.safetensors. The file may not exist."""
    return cache_folder() / "models" / f"{name}.safetensors"


def cached_packages() -> list[Path]:
    """Return the paths of all packages in the cache, sorted by name; empty if there are none."""
    return sorted((cache_folder() / "models").glob("*.safetensors"))


def cached_downloads() -> Iterator[Path]:
    """Yield the paths of all downloads whose hash was recorded, sorted.

    These are the files that were used at least once. A file may have been removed since; only its hash is certain to
    exist.
    """
    for record in sorted((cache_folder() / "downloads").rglob("*.sha256")):
        yield record.with_suffix("")


def download_path(source: str) -> Path:
    """Return the path of a download in the cache. The file may not exist.

    It is downloads/NAME.pth for a published name, and downloads/HASH/FILE for a URL. HASH is the first 16 hex digits of
    the URL's SHA-256. FILE is the last part of the URL's path without leading dots, or `file` if that is empty.
    Characters of FILE other than ASCII letters, digits and . _ + - are replaced by _.

    `source`: URL or published name.
    """
    downloads = cache_folder() / "downloads"
    if "://" not in source:
        return downloads / f"{source}.pth"
    _, _, url_name = unquote(urlsplit(source).path).rpartition("/")
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", url_name).lstrip(".") or "file"
    return downloads / hashlib.sha256(source.encode()).hexdigest()[:16] / name


def check_download(path: Path, expected: str | None = None) -> None:
    """Check the SHA-256 of a cached file, and record it in PATH.sha256 if it is not recorded there.

    `path`: path of the file. `expected`: expected hash in hex. If it matches, it replaces the recorded hash. If None,
    the recorded hash is expected; if none is recorded, any file is accepted.

    PackageError if the hash differs, the file cannot be read, or the hash cannot be recorded. OSError if the disk is
    full.
    """
    record = path.with_name(f"{path.name}.sha256")
    try:
        found = sha256_file(path)
        words = record.read_text("utf-8", "replace").split() if record.is_file() else []
    except OSError as error:
        raise PackageError(
            f"{path}: cannot be read ({error.strerror}); download it again, or remove {record}"
        ) from error
    recorded = words[0] if words else None
    if expected is not None and expected.lower() != found:
        raise PackageError(f"{path}: its sha256 is {found}, not {expected}; remove the file and download it again")
    if expected is None and recorded not in (None, found):
        raise PackageError(
            f"{path}: its sha256 is {found}, but was {recorded} at its first use; remove the file and download it "
            f"again. If its authors have replaced it and you trust the new one: --sha256 {found}"
        )
    if recorded != found:
        try:
            write_atomically(record, f"{found}  {path.name}\n")
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise PackageError(
                f"{record}: cannot be written ({error.strerror}); set {VARIABLE} to a folder that can be written"
            ) from error
