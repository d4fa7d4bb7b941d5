"""Slide headers as each library reads them: OpenSlide, tifffile, wsidicom, Pillow.

The libraries that tiatoolbox's readers use are called directly, since importing tiatoolbox imports torch.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from hover_batch.errors import SlideError
from hover_batch.geometry import Box, Mpp, Size
from hover_batch.slide.dicom import open_dicom
from hover_batch.slide.pixel_size import MPP_TOLERANCE, StatedSize, disagreement, stated_size, tiff_size, to_float
from hover_batch.slide.tiff_checks import (
    ORIENTATION,
    check_for_openslide,
    check_for_pillow,
    check_ome,
    first_page,
    open_tiff,
    orientation_error,
)

if TYPE_CHECKING:
    import openslide

MAX_PICTURE_PIXELS = 400_000_000
"""Largest plain picture that is opened, since it is held in memory as a whole."""
PICTURE_BYTES = (3, 7)
"""Memory per pixel of a plain picture in bytes: while it is open, and at most while it is decoded."""
_BAND_ROWS = 256


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
    warnings: tuple[str, ...] = ()
    """Sentences for the user."""


def openslide_header(path: Path) -> Header:
    """Return the header of the file at `path`, which OpenSlide opens.

    The pixel size is the one that OpenSlide reports. If it reports none and opens the file as generic-tiff, the size in
    the resolution tags is used. An Aperio slide that is smaller than its header says, with the same aspect ratio, gets
    a warning, because it was probably reduced after the scan.

    SlideError if the file is a TIFF that OpenSlide would read wrongly or not at all, for example because it is
    truncated (see `check_for_openslide`). Errors of OpenSlide and tifffile propagate.
    """
    import openslide

    generic = openslide.OpenSlide.detect_format(str(path)) == "generic-tiff"
    size_in_tags = StatedSize(None)
    if (tiff := open_tiff(path)) is not None:
        with tiff:
            # Before OpenSlide opens the file, since its libtiff writes to stderr.
            check_for_openslide(path, tiff, generic=generic)
            # OpenSlide reads the tags of a generic TIFF only if their unit is the centimetre.
            if generic:
                size_in_tags = tiff_size(first_page(tiff))
    slide = openslide.OpenSlide(str(path))
    try:
        properties: Mapping[str, str] = dict(slide.properties)
        levels = tuple(Size(w, h) for w, h in slide.level_dimensions)
    finally:
        close_openslide(slide)
    vendor = properties.get("openslide.vendor", "unknown")
    stated_bounds = [properties.get(f"openslide.bounds-{name}") for name in ("x", "y", "width", "height")]
    bounds = None
    if None not in stated_bounds:
        x, y, width, height = (int(str(value)) for value in stated_bounds)
        bounds = Box(x, y, x + width, y + height)
    # OpenSlide gives no mpp if it cannot parse Aperio's; that text is then used in the message.
    aperio_mpp = properties.get("aperio.MPP")
    mpp_x, mpp_y = (properties.get(f"openslide.mpp-{axis}", aperio_mpp) for axis in "xy")
    size = stated_size(mpp_x, mpp_y, "its header")
    if size.mpp is None and generic:
        size = size_in_tags
    power = to_float(properties.get("openslide.objective-power"))
    return Header(levels, size, bounds, vendor, power, _warnings_of_aperio(properties, levels[0]))


def close_openslide(slide: openslide.OpenSlide) -> None:
    """Close a handle of OpenSlide in another thread, where Ctrl-C cannot interrupt it.

    openslide-python marks a handle as closed only after the library has freed it. An interruption in between would let
    it free the handle twice, which crashes the process. KeyboardInterrupt may be raised while this thread waits.
    """
    closed = threading.Event()

    def close() -> None:
        try:
            slide.close()
        finally:
            closed.set()

    threading.Thread(target=close, name="close").start()
    closed.wait()  # an interrupted Thread.join may take the running thread for finished


def _warnings_of_aperio(properties: Mapping[str, str], level0: Size) -> tuple[str, ...]:
    """Return a warning if the slide is smaller than Aperio's header says, with the same aspect ratio.

    Programs such as vips keep the header when they reduce a slide, so that its pixel size is wrong. The header gives
    the size of level 0 as "[left,top widthxheight]".
    """
    found = re.search(r"\[\d+,\d+ (\d+)x(\d+)\]", properties.get("openslide.comment", ""))
    if properties.get("openslide.vendor") != "aperio" or found is None:
        return ()
    width, height = int(found[1]), int(found[2])
    across, down = width / level0.width, height / level0.height
    if across < 1 + MPP_TOLERANCE or abs(across / down - 1) > MPP_TOLERANCE:  # a cropped slide keeps its pixel size
        return ()
    return (
        f"has {level0.width} × {level0.height} pixels, but its header describes a picture of {width} × {height}; if it "
        "was reduced after the scan, give its pixel size in the column mpp",
    )


def is_ome(path: Path) -> bool:
    """Return whether the file at `path` is an OME-TIFF; False for files of other formats.

    SlideError if it is a TIFF without the directory that describes its pixels, because it is truncated. OSError if it
    cannot be read.
    """
    tiff = open_tiff(path)
    if tiff is None:
        return False
    with tiff:
        return bool(tiff.is_ome)


def ome_tiff_header(path: Path) -> Header:
    """Return the header of the OME-TIFF at `path`, which describes the largest of its images.

    The pixel size comes from the OME-XML, or from the resolution tags if the XML has none. If the XML gives several
    pixel sizes for images of this size, the header has none, and gives the reason. Separate channels without names
    count as red, green and blue, with a warning.

    SlideError if the largest image is in another file, is not one complete plane of 8-bit RGB, has other axes than the
    first image, or has separate channels with names other than Red, Green, Blue (or R, G, B) in this order, or if
    another image in the file has more than half of its pixels. Errors of tifffile and the XML parser propagate.
    """
    with tifffile.TiffFile(path) as tiff:
        series = list(tiff.series)
        largest = max(series, key=lambda image: _plane(image.axes, image.shape).pixels)
        if (holder := largest.keyframe.parent) is not tiff:
            raise SlideError(
                f"{path}: is one of several files of an OME-TIFF, and the largest picture is in "
                f"{holder.filehandle.name}, which would be read instead; move this file to a folder of its own"
            )
        if series[0].axes != largest.axes:  # tiatoolbox reads all images along the axes of the first
            raise SlideError(
                f"{path}: an OME-TIFF whose first picture has the axes {series[0].axes} and the largest "
                f"{largest.axes}; save the largest as a file of its own"
            )
        check_ome(path, [image for image in series if image.keyframe.parent is tiff], largest)
        levels = sorted((_plane(level.axes, level.shape) for level in largest.levels), key=lambda s: -s.pixels)
        xml = ElementTree.fromstring(tiff.ome_metadata or "<OME/>")
        size_in_tags = tiff_size(first_page(tiff))
    # By its size, since the XML may describe images in other files, which tifffile leaves out if they are missing.
    extent = {"SizeX": str(levels[0].width), "SizeY": str(levels[0].height)}
    images = [e for e in _elements(xml, "Image") if any(extent.items() <= p.items() for p in _attributes(e, "Pixels"))]
    sizes = {_ome_size(pixels) for image in images for pixels in _attributes(image, "Pixels")} or {StatedSize(None)}
    if len(sizes) > 1:
        size = StatedSize(None, "its OME header gives several pixel sizes for pictures of this size")
    elif (size := sizes.pop()) == StatedSize(None):
        size = size_in_tags
    channels = _attributes(images[0], "Channel") if images and "C" in largest.axes else []
    names = [channel.get("Name", "") for channel in channels]
    powers = {objective.get("ID"): objective.get("NominalMagnification") for objective in _attributes(xml, "Objective")}
    used = [settings.get("ID") for image in images for settings in _attributes(image, "ObjectiveSettings")]
    power = to_float(powers.get(next(iter(used or powers), None)))
    warnings = disagreement(size, size_in_tags, ("its OME header", "its resolution tag"))
    return Header(tuple(levels), size, None, "ome-tiff", power, (*warnings, *_warnings_of_channels(path, names)))


def _elements(xml: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    """Return the elements of this name in the OME-XML below `xml`, in any namespace."""
    return [element for element in xml.iter() if element.tag.endswith(f"}}{name}")]


def _attributes(xml: ElementTree.Element, name: str) -> list[dict[str, str]]:
    return [element.attrib for element in _elements(xml, name)]


def _warnings_of_channels(path: Path, names: list[str]) -> tuple[str, ...]:
    """Return a warning if separate channels have no names. SlideError if they are not red, green and blue.

    `names`: of the channels in the file's order, "" for unnamed ones; empty if the file has no separate channels.
    """
    if [name.strip().lower() for name in names] in ([], ["red", "green", "blue"], ["r", "g", "b"]):
        return ()
    if any(names):
        raise SlideError(
            f"{path}: an OME-TIFF of separate channels {', '.join(names)}; Red, Green, Blue in this order are needed: "
            "save it as RGB"
        )
    return ("its three separate channels have no names, and are taken for red, green and blue in this order",)


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
    """Return the header of the slide in the DICOM folder `path`.

    The pixel size is the pixel spacing of the largest level. While the folder is read, Python warnings are suppressed
    in the whole process (see `quiet_wsidicom`).

    InputError if the folder holds several slides. SlideError if it holds no DICOM file, a file cannot be read as DICOM,
    the instances have no pixel spacing, or the pixels are not RGB with 8 bits per channel. Other errors of wsidicom
    propagate.
    """
    with open_dicom(path) as wsi:
        levels = tuple(Size(level.size.width, level.size.height) for level in wsi.levels)
        dataset = wsi.levels.base_level.datasets[0]
        if (dataset.SamplesPerPixel, dataset.BitsAllocated) != (3, 8):
            raise SlideError(
                f"{path}: pixels of {dataset.SamplesPerPixel} × {dataset.BitsAllocated} bits; 8-bit colour is needed"
            )
        spacing = dataset.pixel_spacing  # millimetres
        optics = getattr(dataset, "OpticalPathSequence", None)
        power = getattr(optics[0], "ObjectiveLensPower", None) if optics else None
        vendor = str(getattr(dataset, "Manufacturer", "") or "dicom")
    size = stated_size(spacing.width * 1e3, spacing.height * 1e3, "its pixel spacing")
    return Header(levels, size, None, vendor, to_float(power))


def picture_header(path: Path) -> Header:
    """Return the header of the plain picture (PNG, JPEG or TIFF) at `path`, which has one level.

    The pixel size of a TIFF comes from its resolution tags. The resolution of a PNG or JPEG is not used, since most
    programs write any value; `size.unusable` of the header says so.

    SlideError if the picture is not supported (see `open_picture`), OSError if it cannot be read.
    """
    with open_picture(path) as picture:
        size = StatedSize(None)
        if picture.format != "TIFF" and (dpi := picture.info.get("dpi")) and min(dpi) > 0:
            x, y = (25_400 / float(value) for value in dpi)
            found = f"its resolution says {x:.4g} × {y:.4g} µm a pixel"
            size = StatedSize(None, f"{found}, which is ignored in PNG and JPEG: most programs write any value")
        extent = Size(*picture.size)
    if (tiff := open_tiff(path)) is not None:
        with tiff:
            size = tiff_size(first_page(tiff))
    return Header((extent,), size, None, "picture", None)


def open_picture(path: Path) -> Image.Image:
    """Open the PNG, JPEG or TIFF picture at `path` without decoding its pixels; the caller closes it.

    The picture's mode is 1 (bilevel), L, LA, P, RGB, RGBA, CMYK or YCbCr. Pillow's warnings about corrupted EXIF data
    are suppressed.

    SlideError if the file has another format or mode, 16 bits per channel, more than MAX_PICTURE_PIXELS pixels, an
    orientation tag by which programs turn or flip the picture, or a TIFF structure that Pillow would read wrongly or
    not at all, for example because the file is truncated (see `check_for_pillow`). OSError if the file cannot be read.
    """
    if (tiff := open_tiff(path)) is not None:
        with tiff:
            check_for_pillow(path, tiff)
    picture = _with_plugin(path)
    width, height = picture.size
    orientation = exif_orientation(picture)
    fault = None
    if width * height > MAX_PICTURE_PIXELS:
        fault = SlideError(
            f"{path}: a plain picture of {width} × {height} pixels would have to be held in memory as a whole; "
            "convert it to a pyramidal tiled TIFF"
        )
    elif is_16_bit(picture) or picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        kind = "16 bits a channel" if is_16_bit(picture) else f"type {picture.mode}"
        fault = SlideError(f"{path}: pixels of {kind}; 8-bit grey or colour is needed")
    elif orientation != 1:
        fault = orientation_error(path, orientation)
    if fault:
        picture.close()
        raise fault
    return picture


def _with_plugin(path: Path) -> ImageFile.ImageFile:
    """Open a picture with the plugin for its format. SlideError if there is none."""
    # The plugins are called by name: Image.open warns of sizes that are ordinary here, and refuses some.
    for plugin in (PngImagePlugin.PngImageFile, JpegImagePlugin.JpegImageFile, TiffImagePlugin.TiffImageFile):
        with suppress(SyntaxError), _quiet():  # raised by Pillow's plugins for files of another format
            picture: ImageFile.ImageFile = plugin(path)
            return picture
    raise SlideError(
        f"{path}: cannot be read: OpenSlide, tifffile and Pillow do not support its format; convert it to an OME-TIFF "
        "with 8-bit RGB pixels, for example with QuPath or bfconvert"
    )


def is_16_bit(picture: ImageFile.ImageFile) -> bool:
    """Return whether a picture has 16 bits per channel.

    Pillow opens 16-bit colour as 8-bit and keeps only the high byte, which makes 12-bit pictures black.
    """
    return any(";16" in str(tile) for tile in picture.tile)


def exif_orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation of `picture`, 2 to 8, by which programs turn or flip it.

    1 means that it is upright, or that no valid orientation can be read. The pixels are not decoded, and Pillow's
    warnings about corrupted EXIF data are suppressed.
    """
    if "exif" not in picture.info:  # getexif would decode a PNG to search for it
        return 1
    with suppress(SyntaxError), _quiet():
        value = picture.getexif().get(ORIENTATION)
        return value if isinstance(value, int) and 2 <= value <= 8 else 1
    return 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore Pillow's warnings about corrupted EXIF data, which is not used for anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def bands(picture: Image.Image, mode: str | None = None) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    """Yield the rows (a slice) and the pixels of each horizontal band of a picture, from top to bottom.

    Pixels are uint8, (y, x) or (y, x, channel); in mode 1, they are bool (y, x). The first band decodes the whole
    picture into memory. Only the conversion is made band by band, since converting all of it would need several copies.

    `picture`: open picture. `mode`: Pillow mode, such as RGB, to which each band is converted; None to keep the
    picture's.

    Errors of Pillow propagate.
    """
    for top in range(0, picture.height, _BAND_ROWS):
        bottom = min(top + _BAND_ROWS, picture.height)
        band = picture.crop((0, top, picture.width, bottom))
        yield slice(top, bottom), np.asarray(band if mode in (None, band.mode) else band.convert(mode))
