"""Slide headers as each library reads them: OpenSlide, tifffile, wsidicom, Pillow.

The libraries that tiatoolbox's readers use are called directly, since importing tiatoolbox imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from hover_batch.errors import SlideError
from hover_batch.geometry import Box, Mpp, Size
from hover_batch.slide.dicom import open_dicom
from hover_batch.slide.pixel_size import StatedSize, stated_size, tiff_size, to_float

MAX_PICTURE_PIXELS = 400_000_000
"""Largest plain picture that is opened, since it is held in memory as a whole."""
PICTURE_BYTES = (3, 7)
"""Memory per pixel of a plain picture in bytes: while it is open, and at most while it is decoded."""
_BAND_ROWS = 256

_UNSIGNED = (1, 4)
"""SampleFormat of unsigned integers, and of values that the writer did not define."""


@dataclass(frozen=True)
class Header:
    """Header of a slide, as read by the library that opens it."""

    levels: tuple[Size, ...]
    """Sizes of the levels in pixels, largest first."""
    size: StatedSize
    """Pixel size that the file gives."""
    bounds: Box | None
    """Non-empty region in level-0 pixels; None if the format has none."""
    vendor: str
    """Format or manufacturer, as the library names it."""
    magnification: float | None
    """Objective's power; None if unknown."""


def openslide_header(path: Path) -> Header:
    """Return the header of a file that OpenSlide opens.

    SlideError if it is a TIFF whose pixels are not unsigned 8-bit, or are turned by an Orientation tag. Errors of
    OpenSlide propagate.
    """
    import openslide

    with openslide.OpenSlide(str(path)) as slide:
        properties: Mapping[str, str] = dict(slide.properties)
        levels = tuple(Size(w, h) for w, h in slide.level_dimensions)
    vendor = properties.get("openslide.vendor", "unknown")
    corner = [properties.get(f"openslide.bounds-{name}") for name in ("x", "y", "width", "height")]
    bounds = None
    if None not in corner:
        x, y, width, height = (int(str(value)) for value in corner)
        bounds = Box(x, y, x + width, y + height)
    raw = properties.get("aperio.MPP")  # kept as text if OpenSlide cannot parse it
    size = stated_size(properties.get("openslide.mpp-x", raw), properties.get("openslide.mpp-y", raw), "its header")
    if (tiff := _open_tiff(path)) is not None:
        with tiff:
            _check_pages(path, tiff)
            # OpenSlide reads the tags of a generic TIFF only if their unit is the centimetre.
            if size.mpp is None and vendor == "generic-tiff":
                size = tiff_size(_first_page(tiff))
    return Header(levels, size, bounds, vendor, to_float(properties.get("openslide.objective-power")))


_ORIENTATION = 274
"""TIFF tag of how to turn or flip the stored pixels; 1 = not at all."""


def _open_tiff(path: Path) -> tifffile.TiffFile | None:
    try:
        return tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        return None


def _first_page(tiff: tifffile.TiffFile) -> tifffile.TiffPage:
    page = tiff.pages.first
    assert isinstance(page, tifffile.TiffPage)
    return page


def _check_pages(path: Path, tiff: tifffile.TiffFile) -> None:
    """Raise SlideError for samples of more than 8 bits, for signed and float ones, and for turned pages.

    OpenSlide and Pillow keep the high byte of 16 bits, which makes 12-bit pictures black, and read the others as
    unsigned. OpenSlide turns each tile of a turned page on its own, Pillow the whole page.
    """
    for number, page in enumerate(tiff.pages):
        assert isinstance(page, tifffile.TiffPage)
        if number and not page.is_tiled:  # a label or macro picture
            continue
        if page.bitspersample > 8 or page.sampleformat not in _UNSIGNED:
            kind = {2: "signed ", 3: "float "}.get(int(page.sampleformat), "")
            raise SlideError(
                f"{path}: pixels of {kind}{page.bitspersample} bits a channel; 8-bit grey or colour is needed: scale "
                "its values to 0 … 255 and save it again"
            )
        turned = page.tags.get(_ORIENTATION)
        if turned is not None and turned.value != 1:
            raise SlideError(
                f"{path}: the tag Orientation is {turned.value}, so that programs turn or flip the picture; save it "
                "upright, without this tag"
            )


def is_ome(path: Path) -> bool:
    """Return whether a file is an OME-TIFF; False for files of any other format. OSError if it cannot be read."""
    tiff = _open_tiff(path)
    if tiff is None:
        return False
    with tiff:
        return bool(tiff.is_ome)


def ome_tiff_header(path: Path) -> Header:
    """Return the header of an OME-TIFF: the levels of its largest image.

    The pixel size comes from the OME-XML, or from the resolution tags if the XML has none. SlideError unless the image
    is one plane of 8-bit RGB. Errors of tifffile propagate.
    """
    with tifffile.TiffFile(path) as tiff:
        series = list(tiff.series)
        index = max(range(len(series)), key=lambda i: _plane(series[i].axes, series[i].shape).pixels)
        largest = series[index]
        channels = dict(zip(largest.axes, largest.shape, strict=True))
        if len(largest.axes) != 3 or channels.get("S", channels.get("C")) != 3 or largest.dtype != "uint8":
            raise SlideError(
                f"{path}: an OME-TIFF of axes {largest.axes}, shape {largest.shape}, {largest.dtype}; "
                "one plane of 8-bit RGB is needed"
            )
        levels = sorted((_plane(level.axes, level.shape) for level in largest.levels), key=lambda s: -s.pixels)
        xml = ElementTree.fromstring(tiff.ome_metadata or "<OME/>")
        tags = tiff_size(_first_page(tiff))
    images = [element for element in xml.iter() if element.tag.endswith("}Image")]
    pixels: Mapping[str, str] = {}
    if index < len(images):
        found = [element for element in images[index].iter() if element.tag.endswith("}Pixels")]
        pixels = found[0].attrib if found else {}
    powers = [e.attrib.get("NominalMagnification") for e in xml.iter() if e.tag.endswith("}Objective")]
    size = _ome_size(pixels)
    if size == StatedSize(None):
        size = tags
    return Header(tuple(levels), size, None, "ome-tiff", to_float(powers[0]) if powers else None)


