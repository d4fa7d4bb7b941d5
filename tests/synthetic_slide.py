"""Slides of any size that look like H&E, written tile by tile, for tests and to measure memory.

python -m tests.synthetic_slide PATH [SIDE]
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

TILE = 256
PATTERN = 2048
"""Side in level-0 pixels of the piece of tissue that is repeated."""


def write_synthetic_slide(
    path: Path,
    size: tuple[int, int] = (4096, 4096),
    mpp: float = 0.25,
    tissue_fraction: float = 0.25,
    seed: int = 0,
    levels: int = 4,
) -> NDArray[np.float64]:
    """Write a pyramidal tiled JPEG TIFF: one rectangle of tissue in the middle of a white canvas.

    `size`: (width, height) in level-0 pixels; `mpp` in µm; `tissue_fraction`: share of the canvas. Levels halve,
    rounding down, and show the same nuclei. Returns the nuclei's centres (n, 2) as (x, y) in level-0 pixels.
    Memory does not grow with the size.
    """
    width, height = size
    align = 2 ** (levels - 1)
    share = math.sqrt(tissue_fraction)
    x0, y0 = (int(extent * (1 - share) / 2) // align * align for extent in size)
    x1 = x0 + round(width * share / align) * align
    y1 = y0 + round(height * share / align) * align
    pattern, centres = _pattern(mpp, seed)
    with tifffile.TiffWriter(path, bigtiff=width * height > 2**32) as tiff:
        for level in range(levels):
            step = 2**level
            shape = (max(1, height // step), max(1, width // step), 3)
            resolution = 1e4 / (mpp * step)
            tiff.write(
                _tiles(pattern, shape, (x0 // step, y0 // step, x1 // step, y1 // step)),
                shape=shape,
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="ycbcr",
                subsampling=(1, 1),
                compression="jpeg",
                subfiletype=1 if level else 0,
                resolution=(resolution, resolution),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
            pattern = np.asarray(cv2.resize(pattern, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), np.uint8)
    repeats = [
        centres + (x0 + column * PATTERN, y0 + row * PATTERN)
        for row in range(-(-(y1 - y0) // PATTERN))
        for column in range(-(-(x1 - x0) // PATTERN))
    ]
    everywhere = np.concatenate(repeats) if repeats else np.empty((0, 2))
    inside: NDArray[np.float64] = everywhere[(everywhere < (x1, y1)).all(axis=1)]
    return inside


def _tiles(
    pattern: NDArray[np.uint8], shape: tuple[int, int, int], tissue: tuple[int, int, int, int]
) -> Iterator[bytes]:
    """Encoded tiles in raster order. Those that show the same are encoded once."""
    period = pattern.shape[0]
    x0, y0, x1, y1 = tissue
    encoded: dict[tuple[int, ...], bytes] = {}
    for top in range(0, shape[0], TILE):
        for left in range(0, shape[1], TILE):
            columns = np.arange(max(left, x0), min(left + TILE, x1))
            rows = np.arange(max(top, y0), min(top + TILE, y1))
            if columns.size == 0 or rows.size == 0:
                key: tuple[int, ...] = ()
            else:
                phase = ((int(columns[0]) - x0) % period, (int(rows[0]) - y0) % period)
                key = (int(columns[0]) - left, int(rows[0]) - top, columns.size, rows.size, *phase)
            if key not in encoded:
                tile = np.full((TILE, TILE, 3), 255, np.uint8)
                if key:
                    piece = pattern[((rows - y0) % period)[:, None], (columns - x0) % period]
                    tile[rows[0] - top : rows[-1] + 1 - top, columns[0] - left : columns[-1] + 1 - left] = piece
                encoded[key] = _jpeg(tile)
            yield encoded[key]


def _jpeg(tile: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=85, subsampling=0)
    return buffer.getvalue()


def _pattern(mpp: float, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """One period of tissue, RGB, and its nuclei's centres (x, y). The borders fit together."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 1, (32, 32)).astype(np.float32)
    # Three by three and the middle one cut out, so that the borders fit.
    clouds = cv2.resize(np.tile(coarse, (3, 3)), (3 * PATTERN, 3 * PATTERN), interpolation=cv2.INTER_CUBIC)
    clouds = clouds[PATTERN : 2 * PATTERN, PATTERN : 2 * PATTERN, None]
    grain = rng.normal(0, 4, (PATTERN, PATTERN, 1)).astype(np.float32)
    picture = np.array([226, 168, 198], np.float32) + clouds * np.array([8, 14, 9], np.float32) + grain
    spacing = round(14 / mpp)
    cells = PATTERN // spacing
    pitch = PATTERN / cells
    rows, columns = np.divmod(np.flatnonzero(rng.random(cells * cells) < 0.7), cells)
    jitter = rng.uniform(-0.15, 0.15, (rows.size, 2))
    centres = (np.stack([columns, rows], axis=1) + 0.5 + jitter) * pitch
    axes = rng.uniform(3.2, 4.8, (rows.size, 2)) / mpp  # half axes of nuclei of about 8 µm
    angles = rng.uniform(0, 180, rows.size)
    shade = rng.normal(0, 8, (rows.size, 1)) + np.array([92, 62, 138])
    alpha = np.zeros((PATTERN, PATTERN), np.uint8)
    colour = np.zeros((PATTERN, PATTERN, 3), np.uint8)
    for centre, half, angle, rgb in zip(centres, axes, angles, shade, strict=True):
        at = tuple(int(v) for v in np.rint((centre - 0.5) * 16))
        half_axes = tuple(int(v) for v in np.rint(half * 16))
        cv2.ellipse(alpha, at, half_axes, angle, 0, 360, (255,), -1, cv2.LINE_AA, 4)
        wider = tuple(v + 32 for v in half_axes)  # so that the smooth edge is of the nucleus's colour
        cv2.ellipse(colour, at, wider, angle, 0, 360, np.clip(rgb, 0, 255).tolist(), -1, cv2.LINE_8, 4)
    cover = alpha[..., None].astype(np.float32) / 255
    picture = picture * (1 - cover) + (colour + grain) * cover
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), centres


if __name__ == "__main__":
    side = int(sys.argv[2]) if len(sys.argv) > 2 else 4096
    nuclei = write_synthetic_slide(Path(sys.argv[1]), (side, side))
    print(f"{sys.argv[1]}: {side} × {side} pixels, {len(nuclei)} nuclei")
