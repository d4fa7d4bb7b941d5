"""What a slide's header says: size, pixel size, levels; and which library opens it.

`plan` reads every header of a cohort, so nothing here imports torch, which tiatoolbox does: the same libraries that
tiatoolbox's readers stand on (openslide, tifffile, wsidicom) are asked directly. `reader.open_slide` takes its
SlideInfo from here too, so that a dry run and a run cannot disagree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import HoverBatchError, InputError, SlideError
from hover_batch.geometry import Box, Mpp, Size

Kind = Literal["openslide", "ome-tiff", "dicom", "picture"]
_SCANNERS = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide")
"""How files end that OpenSlide reads or nobody does."""

MAX_PICTURE_PIXELS = 400_000_000
"""A plain picture is held in memory whole: 1.2 GB at this size."""

PLAUSIBLE_MPP = (0.01, 20.0)
"""Pixel sizes in µm that a slide scanner can have written. Programs that know no pixel size write 72 dpi (353 µm)."""

MPP_TOLERANCE = 0.05
"""An override further than this from the file's own pixel size is worth a warning."""

_FINGERPRINT_BLOCK = 1 << 20


@dataclass(frozen=True)
class SlideInfo:
    """What is known of a slide before a pixel is read.

    `level0`: full canvas in pixels. `mpp`: µm per level-0 pixel, and whether the file or the cohort's row gave it.
    `bounds`: OpenSlide's non-empty region in level-0 pixels, None where the format has none. `downsamples`: of each
    level, mean of its `level_ratios`; the first is 1.0. `magnification`: objective power, None if unknown.
    `fingerprint`: see `fingerprint`. `warnings`: sentences for the user.
    """

    level0: Size
    mpp: Mpp
    mpp_source: Literal["file", "cohort"]
    bounds: Box | None
    downsamples: tuple[float, ...]
    vendor: str
    magnification: float | None
    fingerprint: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Header:
    """The file's own words. `levels`: sizes, largest first. `mpp` is None where the file has no plausible one."""

    levels: tuple[Size, ...]
    mpp: Mpp | None
    bounds: Box | None
    vendor: str
    magnification: float | None


def peek(record: SlideRecord) -> SlideInfo:
    """Read headers only. InputError where the pixel size is unknown, SlideError where the file cannot be read."""
    return describe(record, read_header(record.file, kind_of(record.file)))


def describe(record: SlideRecord, header: Header) -> SlideInfo:
    """Join the file's header with the cohort's row, which goes first where both give a pixel size."""
    if record.mpp is None and header.mpp is None:
        raise InputError(
            f"{record.path}: the file does not say its pixel size; give it in µm in the column mpp of the cohort "
            f"(row {record.row}, slide_id {record.slide_id})"
        )
    mpp = record.mpp or header.mpp
    assert mpp is not None
    warnings: list[str] = []
    if record.mpp is not None and header.mpp is not None:
        off = max(abs(record.mpp.x / header.mpp.x - 1), abs(record.mpp.y / header.mpp.y - 1))
        if off > MPP_TOLERANCE:
            warnings.append(
                f"{record.slide_id}: mpp {_text(record.mpp)} of the cohort is {off:.0%} off the file's "
                f"{_text(header.mpp)}; the cohort's is used"
            )
    with slide_errors(record.file):
        print_ = fingerprint(record.file, record.mpp)
    level0 = header.levels[0]
    return SlideInfo(
        level0=level0,
        mpp=mpp,
        mpp_source="cohort" if record.mpp is not None else "file",
        bounds=header.bounds,
        downsamples=tuple(sum(level_ratios(level0, size)) / 2 for size in header.levels),
        vendor=header.vendor,
        magnification=record.magnification if record.magnification is not None else header.magnification,
        fingerprint=print_,
        warnings=tuple(warnings),
    )


def level_ratios(level0: Size, level: Size) -> tuple[float, float]:
    """Level-0 pixels per pixel of a level, (x, y).

    A pyramid's extents are rounded: 32914 rows make 8228 at a quarter, and its pixels are 4 wide all the same, not
    4.0002. So a whole number that explains the extent to less than one of the level's pixels is taken for the truth;
    else the ratio of the extents is.
    """

    def ratio(full: int, reduced: int) -> float:
        whole = round(full / reduced)
        return float(whole) if abs(whole * reduced - full) < whole else full / reduced

    return ratio(level0.width, level.width), ratio(level0.height, level.height)


