"""Write and read caches of annotated images (`kd prepare`): a zarr group, or the same content in one .npz file.

Both have a header with the format, the taxonomy, and for each image its id, source, tissue, group, fold, height, width,
whether its types are annotated, and the SHA-256 of its content. Images differ in size, so the zarr (v3) group stores
the pixels of all images one after the other in raster order: `image` (pixel, 3) uint8, `instances` (pixel,) int32,
`types` (pixel,) uint8, where image i begins at the sum of the areas before it; the header is the group's attributes.
The .npz file has `image/<i>` (y, x, 3), `instances/<i>` and `types/<i>` (y, x) for each image, and `header`, JSON as
bytes.

A cache is written under a hidden name and renamed once it is complete; the next run removes the remains of killed
runs. The hash of every image is checked when it is read, because missing zarr chunks are read as zeros.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from hover_batch.errors import DISK_FULL, InputError
from hover_batch.files import replacing, replacing_folder, sweeping
from hover_batch.taxonomy import Taxonomy
from kd.data.samples import Sample
from kd.data.stores import ARRAYS, Arrays, NpzStore, Store, ZarrStore

FORMAT = "hover-batch annotated images"
"""Value of `format` in the header."""
VERSION = 1
"""Value of `version` in the header, the version of the format."""
SUFFIXES = (".zarr", ".npz")
"""Suffixes of caches."""


@dataclass(frozen=True)
class Entry:
    """Entry of one image in the header."""

    id: str
    """Id of the image."""
    source: str
    """Data set that the image is from."""
    tissue: str
    """Tissue; empty if unknown."""
    group: str
    """Patient or slide; empty if unknown."""
    fold: str
    """Fold of the image."""
    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    typed: bool
    """Whether types are annotated."""
    sha256: str
    """SHA-256 of the shapes and bytes of image, instances and types."""

    @property
    def area(self) -> int:
        """Number of pixels of the image."""
        return self.height * self.width


def is_cache(path: Path) -> bool:
    """True if `path` ends in .zarr or .npz, the suffixes of caches. The file need not exist."""
    return path.suffix in SUFFIXES


class CacheWriter:
    """Writer of a cache, one image at a time. Use `writing`, which creates the writer and calls `finish`.

    `path`: zarr group or .npz file to create; an existing one is replaced. `out`: final path of the cache; its suffix
    selects the format, and messages name it. Raises InputError if the cache cannot be written, for example because the
    disk is full; so do the methods.
    """

    def __init__(self, path: Path, out: Path) -> None:
        self._out = out
        with _failures(out):
            self._store: Store = ZarrStore.create(path) if out.suffix == ".zarr" else NpzStore.create(path)
        self._entries: dict[str, Entry] = {}

    def add(self, sample: Sample) -> None:
        """Append `sample`. If it has no types, they are stored as zeros and marked as not annotated.

        Raises InputError if an image with the same id has been added already, the cache cannot be written, or the disk
        is full.
        """
        height, width = sample.instances.shape
        if sample.id in self._entries:
            raise InputError(
                f"{sample.id}: two images have this id, one of {self._entries[sample.id].source} and one of "
                f"{sample.source}; give each folder once, and every image its own id"
            )
        typed = sample.types is not None
        types = np.zeros((height, width), np.uint8) if sample.types is None else sample.types
        arrays: Arrays = {"image": sample.image, "instances": sample.instances, "types": types}
        self._entries[sample.id] = Entry(
            id=sample.id,
            source=sample.source,
            tissue=sample.tissue,
            group=sample.group,
            fold=sample.fold,
            height=height,
            width=width,
            typed=typed,
            sha256=_sha256(arrays),
        )
        with _failures(self._out):
            self._store.append(len(self._entries) - 1, arrays)

    def finish(self, taxonomy: Taxonomy) -> None:
        """Write the header. No image can be added afterwards.

        `taxonomy`: classes of the types of all images.

        Raises InputError if the cache cannot be written, or the disk is full.
        """
        listed = [asdict(e) for e in self._entries.values()]
        with _failures(self._out):
            self._store.finish({"format": FORMAT, "version": VERSION, "taxonomy": taxonomy.to_json(), "images": listed})


@contextmanager
def writing(path: Path, taxonomy: Taxonomy) -> Iterator[CacheWriter]:
    """Return a context manager that yields a writer for a cache at `path`.

    The cache appears only if the block succeeds, and then replaces an older one. If the block fails, an older cache
    stays; exceptions of the block propagate. The remains of killed runs are removed, unless another run is writing in
    the same folder.

    `path`: a .zarr folder or .npz file in an existing folder. `taxonomy`: classes of the types.

    Raises InputError if `path` does not end in .zarr or .npz, its folder is missing, it exists but cannot be opened as
    a cache of this version, it cannot be written, or the disk is full; OSError if the folder cannot be opened, or the
    complete cache cannot be moved to `path`.
    """
    if not is_cache(path):
        raise InputError(f"--out {path}: must end in .zarr or .npz; change the ending")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: the folder {path.parent} does not exist; create it first")
    if path.exists():
        try:
            open_cache(path)
        except InputError as error:
            raise InputError(f"--out {path}: exists and is not a cache of this format; remove it first") from error
    replace = replacing_folder if path.suffix == ".zarr" else replacing
    with sweeping(path), replace(path) as temporary:
        writer = CacheWriter(temporary, path)
        yield writer
        writer.finish(taxonomy)


@contextmanager
def _failures(path: Path) -> Iterator[None]:
    """Convert an OSError in writing the cache at `path` to an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise InputError(f"--out {path}: cannot be written ({error}); give another place") from error
        raise InputError(f"--out {path}: the disk is full; free some space and run the same command again") from error