def _plane(axes: str, shape: tuple[int, ...]) -> Size:
    extent = dict(zip(axes, shape, strict=True))
    return Size(extent["X"], extent["Y"])


def _ome_size(pixels: Mapping[str, str]) -> StatedSize:
    sizes = []
    for axis in "XY":  # each has a unit of its own
        value, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        size = stated_size(value, value, "its OME header", {"um": "µm", "μm": "µm"}.get(unit, unit))
        if size.mpp is None:
            return size
        sizes.append(size.mpp.x)
    return StatedSize(Mpp(*sizes))


def dicom_header(path: Path) -> Header:
    """Return the header of the slide in a DICOM folder.

    SlideError if its pixels are not 8-bit. Errors of `open_dicom` propagate.
    """
    with open_dicom(path) as wsi:
        levels = tuple(Size(level.size.width, level.size.height) for level in wsi.levels)
        dataset = wsi.levels.base_level.datasets[0]
        if dataset.BitsAllocated != 8:
            raise SlideError(f"{path}: pixels of {dataset.BitsAllocated} bits a channel; 8-bit colour is needed")
        spacing = dataset.pixel_spacing  # millimetres
        optics = getattr(dataset, "OpticalPathSequence", None)
        power = getattr(optics[0], "ObjectiveLensPower", None) if optics else None
        vendor = str(getattr(dataset, "Manufacturer", "") or "dicom")
    size = stated_size(spacing.width * 1e3, spacing.height * 1e3, "its pixel spacing")
    return Header(levels, size, None, vendor, to_float(power))


def picture_header(path: Path) -> Header:
    """Return the header of a plain picture (PNG, JPEG or TIFF), which has one level.

    The pixel size is taken from TIFF tags only, not from the resolution of a PNG or JPEG. SlideError as in
    `open_picture`.
    """
    with open_picture(path) as picture:
        size = StatedSize(None)
        if picture.format != "TIFF" and (dpi := picture.info.get("dpi")) and min(dpi) > 0:
            x, y = (25_400 / float(value) for value in dpi)
            found = f"its resolution says {x:.4g} × {y:.4g} µm a pixel"
            size = StatedSize(None, f"{found}, which is ignored in PNG and JPEG: most programs write any value")
        extent = Size(*picture.size)
    if (tiff := _open_tiff(path)) is not None:
        with tiff:
            size = tiff_size(_first_page(tiff))
    return Header((extent,), size, None, "picture", None)


def open_picture(path: Path) -> Image.Image:
    """Open a PNG, JPEG or TIFF picture without decoding it; the caller closes it.

    SlideError if the format is unknown, the pixels are not 8-bit grey or colour, or there are more than
    MAX_PICTURE_PIXELS. OSError if the file cannot be read.
    """
    if (tiff := _open_tiff(path)) is not None:
        with tiff:
            _check_pages(path, tiff)
    # The plugins are called by name: Image.open warns of sizes that are ordinary here, and refuses some.
    for plugin in (PngImagePlugin.PngImageFile, JpegImagePlugin.JpegImageFile, TiffImagePlugin.TiffImageFile):
        try:
            picture: ImageFile.ImageFile = plugin(path)
        except SyntaxError:  # raised by Pillow's plugins for files of another format
            continue
        width, height = picture.size
        mode = picture.mode
        if width * height > MAX_PICTURE_PIXELS:
            picture.close()
            raise SlideError(
                f"{path}: a plain picture of {width} × {height} pixels would have to be held in memory as a whole; "
                "convert it to a pyramidal tiled TIFF"
            )
        # Pillow opens 16-bit colour as 8-bit and keeps only the high byte, which makes 12-bit pictures black.
        deep = any(";16" in str(tile) for tile in picture.tile)
        if deep or mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
            picture.close()
            kind = "16 bits a channel" if deep else f"type {mode}"
            raise SlideError(f"{path}: pixels of {kind}; 8-bit grey or colour is needed")
        return picture
    raise SlideError(
        f"{path}: cannot be read: OpenSlide, tifffile and Pillow do not support its format; convert it to an OME-TIFF "
        "with 8-bit RGB pixels, for example with QuPath or bfconvert"
    )


def bands(picture: Image.Image, mode: str | None = None) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    """Decode a picture in horizontal bands; yield (slice of rows, pixels) of each, from top to bottom.

    Pixels are (y, x) or (y, x, channels) uint8, but bool for Pillow's mode 1. They are converted to Pillow's `mode` if
    it is given. Converting the whole picture at once would hold several copies of it in memory. Errors of Pillow
    propagate.
    """
    for top in range(0, picture.height, _BAND_ROWS):
        bottom = min(top + _BAND_ROWS, picture.height)
        band = picture.crop((0, top, picture.width, bottom))
        yield slice(top, bottom), np.asarray(band if mode in (None, band.mode) else band.convert(mode))