def kind_of(path: Path) -> Kind:
    """Which library reads this file or folder. SlideError where a scanner's file is none."""
    if path.is_dir():
        return "dicom"
    if not path.is_file():
        raise SlideError(f"{path}: no such file")
    import openslide

    with slide_errors(path):
        vendor = openslide.OpenSlide.detect_format(str(path))
        # OpenSlide takes any tiled TIFF for a generic one and then overlooks the levels that OME keeps in sub-IFDs.
        if vendor in (None, "generic-tiff") and _is_ome(path):
            return "ome-tiff"
    if vendor is None and path.suffix.lower() in _SCANNERS:
        # Some library may still find a picture in it, without its pixel size, and never say that the file is harmed.
        raise SlideError(f"{path}: cannot be read: OpenSlide does not know it as a slide; cut short, or damaged?")
    return "picture" if vendor is None else "openslide"


def read_header(path: Path, kind: Kind) -> Header:
    """The header as that library has it. SlideError with path and reason where it cannot be read."""
    readers = {"openslide": _openslide, "ome-tiff": _ome_tiff, "dicom": _dicom, "picture": _picture}
    with slide_errors(path):
        return readers[kind](path)


@contextmanager
def slide_errors(path: Path) -> Iterator[None]:
    """Turn what the decoding libraries raise into one SlideError line."""
    try:
        yield
    except HoverBatchError:
        raise
    except Exception as error:  # libraries raise what they like on broken files: struct.error, KeyError, zlib.error …
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SlideError(f"{path}: cannot be read: {reason}") from error


def fingerprint(path: Path, mpp: Mpp | None) -> str:
    """sha256 (hex) that names a slide's content wherever it lies: size, head, middle and tail (1 MiB each) of its
    files, and the pixel size that the cohort gives, if it does. Neither path nor host nor time enters."""

    def parts(file: Path) -> ReadParts:
        def read(ranges: list[tuple[int, int]]) -> Iterator[bytes]:
            with file.open("rb") as stream:
                for start, stop in ranges:
                    stream.seek(start)
                    yield stream.read(stop - start)

        return read

    return fingerprint_of(((file.stat().st_size, parts(file)) for file in _files(path)), mpp)


ReadParts = Callable[[list[tuple[int, int]]], Iterable[bytes]]
"""Ranges of a file, [start, stop) in bytes → their bytes."""


