"""Read the stored pixels of one level, without resampling, through tiatoolbox's readers.

tiatoolbox's own read calls resample, and their result depends on the requested block. So each source below takes the
reader that tiatoolbox builds for the format and asks the library's handle inside it for whole pixels of one level.
Importing tiatoolbox imports torch, so only `open_source` does it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from hover_batch.geometry import Box, Size
from hover_batch.slide.dicom import quiet_wsidicom
from hover_batch.slide.formats import bands, close_openslide, open_picture
from hover_batch.slide.headers import Kind
from hover_batch.slide.tiff_checks import is_alpha
from hover_batch.tiatoolbox_import import importing_tiatoolbox

_LATTICE = 1024
"""Side in pixels of the blocks in which levels with a fractional downsample are read."""
_TIFF_CACHE_BYTES = 1 << 26
"""Size in bytes of the cache of decoded chunks of an OME-TIFF."""


def open_source(path: Path, kind: Kind) -> Source:
    """Open the slide at `path` with the library for its kind; the caller closes it.

    A picture is decoded into memory as a whole. For the other kinds, only headers are read, and the first call imports
    tiatoolbox, which takes some seconds. While a DICOM slide is opened, Python warnings are suppressed in the whole
    process.

    `kind`: result of `kind_of`.

    SlideError if a picture is not supported (see `open_picture`). Errors of the libraries propagate.
    """
    if kind == "picture":
        return PictureSource(path)
    with importing_tiatoolbox():
        from tiatoolbox.wsicore import wsireader as readers
    if kind == "openslide":
        return OpenSlideSource(readers.OpenSlideWSIReader(path, post_proc=None))
    if kind == "ome-tiff":
        return TiffSource(readers.TIFFWSIReader(path, post_proc=None, cache_size=_TIFF_CACHE_BYTES))
    with quiet_wsidicom():
        return DicomSource(readers.DICOMWSIReader(path, post_proc=None))


class OpenSlideSource:
    """Source for all formats that OpenSlide opens: SVS, NDPI, MRXS, SCN, BIF, pyramidal TIFF …

    `reader`: tiatoolbox's OpenSlideWSIReader.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self._slide = reader.openslide_wsi
        self.levels = tuple(Size(w, h) for w, h in self._slide.level_dimensions)

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """Return the pixels of a box of a level as RGB (y, x, 3) uint8; transparent parts are white.

        In a level whose downsample is not a whole number, pixels may be shifted by up to half a level-0 pixel.

        `level`: index in `levels`. `box`: in pixels of that level; it must lie inside the level.

        Errors of OpenSlide propagate.
        """
        downsample = float(self._slide.level_downsamples[level])
        if downsample.is_integer():
            return self._read(level, box, int(downsample))
        # OpenSlide takes level-0 positions and interpolates between two pixels of the level, so that pixels would
        # depend on the caller's box. Such a level is therefore always read in the same blocks, each shifted by at most
        # half a level-0 pixel.
        out = np.empty((*box.shape, 3), np.uint8)
        for column, row in box.cells(_LATTICE):
            left, top = column * _LATTICE, row * _LATTICE
            size = self.levels[level]
            block = Box(left, top, min(left + _LATTICE, size.width), min(top + _LATTICE, size.height))
            wanted = block.intersect(box)
            out[wanted.slices_in(box)] = self._read(level, block, downsample)[wanted.slices_in(block)]
        return out

    def _read(self, level: int, box: Box, downsample: float) -> NDArray[np.uint8]:
        corner = (round(box.x0 * downsample), round(box.y0 * downsample))
        return _on_white(self._slide.read_region(corner, level, (box.width, box.height)))

    def close(self) -> None:
        """Close the OpenSlide handle. Nothing can be read afterwards."""
        close_openslide(self._slide)


class TiffSource:
    """Source for OME-TIFF, through tifffile. `reader`: tiatoolbox's TIFFWSIReader."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self._arrays = list(reader.level_arrays.values())
        self.levels = tuple(Size(array.shape[1], array.shape[0]) for array in self._arrays)

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """Return the pixels of a box of a level as RGB (y, x, 3) uint8.

        `level`: index in `levels`. `box`: in pixels of that level; it must lie inside the level.

        Errors of tifffile propagate.
        """
        pixels: NDArray[np.uint8] = self._arrays[level][box.y0 : box.y1, box.x0 : box.x1]
        return np.ascontiguousarray(pixels)

    def close(self) -> None:
        """Close the TIFF file and its Zarr store. Nothing can be read afterwards."""
        self.reader._zarr_store.close()
        self.reader.tiff.close()


class DicomSource:
    """Source for a folder of DICOM instances, through wsidicom. `reader`: tiatoolbox's DICOMWSIReader."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self._wsi = reader.wsi
        self._numbers = [level.level for level in self._wsi.levels]
        self.levels = tuple(Size(level.size.width, level.size.height) for level in self._wsi.levels)

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """Return the pixels of a box of a level as RGB (y, x, 3) uint8; transparent parts are white.

        `level`: index in `levels`. `box`: in pixels of that level; it must lie inside the level.

        Errors of wsidicom propagate.
        """
        # wsidicom counts positions in pixels of the level, unlike OpenSlide.
        return _on_white(self._wsi.read_region((box.x0, box.y0), self._numbers[level], (box.width, box.height)))

    def close(self) -> None:
        """Close the files of the DICOM slide. Nothing can be read afterwards."""
        self._wsi.close()


class PictureSource:
    """Source for a PNG, JPEG or plain TIFF at `path`, decoded into memory, with one level.

    Transparent parts become white.

    SlideError if the picture is not supported (see `open_picture`). Errors of Pillow propagate.
    """

    def __init__(self, path: Path) -> None:
        with open_picture(path) as picture:
            transparent = picture.mode in ("LA", "RGBA") or "transparency" in picture.info
            if isinstance(picture, TiffImagePlugin.TiffImageFile):
                transparent &= is_alpha(picture.tag_v2.get(TiffImagePlugin.EXTRASAMPLES, ()))
            self._pixels = np.empty((picture.height, picture.width, 3), np.uint8)
            for rows, pixels in bands(picture, "RGBA" if transparent else "RGB"):
                self._pixels[rows] = _on_white(pixels)
        self.levels = (Size(self._pixels.shape[1], self._pixels.shape[0]),)

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """Return the pixels of a box as RGB (y, x, 3) uint8, a view of the picture in memory.

        `level`: ignored, because a picture has one level. `box`: in pixels; it must lie inside the picture.
        """
        return self._pixels[box.y0 : box.y1, box.x0 : box.x1]

    def close(self) -> None:
        """Free the memory of the picture. Nothing can be read afterwards."""
        self._pixels = np.empty((0, 0, 3), np.uint8)


Source = OpenSlideSource | TiffSource | DicomSource | PictureSource
"""Open slide that reads pixels of its levels unchanged, without resampling. `levels`: their sizes, largest first."""

_OPAQUE = 0xFF000000
"""Least value of an opaque RGBA pixel as one little-endian number, whose highest byte is A."""


def _on_white(picture: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return RGB (h, w, 3), laid on white where the picture is transparent."""
    pixels = np.asarray(picture)
    if pixels.shape[2] == 3:
        return pixels
    colour = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), np.uint8)
    if pixels.view("<u4").min() < _OPAQUE:
        alpha = pixels[..., 3]
        clear = alpha < 255
        weight = alpha[clear, None].astype(np.uint32)
        colour[clear] = (colour[clear] * weight + 255 * (255 - weight) + 127) // 255
    return colour
