"""Read a slide's header: its size, pixel size and levels, and which library opens it.

`plan` reads every header of a cohort, so nothing here imports torch. `reader.open_slide` takes its SlideInfo from here,
too, so that a dry run and a run cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import HoverBatchError, InputError, SlideError
from hover_batch.geometry import Box, Mpp, Size
from hover_batch.slide.fingerprint import fingerprint
from hover_batch.slide.formats import (
    PICTURE_BYTES,
    Header,
    dicom_header,
    is_ome,
    ome_tiff_header,
    openslide_header,
    picture_header,
)
from hover_batch.slide.pixel_size import warnings_of
from hover_batch.slide.tiff_checks import several_pictures

Kind = Literal["openslide", "ome-tiff", "dicom", "picture"]
_SCANNERS = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide")
"""Suffixes of scanners' formats, which only OpenSlide reads."""

_ASPECT_TOLERANCE = 0.02
"""Fraction by which the aspect ratio of a level may differ from the slide's; two pixels are allowed in any case."""
_NEXT_LEVEL = 1.2
"""Ratio of the full size to a level's size below which the level counts as another full-size picture."""
_PADDING = 0.1
"""Relative deviation from a whole ratio up to which a level may be padded; beyond it, the ratio is unusual, as 2.5."""

LARGE_PICTURE_PIXELS = 100_000_000
"""Size from which plain pictures give a warning, since they take 0.7 GB of memory to open."""


@dataclass(frozen=True)
class SlideInfo:
    """Properties of a slide, from its header and its row of the cohort."""

    level0: Size
    """Size of the full canvas in pixels."""
    mpp: Mpp
    """Pixel size of level 0 in µm."""
    mpp_source: Literal["file", "cohort"]
    """Origin of `mpp`."""
    bounds: Box | None
    """OpenSlide's non-empty region in level-0 pixels; None if the format has none."""
    downsamples: tuple[float, ...]
    """Level-0 pixels per pixel of each level, the mean of x and y; the first is 1.0."""
    vendor: str
    """Format or manufacturer, as the library names it."""
    magnification: float | None
    """Objective's power; None if unknown."""
    fingerprint: str
    """Hash of the content (see `hover_batch.slide.fingerprint`)."""
    warnings: tuple[str, ...]
    """Sentences for the user."""


def peek(record: SlideRecord) -> SlideInfo:
    """Return the properties of a slide on disk, from its header and its row of the cohort, without decoding pixels.

    Parts of its files are also read for the fingerprint. While a DICOM slide is read, Python warnings are suppressed in
    the whole process.

    `record`: row of the slide in the cohort.

    InputError if the pixel size is unknown, or a DICOM folder holds several slides. SlideError if the slide cannot be
    read, its format is not supported, or it has several full-size pictures.
    """
    return describe(record, read_header(record.file, kind_of(record.file)))


def describe(record: SlideRecord, header: Header) -> SlideInfo:
    """Return a slide's properties, from its header and its row of the cohort, with its fingerprint and all warnings.

    The pixel size and the magnification in the row take precedence over those of the header.

    `record`: row of the slide in the cohort. `header`: header of the slide, from `read_header`.

    InputError if neither gives a usable pixel size. SlideError if the slide has several full-size pictures or cannot
    be read for its fingerprint.
    """
    file_mpp = header.size.mpp
    mpp = record.mpp or file_mpp
    if mpp is None:
        raise InputError(
            f"{record.path}: {header.size.unusable or 'the file gives no pixel size'}; give it in µm in the "
            f"column mpp of the cohort (row {record.row}, slide_id {record.slide_id})"
        )
    with slide_errors(record.file):
        # A row that repeats the file's pixel size gives the same results as one without it.
        content_hash = fingerprint(record.file, None if record.mpp == file_mpp else record.mpp)
    level0 = header.levels[0]
    ratios = tuple(level_ratios(level0, size) for size in header.levels)
    full_size = sum(max(x, y) < _NEXT_LEVEL for x, y in ratios)
    if full_size > 1:  # OpenSlide treats pictures of the same size as levels, and would read the last one
        raise several_pictures(record.file, full_size)
    magnification = record.magnification if record.magnification is not None else header.magnification
    warnings = [*header.warnings, *warnings_of(mpp, file_mpp, magnification)]
    warnings += [
        f"its level of {size.width} × {size.height} pixels has another aspect ratio than the slide; if it shows "
        "something else, such as the label, save the slide without it"
        for size, (x, y) in zip(header.levels, ratios, strict=True)
        if abs(x / y - 1) > _ASPECT_TOLERANCE and abs(x - y) * min(size.width, size.height) > 2 * max(x, y)
    ]
    warnings += [doubt for size in header.levels[1:] if (doubt := _doubt_of_size(level0, size))]
    if header.vendor == "picture" and level0.pixels >= LARGE_PICTURE_PIXELS:
        open_gb, decoding_gb = (level0.pixels * pixel_bytes / 1e9 for pixel_bytes in PICTURE_BYTES)
        warnings.append(
            f"a plain picture is held in memory as a whole, in each process that reads it: {decoding_gb:.1f} GB while "
            f"it is decoded, then {open_gb:.1f} GB; convert it to a pyramidal tiled TIFF if that is too much"
        )
    return SlideInfo(
        level0=level0,
        mpp=mpp,
        mpp_source="cohort" if record.mpp is not None else "file",
        bounds=header.bounds,
        downsamples=tuple((x + y) / 2 for x, y in ratios),
        vendor=header.vendor,
        magnification=magnification,
        fingerprint=content_hash,
        warnings=tuple(warnings),
    )