def fingerprint_of(files: Iterable[tuple[int, ReadParts]], mpp: Mpp | None) -> str:
    """`fingerprint` of files wherever they lie: the size of each in bytes, and how parts of it are read."""
    digest = hashlib.sha256()
    for size, read in files:
        digest.update(size.to_bytes(8, "little"))
        last = max(0, size - _FINGERPRINT_BLOCK)
        for part in read([(start, min(start + _FINGERPRINT_BLOCK, size)) for start in sorted({0, last // 2, last})]):
            digest.update(part)
    digest.update(f"mpp {mpp.x!r} {mpp.y!r}".encode() if mpp is not None else b"mpp of the file")
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    # A .mrxs is only the door: its pixels lie in the folder of the same name.
    pixels = path.with_suffix("") if path.suffix.lower() == ".mrxs" else path
    inside = sorted(f for f in pixels.rglob("*") if f.is_file()) if pixels.is_dir() else []
    return inside if path.is_dir() else [path, *inside]


def _text(mpp: Mpp) -> str:
    return f"{mpp.x:.4g}" if mpp.x == mpp.y else f"{mpp.x:.4g} × {mpp.y:.4g}"


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None


def _mpp(x: object, y: object) -> Mpp | None:
    across, down = _number(x), _number(y)
    low, high = PLAUSIBLE_MPP
    if across is None or down is None or not (low <= across <= high and low <= down <= high):
        return None
    return Mpp(across, down)


def _openslide(path: Path) -> Header:
    import openslide

    with openslide.OpenSlide(str(path)) as slide:
        properties: Mapping[str, str] = dict(slide.properties)
        levels = tuple(Size(w, h) for w, h in slide.level_dimensions)
    corner = [properties.get(f"openslide.bounds-{name}") for name in ("x", "y", "width", "height")]
    bounds = None
    if None not in corner:
        x, y, width, height = (int(str(value)) for value in corner)
        bounds = Box(x, y, x + width, y + height)
    return Header(
        levels=levels,
        # For a generic TIFF, openslide makes these of the resolution tags where their unit is the centimetre.
        mpp=_mpp(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y")),
        bounds=bounds,
        vendor=properties.get("openslide.vendor", "unknown"),
        magnification=_number(properties.get("openslide.objective-power")),
    )


def _is_ome(path: Path) -> bool:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            return bool(tiff.is_ome)
    except tifffile.TiffFileError:
        return False


def _ome_tiff(path: Path) -> Header:
    import tifffile

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
    images = [element for element in xml.iter() if element.tag.endswith("}Image")]
    pixels: Mapping[str, str] = {}
    magnification = None
    if index < len(images):
        found = [element for element in images[index].iter() if element.tag.endswith("}Pixels")]
        pixels = found[0].attrib if found else {}
    powers = [e.attrib.get("NominalMagnification") for e in xml.iter() if e.tag.endswith("}Objective")]
    if powers and powers[0] is not None:
        magnification = _number(powers[0])
    return Header(
        levels=tuple(levels),
        mpp=_mpp(_ome_micrometres(pixels, "X"), _ome_micrometres(pixels, "Y")),
        bounds=None,
        vendor="ome-tiff",
        magnification=magnification,
    )


def _plane(axes: str, shape: tuple[int, ...]) -> Size:
    extent = dict(zip(axes, shape, strict=True))
    return Size(extent["X"], extent["Y"])


def _ome_micrometres(pixels: Mapping[str, str], axis: str) -> float | None:
    factors = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
    size = _number(pixels.get(f"PhysicalSize{axis}"))
    factor = factors.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
    return None if size is None or factor is None else size * factor


def _dicom(path: Path) -> Header:
    if not any(f.suffix.lower() == ".dcm" for f in path.iterdir()):
        raise SlideError(f"{path}: a folder without .dcm files is no DICOM slide")
    from wsidicom import WsiDicom
    from wsidicom.errors import WsiDicomNoResolutionError

    try:
        wsi = WsiDicom.open(path)
    except WsiDicomNoResolutionError as error:  # has no text; and no column of the cohort mends it
        raise SlideError(f"{path}: the DICOM instances have no pixel spacing, which wsidicom needs") from error
    with wsi:
        levels = tuple(Size(level.size.width, level.size.height) for level in wsi.levels)
        dataset = wsi.levels.base_level.datasets[0]
        spacing = dataset.pixel_spacing  # millimetres
        optics = getattr(dataset, "OpticalPathSequence", None)
        power = getattr(optics[0], "ObjectiveLensPower", None) if optics else None
        vendor = str(getattr(dataset, "Manufacturer", "") or "dicom")
    return Header(
        levels=levels,
        mpp=_mpp(spacing.width * 1e3, spacing.height * 1e3),
        bounds=None,
        vendor=vendor,
        magnification=_number(power),
    )


def _picture(path: Path) -> Header:
    with open_picture(path) as picture:
        return Header((Size(*picture.size),), None, None, "picture", None)


def open_picture(path: Path) -> Image.Image:
    """Open a PNG, JPEG or TIFF tile without decoding it; refuse what cannot be a tile."""
    # The plugins are asked by name: Image.open warns, and refuses, at sizes that are ordinary here.
    for plugin in (PngImagePlugin.PngImageFile, JpegImagePlugin.JpegImageFile, TiffImagePlugin.TiffImageFile):
        try:
            picture: ImageFile.ImageFile = plugin(path)
        except SyntaxError:  # what Pillow's plugins raise on another format's first bytes
            continue
        width, height = picture.size
        mode = picture.mode
        if width * height > MAX_PICTURE_PIXELS:
            picture.close()
            raise SlideError(
                f"{path}: a plain picture of {width} × {height} pixels would have to be held in memory whole; "
                "convert it to a pyramidal tiled TIFF"
            )
        # Pillow opens 16-bit colour as 8-bit and keeps the high byte alone, which turns 12-bit pictures black.
        deep = any(";16" in str(tile) for tile in picture.tile)
        if deep or mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
            picture.close()
            kind = "16 bits a channel" if deep else f"type {mode}"
            raise SlideError(f"{path}: pixels of {kind}; 8-bit grey or colour is needed")
        return picture
    raise SlideError(f"{path}: cannot be read: no slide or picture format that OpenSlide, tifffile or Pillow knows")
