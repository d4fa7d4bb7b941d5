"""How the content of a cache is put into files: a zarr group of ragged arrays, or a zip of .npy files."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 20
"""Pixels in a chunk of the zarr arrays."""

ARRAYS = {"image": (np.uint8, (3,)), "instances": (np.int32, ()), "types": (np.uint8, ())}
"""Name → dtype, and shape after that of the pixels."""

Arrays = dict[str, NDArray[Any]]
"""What is stored of one image, by the names of ARRAYS; y and x are still two axes."""


class Store(Protocol):
    """Written front to back, image by image, the header last; `finish` ends it. Read in any order."""

    @property
    def header(self) -> dict[str, Any]: ...

    def append(self, i: int, arrays: Arrays) -> None:
        """Add image `i`, which is the next one."""

    def finish(self, header: dict[str, Any]) -> None: ...

    def read(self, i: int, shape: tuple[int, int], offset: int) -> Arrays:
        """Image `i` of `shape` (y, x), before which there are `offset` pixels."""


class ZarrStore:
    """A zarr group. What is appended is held until it fills whole chunks; the chunk read last is kept, since patches
    are smaller than chunks and are read one after the other."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._held: list[Arrays] = []
        self._pixels = 0
        self._last: dict[str, tuple[int, NDArray[Any]]] = {}

    @classmethod
    def create(cls, path: Path) -> ZarrStore:
        import zarr
        from zarr.codecs import ZstdCodec

        group = zarr.open_group(path, mode="w", zarr_format=3)
        for name, (dtype, rest) in ARRAYS.items():
            group.create_array(
                name,
                shape=(0, *rest),
                chunks=(CHUNK, *rest),
                dtype=dtype,
                compressors=ZstdCodec(level=3),
                dimension_names=("pixel", "channel")[: 1 + len(rest)],
            )
        return cls(group)

    @classmethod
    def open(cls, path: Path) -> ZarrStore:
        import zarr

        return cls(zarr.open_group(path, mode="r"))

    @property
    def header(self) -> dict[str, Any]:
        return dict(self._group.attrs)

    def append(self, i: int, arrays: Arrays) -> None:
        self._held.append({name: a.reshape(-1, *ARRAYS[name][1]) for name, a in arrays.items()})
        if sum(len(a["instances"]) for a in self._held) >= CHUNK:
            self._write(whole_chunks=True)

    def _write(self, whole_chunks: bool) -> None:
        joined = {name: np.concatenate([a[name] for a in self._held]) for name in ARRAYS}
        held = len(joined["instances"])
        n = held // CHUNK * CHUNK if whole_chunks else held
        for name, values in joined.items():
            array = self._group[name]
            array.resize((self._pixels + n, *ARRAYS[name][1]))
            array[self._pixels :] = values[:n]
        self._pixels += n
        self._held = [{name: values[n:] for name, values in joined.items()}]

    def finish(self, header: dict[str, Any]) -> None:
        if self._held:
            self._write(whole_chunks=False)
        self._group.attrs.put(header)

    def read(self, i: int, shape: tuple[int, int], offset: int) -> Arrays:
        stop = offset + math.prod(shape)
        return {
            name: np.concatenate(
                [
                    self._chunk(name, k)[max(0, offset - k * CHUNK) : stop - k * CHUNK]
                    for k in range(offset // CHUNK, -(-stop // CHUNK))
                ]
            ).reshape(*shape, *ARRAYS[name][1])
            for name in ARRAYS
        }

    def _chunk(self, name: str, k: int) -> NDArray[Any]:
        if name not in self._last or self._last[name][0] != k:
            self._last[name] = k, np.asarray(self._group[name][k * CHUNK : (k + 1) * CHUNK])
        return self._last[name][1]


class NpzStore:
    """A zip of .npy files, which `np.load` opens."""

    def __init__(self, zip: zipfile.ZipFile) -> None:
        self._zip = zip

    @classmethod
    def create(cls, path: Path) -> NpzStore:
        return cls(zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1))

    @classmethod
    def open(cls, path: Path) -> NpzStore:
        return cls(zipfile.ZipFile(path))

    @property
    def header(self) -> dict[str, Any]:
        return dict(json.loads(self._load("header").tobytes()))

    def append(self, i: int, arrays: Arrays) -> None:
        for name, array in arrays.items():
            self._save(f"{name}/{i}", array)

    def finish(self, header: dict[str, Any]) -> None:
        self._save("header", np.frombuffer(json.dumps(header).encode(), np.uint8))
        self._zip.close()

    def read(self, i: int, shape: tuple[int, int], offset: int) -> Arrays:
        return {name: self._load(f"{name}/{i}") for name in ARRAYS}

    def _save(self, name: str, array: NDArray[Any]) -> None:
        with self._zip.open(f"{name}.npy", "w", force_zip64=True) as f:
            np.save(f, array, allow_pickle=False)

    def _load(self, name: str) -> NDArray[Any]:
        with self._zip.open(f"{name}.npy") as f:
            return np.asarray(np.load(f, allow_pickle=False))
