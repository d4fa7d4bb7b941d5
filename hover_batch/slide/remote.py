"""Find a slide's files in storage that fsspec supports (S3, GCS, Azure, HTTP …), their sizes and their fingerprint.

The fingerprint equals that of the same bytes on disk. Credentials come from the environment, through the storage's own
library. Messages redact credentials in URLs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from hover_batch.bucket import require_package, storage_errors
from hover_batch.cohort.record import SLIDE_SUFFIXES, Url
from hover_batch.errors import InputError, SlideError
from hover_batch.formatting import listed
from hover_batch.geometry import Mpp
from hover_batch.slide.fingerprint import ReadParts, fingerprint_of


@dataclass(frozen=True)
class RemoteInfo:
    """Properties of a slide in cloud storage, before it is copied."""

    size: int
    """Size of all its files in bytes."""
    fingerprint: str
    """Hash of the content, equal to that of a copy on disk."""
    warnings: tuple[str, ...] = ()
    """Sentences for the user."""


@dataclass(frozen=True)
class RemoteFile:
    """File of a slide in cloud storage."""

    key: str
    """Name of the file in the storage."""
    name: PurePosixPath
    """Path of the file in a copy, relative to the folder of the slide."""
    size: int
    """Size in bytes."""


def remote_info(url: Url, mpp: Mpp | None) -> RemoteInfo:
    """Return the size and the fingerprint of a slide in cloud storage.

    This takes a few requests and reads up to 3 MiB of each file.

    `url`: URL of the slide's file or folder. `mpp`: pixel size in µm that the cohort gives; None if it gives none.

    InputError if fsspec does not support the storage, a package for it is missing, the slide does not exist or is a
    folder of slides, or access is denied. SlideError if the storage cannot be reached, does not report sizes, or cannot
    serve parts of files.
    """
    require_package(url)
    with storage_errors(url):
        storage, files = files_of(url)
        sizes_and_readers = ((file.size, _parts(url, storage, file)) for file in files)
        return RemoteInfo(sum(file.size for file in files), fingerprint_of(sizes_and_readers, mpp))


def files_of(url: Url) -> tuple[Any, list[RemoteFile]]:
    """Return the fsspec file system of a URL, and the slide's files in the order in which `fingerprint` hashes them.

    For a folder, these are all files in it and in its subfolders. For an .mrxs slide, they are that file and the files
    in the folder of the same name. Listings that fsspec has cached are discarded first.

    `url`: URL of the slide's file or folder.

    InputError if a folder holds slide files, such as .svs, and none that may be DICOM, with the suffix .dcm or none.
    SlideError if the storage does not report the size of a file. Other errors of fsspec and the storage's library
    propagate.
    """
    import fsspec

    storage, path = fsspec.url_to_fs(url.text)
    storage.invalidate_cache()
    path = path.rstrip("/")
    properties = storage.info(path)
    if properties["type"] == "directory":
        files = _inside(storage, path, url.name)
        slides = [str(file.name) for file in files if file.name.suffix.lower() in SLIDE_SUFFIXES]
        if slides and not any(file.name.suffix.lower() in ("", ".dcm") for file in files):
            raise InputError(f"{url}: is a folder of slides ({listed(slides)}), not one slide; give each its own row")
    else:
        files = [RemoteFile(path, PurePosixPath(url.name), properties.get("size"))]
        if url.name.lower().endswith(".mrxs"):
            files += _inside(storage, path[: -len(".mrxs")], url.stem)
    if any(file.size is None for file in files):
        raise SlideError(f"{url}: the storage does not report its size")
    return storage, files


def _inside(storage: Any, folder: str, name: str) -> list[RemoteFile]:
    found = {
        PurePosixPath(name) / PurePosixPath(key).relative_to(folder): held
        for key, held in storage.find(folder, detail=True).items()
    }
    return [RemoteFile(held["name"], path, held["size"]) for path, held in sorted(found.items())]


def _parts(url: Url, storage: Any, file: RemoteFile) -> ReadParts:
    def read(ranges: list[tuple[int, int]]) -> list[bytes]:
        wanted = [(start, stop) for start, stop in ranges if start < stop]
        starts, stops = [start for start, _ in wanted], [stop for _, stop in wanted]
        parts: list[bytes] = storage.cat_ranges([file.key] * len(wanted), starts, stops, on_error="raise")
        if [len(part) for part in parts] != [stop - start for start, stop in wanted]:
            raise SlideError(f"{url}: the storage does not serve parts of files; copy the slide to disk yourself")
        return parts

    return read
