"""File system with which DuckDB reads a data set in a bucket: only the ranges of bytes that a query needs."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from hover_batch.bucket import BucketFolder

_NEVER = datetime(2000, 1, 1, tzinfo=UTC)


class BucketFiles(AbstractFileSystem):  # type: ignore[misc]
    """Read-only file system for `duckdb.DuckDBPyConnection.register_filesystem`, with paths `URL/name`.

    The files of a data set never change, so DuckDB may cache what it has read.
    """

    cachable = False

    def __init__(self, folder: BucketFolder) -> None:
        super().__init__()
        self.protocol = folder.url.protocol
        self._folder = folder
        self._size = lru_cache(None)(folder.size)

    def path(self, name: str) -> str:
        """Return the path `URL/name` of the file `name`, which is relative to the data set."""
        return f"{self._folder.url.text.rstrip('/')}/{name}"

    def name(self, path: str) -> str:
        """Return the name, relative to the data set, of the file at `path`, which has the form `URL/name`."""
        return path.removeprefix(self.path(""))

    def glob(self, path: str, **_: Any) -> list[str]:
        """Return `path` as the only match, because names of the data set's files are not patterns."""
        return [path]

    def unstrip_protocol(self, name: str) -> str:
        """Return `name` unchanged, because paths of this file system already begin with their protocol."""
        return name

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return a description of the file at `path` with `name` (the path), `size` (in bytes) and `type` ("file").

        Sizes are cached. InputError if the file does not exist or access is denied, UploadError if the bucket cannot be
        read.
        """
        return {"name": path, "size": self._size(self.name(path)), "type": "file"}

    def modified(self, path: str) -> datetime:
        """Return the same time for every `path`, because the files never change."""
        return _NEVER

    def open(self, path: str, mode: str = "rb", **_: Any) -> _Ranges:
        """Open the file at `path` for reading, without reading ahead. The caller closes it.

        `mode`: only "rb". InputError if the file does not exist or access is denied, UploadError if the bucket cannot
        be read.
        """
        return _Ranges(self, path, mode, cache_type="none", size=self._size(self.name(path)))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return a range of bytes of the file at `path`.

        `start`: first byte; None for the beginning of the file. `end`: byte after the last; None for the end of the
        file.

        InputError if the file does not exist or access is denied, UploadError if the bucket cannot be read.
        """
        return self._folder.read_range(self.name(path), start, end)


class _Ranges(AbstractBufferedFile):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self.fs.cat_file(self.path, start, end))
