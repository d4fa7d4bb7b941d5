"""Encode and decode shards of a prediction store: one file of compressed chunks, with an index at its end.

The format is zarr's codec `sharding_indexed` with chunks of one plane, zstd, and an index in little-endian bytes with a
CRC-32C (https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/). Any zarr library reads it. It is
encoded and decoded here because maps then go straight to and from their place, chunks of zeros are neither stored nor
touched, everything happens in the calling thread, and equal maps give equal files.
"""

from __future__ import annotations

import os
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from hover_batch.errors import SlideError
from hover_batch.geometry import Box

_ZSTD = Zstd(level=1)
_ABSENT = np.uint64(2**64 - 1)
"""Offset and length in the index of a chunk that is not stored, because it is zero everywhere."""
_ENTRY_BYTES = 16
"""Bytes of an entry of the index: offset and length of a chunk."""
_CRC_BYTES = 4
"""Bytes of the checksum of the index, which follows it."""


def encode_shard(maps: NDArray[np.uint8], unit: int, chunk: int) -> bytes | None:
    """Return the content of the shard of a unit; None if its maps are zero everywhere.

    The maps are smaller than the unit if it is clipped to the canvas. The rest of the unit is then zero.

    `maps`: maps of the unit, (plane, y, x) uint8. `unit`: side of a whole unit in pixels, a multiple of `chunk`.
    `chunk`: side of a chunk in pixels.
    """
    planes, height, width = maps.shape
    side = unit // chunk
    index = np.full((planes, side, side, 2), _ABSENT, "<u8")
    padded = np.zeros((chunk, chunk), np.uint8)
    stored: list[bytes] = []
    size = 0
    for plane in range(planes):
        for row in range(-(-height // chunk)):
            for column in range(-(-width // chunk)):
                pixels = maps[plane, row * chunk : (row + 1) * chunk, column * chunk : (column + 1) * chunk]
                if not pixels.any():
                    continue
                padded[: pixels.shape[0], : pixels.shape[1]] = pixels
                padded[pixels.shape[0] :] = 0
                padded[:, pixels.shape[1] :] = 0
                stored.append(_ZSTD.encode(padded))
                index[plane, row, column] = size, len(stored[-1])
                size += len(stored[-1])
    if not stored:
        return None
    index_bytes = index.tobytes()
    return b"".join([*stored, index_bytes, google_crc32c.value(index_bytes).to_bytes(_CRC_BYTES, "little")])


def decode_shard(path: Path, unit_box: Box, chunk: int, window: Box, maps: NDArray[np.uint8]) -> None:
    """Decode the shard at `path`, and copy the pixels of its unit that lie in `window` to `maps`.

    `unit_box`: the whole unit in inference pixels, not clipped to the canvas. `chunk`: side of a chunk in pixels.
    `window`: box in inference pixels that `maps` covers. `maps`: (plane, y, x) uint8, changed in place. It must be zero
    within the unit, since chunks of zeros are not copied.

    FileNotFoundError if there is no such shard, OSError if it cannot be read, SlideError if it is corrupted.
    """
    planes, rows, columns = len(maps), unit_box.height // chunk, unit_box.width // chunk
    needed = unit_box.intersect(window)
    try:
        with path.open("rb") as shard:
            size = shard.seek(0, os.SEEK_END)
            shard.seek(max(0, size - planes * rows * columns * _ENTRY_BYTES - _CRC_BYTES))
            end_of_shard = shard.read()
            index_bytes, crc = end_of_shard[:-_CRC_BYTES], end_of_shard[-_CRC_BYTES:]
            if google_crc32c.value(index_bytes) != int.from_bytes(crc, "little"):
                raise ValueError("the checksum of its index does not match")
            index = np.frombuffer(index_bytes, "<u8").reshape(planes, rows, columns, 2)
            pixels = np.empty((chunk, chunk), np.uint8)
            for plane, row, column in np.argwhere(index[..., 0] != _ABSENT).tolist():
                x0, y0 = unit_box.x0 + column * chunk, unit_box.y0 + row * chunk
                chunk_box = Box(x0, y0, x0 + chunk, y0 + chunk)
                part = chunk_box.intersect(needed)
                if part.empty:
                    continue
                offset, length = index[plane, row, column].tolist()
                shard.seek(offset)
                _ZSTD.decode(shard.read(length), pixels)
                maps[plane][part.slices_in(window)] = pixels[part.slices_in(chunk_box)]
    except (ValueError, RuntimeError) as error:
        raise SlideError(
            f"{path}: this part of the stored predictions is damaged ({error}); remove slide.json of this slide, if it "
            "exists, and repeat the segment command of its run, which predicts the part again"
        ) from error
