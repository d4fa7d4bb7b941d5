"""Fingerprint of a slide, which identifies its content wherever the files are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from hover_batch.geometry import Mpp

_BLOCK = 1 << 20

ReadParts = Callable[[list[tuple[int, int]]], Iterable[bytes]]
"""Function from byte ranges [start, stop) of one file to their bytes, in the same order."""


def fingerprint(path: Path, mpp: Mpp | None) -> str:
    """Return the fingerprint of the slide at `path`, a hex SHA-256 that identifies its content.

    It covers `mpp`, and the size and the first, middle and last MiB of each of the slide's files. For a folder, all
    files in it and in its subfolders count. For an .mrxs slide, that file and the files in the folder of the same name
    count. The fingerprint does not depend on path, host or time.

    `path`: file, or folder of a DICOM slide. `mpp`: pixel size in µm that the cohort gives; None if it gives none.

    OSError if a file cannot be read.
    """

    def range_reader(file: Path) -> ReadParts:
        def read(ranges: list[tuple[int, int]]) -> Iterator[bytes]:
            with file.open("rb") as stream:
                for start, stop in ranges:
                    stream.seek(start)
                    yield stream.read(stop - start)

        return read

    return fingerprint_of(((file.stat().st_size, range_reader(file)) for file in _files(path)), mpp)


def fingerprint_of(files: Iterable[tuple[int, ReadParts]], mpp: Mpp | None) -> str:
    """Return the fingerprint of a slide whose files may be in any storage.

    It equals the result of `fingerprint` for the same files on disk.

    `files`: for each file, its size in bytes and a function that reads ranges of it (see ReadParts), in the order of
    `fingerprint`: an .mrxs file comes first, files in folders are sorted by path. `mpp`: pixel size in µm that the
    cohort gives; None if it gives none.

    Errors of the functions propagate.
    """
    digest = hashlib.sha256()
    for size, read in files:
        digest.update(size.to_bytes(8, "little"))
        last = max(0, size - _BLOCK)
        starts = sorted({0, last // 2, last})  # of a small file, some or all coincide
        for part in read([(start, min(start + _BLOCK, size)) for start in starts]):
            digest.update(part)
    digest.update(f"mpp {mpp.x!r} {mpp.y!r}".encode() if mpp is not None else b"mpp of the file")
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    # A .mrxs file is only an index: its pixels are in the folder of the same name.
    pixels = path.with_suffix("") if path.suffix.lower() == ".mrxs" else path
    inside = sorted(f for f in pixels.rglob("*") if f.is_file()) if pixels.is_dir() else []
    return inside if path.is_dir() else [path, *inside]
