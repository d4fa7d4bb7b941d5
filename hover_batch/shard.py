"""Shards of a prediction store: bytes of many chunks, each compressed on its own, with an index at the end.

The format is zarr's codec `sharding_indexed` with chunks of one plane, zstd, and an index in little-endian bytes with a
CRC-32C (https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/). Any zarr library reads it. Encoding
and decoding take less than half of the time of zarr-python's, and a third of its memory, since maps go straight to and
from their place, chunks of zeros alone are neither stored nor touched, and everything happens in the calling thread.
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
"""Offset and length in the index of a chunk that is not stored: it is zero."""
_ENTRY, _CRC = 16, 4
"""Bytes of an entry of the index, offset and length, and of its checksum."""


def encode_shard(maps: NDArray[np.uint8], unit: int, chunk: int) -> bytes | None:
    """Return the shard of a unit with these maps (plane, y, x), or None if they are zero everywhere.

    `unit`: side of a whole unit in pixels, a multiple of `chunk`, the side of a chunk. Maps of a unit that was clipped
    to the canvas are smaller; they end like those of the unit, at zeros.
    """
    planes, height, width = maps.shape
    side = unit // chunk
    index = np.full((planes, side, side, 2), _ABSENT, "<u8")
    whole = np.zeros((chunk, chunk), np.uint8)
    stored: list[bytes] = []
    size = 0
    for plane in range(planes):
        for row in range(-(-height // chunk)):
            for column in range(-(-width // chunk)):
                pixels = maps[plane, row * chunk : (row + 1) * chunk, column * chunk : (column + 1) * chunk]
                if not pixels.any():
                    continue
                whole[: pixels.shape[0], : pixels.shape[1]] = pixels
                whole[pixels.shape[0] :] = 0
                whole[:, pixels.shape[1] :] = 0
                stored.append(_ZSTD.encode(whole))
                index[plane, row, column] = size, len(stored[-1])
                size += len(stored[-1])
    if not stored:
        return None
    listed = index.tobytes()
    return b"".join([*stored, listed, google_crc32c.value(listed).to_bytes(_CRC, "little")])


def decode_shard(path: Path, at: Box, chunk: int, window: Box, maps: NDArray[np.uint8]) -> None:
    """Copy what the shard at `path` holds of `window` into `maps` (plane, y, x), which are zero there.

    `at`: box of the whole unit, not clipped to the canvas. `window`: box of `maps`, in the same pixels. `chunk`: side
    of a chunk. FileNotFoundError if there is no such shard, SlideError if it is damaged.
    """
    planes, rows, columns = len(maps), at.height // chunk, at.width // chunk
    wanted = at.intersect(window)
    try:
        with path.open("rb") as shard:
            shard.seek(-(planes * rows * columns * _ENTRY + _CRC), os.SEEK_END)
            listed = shard.read()
            if google_crc32c.value(listed[:-_CRC]) != int.from_bytes(listed[-_CRC:], "little"):
                raise ValueError("the checksum of its index does not match")
            index = np.frombuffer(listed[:-_CRC], "<u8").reshape(planes, rows, columns, 2)
            pixels = np.empty((chunk, chunk), np.uint8)
            for plane, row, column in np.argwhere(index[..., 0] != _ABSENT).tolist():
                x0, y0 = at.x0 + column * chunk, at.y0 + row * chunk
                box = Box(x0, y0, x0 + chunk, y0 + chunk)
                part = box.intersect(wanted)
                if part.empty:
                    continue
                offset, length = index[plane, row, column].tolist()
                shard.seek(offset)
                _ZSTD.decode(shard.read(length), pixels)
                maps[plane][part.slices_in(window)] = pixels[part.slices_in(box)]
    except (ValueError, RuntimeError) as error:
        raise SlideError(
            f"{path}: this part of the stored predictions is damaged ({error}); repeat the segment command of its run, "
            "which predicts it again"
        ) from error
