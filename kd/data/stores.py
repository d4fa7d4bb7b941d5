"""Read and write the file formats of a cache: a zarr group with the pixels of all images, or a zip of .npy files."""

from __future__ import annotations

import json
import math
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.files import is_special

CHUNK = 1 << 20
"""Number of pixels in a chunk of the zarr arrays."""

ARRAYS = {"image": (np.uint8, (3,)), "instances": (np.int32, ()), "types": (np.uint8, ())}
"""Name of an array → its dtype, and the shape of one pixel."""

Arrays = dict[str, NDArray[Any]]
"""Arrays (y, x, …) of one image, by the names in ARRAYS."""


class ZarrStore:
    """Storage in a zarr group.

    Appended images are buffered until they fill whole chunks. The last chunk that was read stays in memory, because
    patches are smaller than chunks and are read one after the other.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._buffer: list[Arrays] = []
        self._pixels = 0
        self._last: dict[str, tuple[int, NDArray[Any]]] = {}

    @classmethod
    def create(cls, path: Path) -> ZarrStore:
        """Create an empty group at `path` for writing. An existing file or folder is replaced.

        Raises OSError if it cannot be written.
        """
        import zarr
        from zarr.codecs import ZstdCodec

        group = zarr.open_group(path, mode="w", zarr_format=3)
        for name, (dtype, pixel_shape) in ARRAYS.items():
            group.create_array(
                name,
                shape=(0, *pixel_shape),
                chunks=(CHUNK, *pixel_shape),
                dtype=dtype,
                compressors=ZstdCodec(level=3),
                dimension_names=("pixel", "channel")[: 1 + len(pixel_shape)],
            )
        return cls(group)

    @classmethod
    def open(cls, path: Path) -> ZarrStore:
        """Open the group at `path` for reading. Errors of zarr propagate."""
        import zarr

        return cls(zarr.open_group(path, mode="r"))

    @property
    def header(self) -> dict[str, Any]:
        """Header that `finish` wrote, as JSON values; empty if there is none."""
        return dict(self._group.attrs)

    def append(self, i: int, arrays: Arrays) -> None:
        """Append the arrays of the next image to the buffer, and write chunks that are full.

        `i` is ignored. `arrays`: an array (y, x) or (y, x, 3) for each name in ARRAYS. Raises OSError if a chunk cannot
        be written.
        """
        self._buffer.append({name: a.reshape(-1, *ARRAYS[name][1]) for name, a in arrays.items()})
        if sum(len(a["instances"]) for a in self._buffer) >= CHUNK:
            self._write(whole_chunks=True)

    def _write(self, whole_chunks: bool) -> None:
        joined = {name: np.concatenate([a[name] for a in self._buffer]) for name in ARRAYS}
        buffered = len(joined["instances"])
        n = buffered // CHUNK * CHUNK if whole_chunks else buffered
        for name, values in joined.items():
            array = self._group[name]
            array.resize((self._pixels + n, *ARRAYS[name][1]))
            array[self._pixels :] = values[:n]
        self._pixels += n
        self._buffer = [{name: values[n:] for name, values in joined.items()}]

    def finish(self, header: dict[str, Any]) -> None:
        """Write the rest of the buffer, and `header` (JSON values) as attributes of the group.

        Raises OSError if they cannot be written.
        """
        if self._buffer:
            self._write(whole_chunks=False)
        self._group.attrs.put(header)

    def read(self, i: int, shape: tuple[int, int], offset: int) -> Arrays:
        """Return the arrays of the image of `shape` (y, x) that begins at pixel `offset`, by the names in ARRAYS.

        `i` is ignored. Errors of zarr propagate.
        """
        stop = offset + math.prod(shape)
        if stop > self._group["instances"].shape[0]:
            raise ValueError("the arrays are shorter than the header says")
        chunks = range(offset // CHUNK, -(-stop // CHUNK))
        arrays: Arrays = {}
        for name, (_, pixel_shape) in ARRAYS.items():
            parts = [self._chunk(name, k)[max(0, offset - k * CHUNK) : stop - k * CHUNK] for k in chunks]
            arrays[name] = np.concatenate(parts).reshape(*shape, *pixel_shape)
        return arrays

    def _chunk(self, name: str, k: int) -> NDArray[Any]:
        if name not in self._last or self._last[name][0] != k:
            self._last[name] = k, np.asarray(self._group[name][k * CHUNK : (k + 1) * CHUNK])
        return self._last[name][1]


class NpzStore:
    """Storage in a zip of .npy files, readable with `np.load`."""

    def __init__(self, zip: zipfile.ZipFile) -> None:
        self._zip = zip

    @classmethod
    def create(cls, path: Path) -> NpzStore:
        """Create an empty file at `path` for writing. An existing file is replaced. `finish` closes the new one.

        Raises OSError if it cannot be written.
        """
        return cls(zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1))

    @classmethod
    def open(cls, path: Path) -> NpzStore:
        """Open the file at `path` for reading. It stays open as long as the result exists.

        Errors of zipfile propagate.
        """
        if is_special(path):
            raise ValueError("is a device or a pipe")
        return cls(zipfile.ZipFile(path))

    @property
    def header(self) -> dict[str, Any]:
        """Header that `finish` wrote, as JSON values.

        Raises KeyError if there is none. Other errors of zipfile and JSON propagate.
        """
        return dict(json.loads(self._load("header").tobytes()))

    def append(self, i: int, arrays: Arrays) -> None:
        """Write the arrays of image `i`.

        `arrays`: an array (y, x) or (y, x, 3) for each name in ARRAYS. Raises OSError if they cannot be written; the
        file is then closed.
        """
        for name, array in arrays.items():
            self._save(f"{name}/{i}", array)

    def finish(self, header: dict[str, Any]) -> None:
        """Write `header` (JSON values), and close the file. Raises OSError if it cannot be written."""
        self._save("header", np.frombuffer(json.dumps(header).encode(), np.uint8))
        self._zip.close()

    def read(self, i: int, shape: tuple[int, int], offset: int) -> Arrays:
        """Return the arrays of image `i`, by the names in ARRAYS. `shape` and `offset` are ignored.

        Errors of zipfile and numpy propagate.
        """
        return {name: self._load(f"{name}/{i}") for name in ARRAYS}

    def _save(self, name: str, array: NDArray[Any]) -> None:
        try:
            with self._zip.open(f"{name}.npy", "w", force_zip64=True) as f:
                np.save(f, array, allow_pickle=False)
        except OSError:
            with suppress(OSError):  # else the garbage collector closes the file, and prints a second error
                self._zip.close()
            raise

    def _load(self, name: str) -> NDArray[Any]:
        with self._zip.open(f"{name}.npy") as f:
            return np.asarray(np.load(f, allow_pickle=False))


Store = ZarrStore | NpzStore
"""Storage of a cache. Images are appended in order, then `finish` writes the header; they are read in any order."""
