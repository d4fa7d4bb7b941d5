"""Prediction store: one zarr v3 array (plane, y, x) uint8 per slide, one shard per unit.

Two writers of one shard would lose data, so a writer writes a whole unit at once. The first writer of a shard wins, so
that a late one cannot change what neighbours have already read. Shards that hold only zeros are not written: a unit is
done when its marker exists (see `hover_batch.cohort.layout`).

Shards are encoded and decoded by zarrs, which needs less than half of zarr-python's time for the same format, or by
zarr-python if zarrs is not installed. With several threads, zarrs may order the chunks of a shard differently each
time: equal maps do not always give equal files.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore

from hover_batch.files import write_first
from hover_batch.geometry import Box, Size

CHUNK = 512
"""Side of a chunk in inference pixels, if it divides the unit; otherwise the whole unit is one chunk."""

_ONLY_SHARD = "c/0/0/0"
"""Key of the shard of an array that has only one."""

_configuring = Lock()

HV_MASKED = "hv_masked"
"""Attribute that says whether h and v are masked; stores of older versions lack it, and are not masked."""


class PredictionStore:
    """Quantised maps of one slide (see `MapLayout`), for several processes at once.

    Coordinates are inference pixels; outside of the canvas, all planes are zero. `array`: zarr array (plane, y, x)
    uint8. `path`: folder of the store. Make it with `create` or `open`.
    """

    def __init__(self, array: zarr.Array[Any], path: Path) -> None:
        self.array = array
        self.path = path
        self.canvas = Size(array.shape[2], array.shape[1]).box
        self.hv_masked = bool(array.attrs.get(HV_MASKED, False))
        """Whether h and v are zero away from the foreground (see `hover_batch.nuclei.energy.mask_hv`)."""

    @classmethod
    def create(cls, path: Path, size: Size, planes: int, unit: int, attributes: Mapping[str, Any]) -> PredictionStore:
        """Create an empty store of `size` inference pixels; if there is one at `path`, open it unchanged.

        `planes`: number of planes. `unit`: side of a shard in inference pixels. `attributes`: JSON values such as mpp,
        scale, plane names and the model card, so that the store can be read without this package. OSError if it cannot
        be written.
        """
        if (path / "zarr.json").exists():
            return cls.open(path)
        shape = (planes, size.height, size.width)
        names = ("plane", "y", "x")
        _create(LocalStore(path), shape, unit, attributes=dict(attributes), dimension_names=names)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> PredictionStore:
        """Open an existing store for reading and, unless `read_only`, for writing.

        FileNotFoundError if there is none.
        """
        return cls(_open(path, read_only), path)

    def write(self, box: Box, maps: NDArray[np.uint8]) -> str | None:
        """Write a whole unit, unless its shard exists, and sync it to disk.

        `box`: the unit, clipped to the canvas. `maps`: (plane, y, x) uint8, of the shape of `box`. Returns the hex
        SHA-256 of the shard on disk; None if there is none, because all maps are zero. OSError if it cannot be written.
        """
        shard = self._encoded(maps)
        if shard is not None:
            path = self._shard(box)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_first(path, shard)
        return self.shard_sha256(box)

    def _encoded(self, maps: NDArray[np.uint8]) -> bytes | None:
        """Return the content of the shard of a unit with these maps, or None if they hold only zeros.

        It is written to a temporary folder, since zarr would replace an existing shard, and give a new one its name
        before it is on disk.
        """
        unit = (self.array.shards or self.array.chunks)[1]
        try:
            with TemporaryDirectory(dir=self.path, prefix=".shard.", suffix=".partial") as folder:
                _create(LocalStore(folder), maps.shape, unit)
                _open(Path(folder))[:] = maps
                shard = Path(folder, _ONLY_SHARD)
                return shard.read_bytes() if shard.exists() else None
        except RuntimeError:
            # zarrs also raises it if the disk is full; write_first then raises an OSError that says so.
            buffers: dict[str, Buffer] = {}
            _create(MemoryStore(buffers), maps.shape, unit)[:] = maps
            return buffers[_ONLY_SHARD].to_bytes() if _ONLY_SHARD in buffers else None

    def shard_sha256(self, box: Box) -> str | None:
        """Return the hex SHA-256 of the shard of the unit at `box`; None if it has no shard."""
        try:
            with self._shard(box).open("rb") as shard:
                return hashlib.file_digest(shard, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    def has_shard(self, box: Box) -> bool:
        """Return whether the unit at `box` has a shard. Units that are not written or hold only zeros have none."""
        return self._shard(box).exists()

    def sweep(self) -> None:
        """Remove partial files of killed writers. Call it only while nothing writes to the store."""
        for leftover in list(self.path.rglob(".*.partial")):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)

    def remove(self, box: Box) -> None:
        """Remove the shard of the unit at `box`, which then reads as zero. Call it only while nothing writes there."""
        self._shard(box).unlink(missing_ok=True)

    def _shard(self, box: Box) -> Path:
        _, height, width = self.array.shards or self.array.chunks
        return self.path / "c" / "0" / str(box.y0 // height) / str(box.x0 // width)

    def read(self, box: Box) -> NDArray[np.uint8]:
        """Return the maps (plane, y, x) uint8 of any box; they are zero outside the canvas and where nothing is stored.

        A corrupted shard raises an exception of the decoder.
        """
        inside = box.intersect(self.canvas)
        planes = self.array.shape[0]
        if inside == box:
            return np.asarray(self.array[:, box.y0 : box.y1, box.x0 : box.x1])
        maps = np.zeros((planes, *box.shape), np.uint8)
        if not inside.empty:
            rows, columns = inside.slices_in(box)
            maps[:, rows, columns] = self.array[:, inside.y0 : inside.y1, inside.x0 : inside.x1]
        return maps


def _create(store: Store, shape: tuple[int, ...], unit: int, **more: Any) -> zarr.Array[Any]:
    """Create an empty array of `shape` (plane, y, x) with shards of `unit` pixels. `more`: arguments of zarr."""
    chunk = CHUNK if unit % CHUNK == 0 else unit
    return zarr.create_array(
        store,
        shape=shape,
        shards=(shape[0], unit, unit),
        chunks=(1, chunk, chunk),
        dtype="uint8",
        fill_value=0,
        compressors=ZstdCodec(level=1),
        zarr_format=3,
        **more,
    )


def _open(path: Path, read_only: bool = False) -> zarr.Array[Any]:
    """Open the array at `path` for reading and, unless `read_only`, for writing."""
    codecs = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"} if find_spec("zarrs") else {}
    # zarr keeps its configuration for the whole process: threads must not restore each other's values.
    with _configuring, zarr.config.set(codecs):
        return zarr.open_array(LocalStore(path, read_only=read_only), mode="r" if read_only else "r+")