class Cache:
    """Cache, opened for reading; see `open_cache`.

    The attribute `taxonomy` has the classes of the types, and `entries` the header entries of the images, in order.

    `path`: path for messages. `store`: storage of the cache, opened for reading. Raises InputError if the header is of
    another format or version.
    """

    def __init__(self, path: Path, store: Store) -> None:
        self._path, self._store = path, store
        header = store.header
        if header.get("format") != FORMAT:
            raise InputError(f"{path} is not a cache of annotated images; write one with `hover-batch kd prepare`")
        if header["version"] != VERSION:
            raise InputError(
                f"{path} has format version {header['version']}, not {VERSION}; run `hover-batch kd prepare` again"
            )
        self.taxonomy = Taxonomy.from_json(header["taxonomy"])
        self.entries = [_entry(i, entry) for i, entry in enumerate(header["images"])]

    @property
    def folds(self) -> list[str]:
        """Names of the folds, in the order in which they appear."""
        return list(dict.fromkeys(entry.fold for entry in self.entries))

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order in which they appear."""
        return list(dict.fromkeys(entry.source for entry in self.entries))

    def samples(self, fold: str, sources: Collection[str] | None) -> Iterator[Sample]:
        """Yield the images of a fold, in the order of the cache. Each is read when it is yielded.

        `fold`: fold of the images; an unknown one has no images. `sources`: sources of the images; None for all.

        Raises InputError if an image is corrupted.
        """
        offset = 0
        for i, entry in enumerate(self.entries):
            if entry.fold == fold and (sources is None or entry.source in sources):
                yield self._read(i, entry, offset)
            offset += entry.area

    def _read(self, i: int, entry: Entry, offset: int) -> Sample:
        try:
            arrays = self._store.read(i, (entry.height, entry.width), offset)
            if _sha256(arrays) != entry.sha256:
                raise ValueError("checksum mismatch")
            if arrays["types"].max(initial=0) >= len(self.taxonomy.classes):
                raise ValueError("a class that the header does not have")
        except Exception as error:  # zarr, its codecs, zip and numpy raise many kinds for corrupted files
            raise InputError(
                f"{self._path}: the image {entry.id} is corrupted; run `hover-batch kd prepare` again to replace the "
                "cache"
            ) from error
        return Sample(
            id=entry.id,
            source=entry.source,
            group=entry.group,
            image=arrays["image"],
            instances=arrays["instances"],
            types=arrays["types"] if entry.typed else None,
            tissue=entry.tissue,
            fold=entry.fold,
        )


def open_cache(path: Path) -> Cache:
    """Open the cache at `path` for reading; only its header is read.

    An .npz file stays open as long as the result exists.

    Raises InputError if there is no cache, or it cannot be read or is of another format or version.
    """
    if not path.exists():
        raise InputError(f"{path}: no such cache; write one with `hover-batch kd prepare`")
    try:
        return Cache(path, ZarrStore.open(path) if path.suffix == ".zarr" else NpzStore.open(path))
    except InputError:  # of another format or version
        raise
    except Exception as error:  # zarr, zip and JSON raise many kinds for corrupted files
        raise InputError(f"{path} cannot be read as a cache; run `hover-batch kd prepare` again ({error})") from error


def _entry(i: int, values: dict[str, Any]) -> Entry:
    """Return the entry of image `i`. Raises ValueError or TypeError if a value is missing or invalid."""
    entry = Entry(**values)
    for field in fields(Entry):
        value = getattr(entry, field.name)
        if type(value).__name__ != field.type or (field.type == "int" and value < 1):
            raise ValueError(f"the {field.name} of image {i} is {value!r:.40}")
    return entry


def _sha256(arrays: Arrays) -> str:
    """Return the SHA-256 of shapes and bytes, in the order of ARRAYS."""
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(f"{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
