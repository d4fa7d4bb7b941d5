"""Files that are there whole or not at all, also after a kill or a power cut.

A write goes to a temporary file in the same folder, is forced to disk, takes its name in one step, and the folder is
forced to disk too, so that the name survives. The temporary file of a killed write stays behind, hidden, until the
next one under `sweeping`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """For whatever writes a file by its name: yields a hidden name beside `path`; when the block succeeds, the file
    there is forced to disk and takes the place of `path`, when it fails it is removed.

    The name is of this call alone: of two writers of one file neither renames what the other has half written.
    """
    with _temporary(path) as temporary:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    _sync(path.parent)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """`replacing` for whatever writes a folder. Only its name is forced to disk, and between the removal of an old
    folder and the new one's taking its name there is a moment with neither: for what can be made again."""
    temporary = _hidden_name(path)
    try:
        yield temporary
        if path.exists():
            old = _hidden_name(path)
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(path.parent)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write or replace `path`; a reader sees the old content or the new, never a part. Text is stored as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_first(path: Path, data: bytes) -> bool:
    """Write `path` unless it exists. True where this call wrote it, False where another was first."""
    with _temporary(path) as temporary:
        temporary.write_bytes(data)
        _sync(temporary)
        try:
            os.link(temporary, path)
            won = True
        except FileExistsError:
            # Over NFS the link may be made, the answer lost and the request repeated: the count of names tells.
            won = os.stat(temporary).st_nlink > 1
    # The loser also waits for the disk: it goes on as if the file were there for good.
    _sync(path.parent)
    return won


def leftovers(path: Path) -> Iterator[Path]:
    """Temporary files and folders that killed writes of `path` left behind."""
    return path.parent.glob(f".{path.name}.*.partial")


def remove_leftovers(path: Path) -> None:
    """Remove all of them."""
    for leftover in leftovers(path):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def sweeping(path: Path) -> Iterator[None]:
    """For the block that writes `path`: removes first what killed writes of it left behind, unless another such block
    is at work in the same folder, on this machine or wherever the file system tells of locks."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        # Some network file systems lock no folders: there, leftovers stay.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_leftovers(path)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A hidden name beside `path`, which is free; what lies there afterwards is removed."""
    temporary = _hidden_name(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _hidden_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def _sync(path: Path) -> None:
    """Force a file's content, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no fsync of folders; they write names through.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def to_json(value: Any) -> bytes:
    """JSON for people and for comparing bytes: sorted keys, indented, no NaN."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read as a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
