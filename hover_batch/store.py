"""Prediction store: one zarr v3 array (plane, y, x) uint8 per slide, one shard per unit.

Two writers of one shard lose data, so a writer writes a whole unit at once, and the first writer of a shard wins, so
that a late one cannot change what neighbours have already read. Shards of zeros alone are not written: a unit is done
when its marker exists (see `hover_batch.cohort.layout`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore

from hover_batch.files import naming, write_first
from hover_batch.geometry import Box, Size, cell_box
from hover_batch.shard import decode_shard, encode_shard

CHUNK = 512
"""Side of a chunk in inference pixels, if it divides the unit; otherwise the whole unit is one chunk."""

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
        self.unit = (array.shards or array.chunks)[1]
        """Side of a unit in inference pixels."""
        self.hv_masked = bool(array.attrs.get(HV_MASKED, False))
        """Whether h and v are zero away from the foreground (see `hover_batch.nuclei.energy.mask_hv`)."""

    @classmethod
    def create(cls, path: Path, size: Size, planes: int, unit: int, attributes: Mapping[str, Any]) -> PredictionStore:
        """Create an empty store at `path` and open it for writing. If there already is one, open it unchanged.

        An existing store must have been created with the same values, which is not checked.

        `size`: size of the canvas in inference pixels. `planes`: number of planes. `unit`: side of a shard in inference
        pixels. `attributes`: JSON values by name. HV_MASKED says whether h and v are masked (False if it is missing).
        The others, such as mpp, level0_per_pixel and model (the card), describe the maps for readers like
        `load_predictions`.

        OSError if it cannot be written; errors of zarr, mostly ValueError, if an existing store is corrupted.
        """
        if (path / "zarr.json").exists():
            return cls.open(path)
        chunk = CHUNK if unit % CHUNK == 0 else unit
        with naming(path):
            array = zarr.create_array(
                LocalStore(path),
                shape=(planes, size.height, size.width),
                shards=(planes, unit, unit),
                chunks=(1, chunk, chunk),
                dtype="uint8",
                fill_value=0,
                compressors=ZstdCodec(level=1),
                zarr_format=3,
                dimension_names=("plane", "y", "x"),
                attributes=dict(attributes),
            )
        return cls(array, path)

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> PredictionStore:
        """Open an existing store for reading and, unless `read_only`, for writing units.

        FileNotFoundError if there is none at `path`; unless `read_only`, an empty folder may then be left there. Other
        errors of zarr, mostly ValueError, if its zarr.json is corrupted.
        """
        store = LocalStore(path, read_only=read_only)
        try:
            return cls(zarr.open_array(store, mode="r" if read_only else "r+"), path)
        except AttributeError as error:  # zarr takes for granted that zarr.json holds an object
            raise ValueError(f"{path / 'zarr.json'}: is corrupted") from error

    def write(self, box: Box, maps: NDArray[np.uint8]) -> str | None:
        """Write the shards of one or more whole units, synced to disk. Return their SHA-256, as `shard_sha256` does.

        A unit that already has a shard stays as it is; a unit whose maps are all zero gets none.

        `box`: the unit or units in inference pixels, clipped to the canvas. `maps`: (plane, y, x) uint8, of the shape
        of `box`.

        OSError if a shard cannot be written.
        """
        for unit in self._units(box):
            rows, columns = unit.intersect(box).slices_in(box)
            shard = encode_shard(maps[:, rows, columns], self.unit, self.array.chunks[1])
            if shard is not None:
                path = self._shard(unit)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_first(path, shard)
        return self.shard_sha256(box)

    def shard_sha256(self, box: Box) -> str | None:
        """Return the hex SHA-256 of the shard of the unit at `box`; None if it has no shard, as when its maps are zero.

        If `box` covers several units, it is the hash of their shards, concatenated in raster order. `box`: in inference
        pixels. OSError if a shard cannot be read.
        """
        digest, found = hashlib.sha256(), False
        for unit in self._units(box):
            with contextlib.suppress(FileNotFoundError), self._shard(unit).open("rb") as shard:
                hashlib.file_digest(shard, lambda: digest)
                found = True
        return digest.hexdigest() if found else None

    def has_shard(self, box: Box) -> bool:
        """Return whether the unit `box` has a shard. Units that are not written or hold only zeros have none.

        `box`: the unit in inference pixels.
        """
        return self._shard(box).exists()

    def sweep(self) -> None:
        """Remove the temporary files (.*.partial) of killed writers. Call it only while nothing writes to the store.

        OSError if a file cannot be removed.
        """
        for leftover in list(self.path.rglob(".*.partial")):
            leftover.unlink(missing_ok=True)

    def remove(self, box: Box) -> None:
        """Remove the shards of the units in `box`, which then read as zero. Call it only while nothing writes to them.

        `box`: in inference pixels. OSError if a shard cannot be removed.
        """
        for unit in self._units(box):
            self._shard(unit).unlink(missing_ok=True)

    def _units(self, box: Box) -> Iterator[Box]:
        """Yield the units that `box` meets, not clipped to the canvas, in raster order."""
        return (cell_box(column, row, self.unit) for column, row in box.intersect(self.canvas).cells(self.unit))

    def _shard(self, box: Box) -> Path:
        return self.path / "c" / "0" / str(box.y0 // self.unit) / str(box.x0 // self.unit)

    def read(self, box: Box) -> NDArray[np.uint8]:
        """Return the maps (plane, y, x) uint8 of a box, 0 where nothing was predicted and outside the canvas.

        `box`: any box in inference pixels. SlideError if a shard is corrupted, OSError if one cannot be read.
        """
        maps = np.zeros((self.array.shape[0], *box.shape), np.uint8)
        for unit in self._units(box):
            with contextlib.suppress(FileNotFoundError):
                decode_shard(self._shard(unit), unit, self.array.chunks[1], box, maps)
        return maps
