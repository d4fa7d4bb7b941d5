"""Real H&E without a download: the field that ships inside tiatoolbox, written as slides."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from hover_batch.errors import HoverBatchError

EXAMPLE_MPP = 0.25
"""The field was scanned at 40×."""

_TILE = 256
_SMALLEST_LEVEL = 256


def write_example(folder: Path) -> Path:
    """Write two example slides and cohort.csv, which lists them. Return the path of cohort.csv.

    The slides, he_0.25.tif and he_0.5.tif, are pyramidal RGB TIFFs of the same H&E field, with 0.25 and 0.5 µm per
    pixel. Files with the same content are left untouched, so that a second run finds nothing changed; others are
    replaced.

    `folder`: folder of the files, created if it does not exist.

    HoverBatchError if tiatoolbox, which contains the picture, is not installed; OSError if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    field = _field()
    _write(folder / "he_0.25.tif", _pyramidal_tiff(field, EXAMPLE_MPP))
    _write(folder / "he_0.5.tif", _pyramidal_tiff(_halve(field), 2 * EXAMPLE_MPP))
    cohort = folder / "cohort.csv"
    rows = ["path,slide_id,group", "he_0.25.tif,he_0.25,40x", "he_0.5.tif,he_0.5,20x"]
    _write(cohort, ("\n".join(rows) + "\n").encode())
    return cohort


def write_pyramidal_tiff(path: Path, array: NDArray[np.uint8], mpp: float) -> None:
    """Write a lossless tiled TIFF with a pyramid of levels, each half the size of the previous one.

    A further level is added while both of its sides have at least 256 pixels. OpenSlide opens the file as generic-tiff.
    An existing file is replaced, unless it has the same content.

    `path`: path of the file, whose folder must exist. `array`: (y, x, 3) uint8 RGB. `mpp`: pixel size of `array` in µm,
    stored in the resolution tags.

    OSError if the file cannot be written.
    """
    _write(path, _pyramidal_tiff(array, mpp))


def _field() -> NDArray[np.uint8]:
    """Return tiatoolbox's example field, (1000, 1000, 3) uint8 RGB, without importing tiatoolbox and torch."""
    package = importlib.util.find_spec("tiatoolbox")
    if package is None or not package.submodule_search_locations:
        raise HoverBatchError("the example needs tiatoolbox, which is not installed; reinstall hover-batch")
    path = Path(package.submodule_search_locations[0]) / "data" / "target_image.png"
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), np.uint8)


def _halve(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the means of 2 × 2 pixels; an odd last row or column is left out."""
    height, width = array.shape[0] // 2, array.shape[1] // 2
    blocks = array[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3)
    halved: NDArray[np.uint8] = ((blocks.sum(axis=(1, 3), dtype=np.uint16) + 2) // 4).astype(np.uint8)
    return halved


def _pyramidal_tiff(array: NDArray[np.uint8], mpp: float) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as tiff:
        level, level_mpp = array, mpp
        while True:
            tiff.write(
                level,
                tile=(_TILE, _TILE),
                photometric="rgb",
                compression="adobe_deflate",
                subfiletype=0 if level is array else 1,  # 1: a reduced copy, by which OpenSlide knows a level
                resolution=(1e4 / level_mpp, 1e4 / level_mpp),
                resolutionunit="CENTIMETER",
                metadata=None,
                software=False,
            )
            if min(level.shape[:2]) // 2 < _SMALLEST_LEVEL:
                break
            level, level_mpp = _halve(level), 2 * level_mpp
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    if path.is_file() and path.read_bytes() == content:
        return
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)