def _doubt_of_size(level0: Size, level: Size) -> str:
    """Return a warning if a level is slightly larger or smaller than 1/n of the slide, as with padding; else ""."""
    ratio = (level0.width / level.width + level0.height / level.height) / 2
    expected = [extent / round(ratio) for extent in (level0.width, level0.height)]
    off = max(abs(expected[0] - level.width), abs(expected[1] - level.height))
    if off <= 2 or abs(ratio / round(ratio) - 1) > _PADDING:  # repeated halving rounds by up to two pixels
        return ""
    return (
        f"its level of {level.width} × {level.height} pixels should have {expected[0]:.0f} × {expected[1]:.0f}, "
        f"1/{round(ratio)} of the full size; if it is padded or cropped, nuclei or tissue are displaced: save the "
        "slide again with levels of the right size"
    )


def level_ratios(level0: Size, level: Size) -> tuple[float, float]:
    """Return the number (x, y) of level-0 pixels per pixel of a level.

    The sizes of levels are rounded. A quarter of 32914 rows is stored as 8228, but each of its pixels is 4 rows high,
    not 4.0002. So the ratio is rounded to a whole number if that explains the size of the level to within one of its
    pixels.

    `level0`, `level`: sizes of level 0 and of the level, in their own pixels.
    """

    def ratio(full: int, reduced: int) -> float:
        whole = round(full / reduced)
        return float(whole) if abs(whole * reduced - full) < whole else full / reduced

    return ratio(level0.width, level.width), ratio(level0.height, level.height)


def kind_of(path: Path) -> Kind:
    """Return the kind of the slide at `path`, which determines the library that reads it.

    - "dicom": any folder.
    - "ome-tiff": an OME-TIFF, unless OpenSlide recognises it as the format of a scanner.
    - "openslide": any other file that OpenSlide recognises.
    - "picture": all other files, whether or not they can be read.

    SlideError if the path does not exist, or the file is empty, cannot be read, is a truncated TIFF, or has the suffix
    of a scanner's format but is not recognised by OpenSlide.
    """
    if path.is_dir():
        return "dicom"
    if not path.is_file():
        raise SlideError(f"{path}: no such file")
    if not path.stat().st_size:
        raise SlideError(f"{path}: is empty; copy it again")
    import openslide

    with slide_errors(path):
        vendor = openslide.OpenSlide.detect_format(str(path))
        # OpenSlide opens any tiled TIFF as a generic one, and then misses the levels that OME keeps in sub-IFDs.
        if vendor in (None, "generic-tiff") and is_ome(path):
            return "ome-tiff"
    if vendor is None and path.suffix.lower() in _SCANNERS:
        # Another library might find a picture in it, without the pixel size, and not report the corruption.
        raise SlideError(
            f"{path}: cannot be read: OpenSlide does not recognise it; it may be truncated or corrupted: copy it again"
        )
    return "picture" if vendor is None else "openslide"


def read_header(path: Path, kind: Kind) -> Header:
    """Return the header of the slide at `path`, read with the library for its kind.

    While a DICOM slide is read, Python warnings are suppressed in the whole process.

    `kind`: result of `kind_of`.

    SlideError with path and reason if the header cannot be read or the format is not supported. InputError if a DICOM
    folder holds several slides.
    """
    readers = {
        "openslide": openslide_header,
        "ome-tiff": ome_tiff_header,
        "dicom": dicom_header,
        "picture": picture_header,
    }
    with slide_errors(path):
        return readers[kind](path)


@contextmanager
def slide_errors(path: Path) -> Iterator[None]:
    """Convert exceptions in the block, such as those of decoding libraries, to a SlideError with path and reason.

    Errors of hover-batch pass through unchanged. The message is one line.

    `path`: path of the slide, for the message.
    """
    try:
        yield
    except HoverBatchError:
        raise
    except Exception as error:  # the libraries raise many kinds: struct.error, KeyError, zlib.error …
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = (
            "; if it is truncated or corrupted, copy it again, else convert it to an OME-TIFF, for example with QuPath "
            "or bfconvert"
        )
        if isinstance(error, OSError) and error.errno:  # the system's, such as a missing permission
            remedy = ""
        raise SlideError(f"{path}: cannot be read: {reason}{remedy}") from error
