"""A slide's header: size, pixel size, levels; and which library opens it.

`plan` reads every header of a cohort, so nothing here imports torch. `reader.open_slide` takes its SlideInfo from here
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

Kind = Literal["openslide", "ome-tiff", "dicom", "picture"]
_SCANNERS = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide")
"""Suffixes of files that only OpenSlide reads."""

LARGE_PICTURE_PIXELS = 100_000_000
"""Plain pictures from this size on are worth a warning: they take 0.7 GB of memory to open."""


@dataclass(frozen=True)
class SlideInfo:
    """A slide's properties, as its header and its row of the cohort give them.

    `level0`: full canvas in pixels. `mpp`: µm per level-0 pixel; `mpp_source`: whether the file or the cohort's row
    gave it. `bounds`: OpenSlide's non-empty region in level-0 pixels, None where the format has none. `downsamples`: of
    each level, mean of its `level_ratios`; the first is 1.0. `magnification`: objective power, None if unknown.
    `fingerprint`: see `hover_batch.slide.fingerprint`. `warnings`: sentences for the user.
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


def peek(record: SlideRecord) -> SlideInfo:
    """Read headers only. InputError where the pixel size is unknown, SlideError where the file cannot be read."""
    return describe(record, read_header(record.file, kind_of(record.file)))


def describe(record: SlideRecord, header: Header) -> SlideInfo:
    """Join the file's header with the cohort's row, whose pixel size takes precedence."""
    stated = header.size.mpp
    mpp = record.mpp or stated
    if mpp is None:
        raise InputError(
            f"{record.path}: {header.size.unusable or 'the file does not say its pixel size'}; give it in µm in the "
            f"column mpp of the cohort (row {record.row}, slide_id {record.slide_id})"
        )
    with slide_errors(record.file):
        identity = fingerprint(record.file, record.mpp)
    level0 = header.levels[0]
    magnification = record.magnification if record.magnification is not None else header.magnification
    warnings = warnings_of(mpp, stated, magnification)
    if header.vendor == "picture" and level0.pixels >= LARGE_PICTURE_PIXELS:
        kept, decoding = (level0.pixels * size / 1e9 for size in PICTURE_BYTES)
        warnings.append(
            f"a plain picture is held in memory whole, in each process that reads it: {decoding:.1f} GB while it is "
            f"decoded, then {kept:.1f} GB; convert it to a pyramidal tiled TIFF if that is too much"
        )
    return SlideInfo(
        level0=level0,
        mpp=mpp,
        mpp_source="cohort" if record.mpp is not None else "file",
        bounds=header.bounds,
        downsamples=tuple(sum(level_ratios(level0, size)) / 2 for size in header.levels),
        vendor=header.vendor,
        magnification=magnification,
        fingerprint=identity,
        warnings=tuple(warnings),
    )


def level_ratios(level0: Size, level: Size) -> tuple[float, float]:
    """Return the level-0 pixels per pixel of a level, (x, y).

    A pyramid's extents are rounded: 32914 rows make 8228 at a quarter, and its pixels are still 4 wide, not 4.0002. So
    a whole number that explains the extent to less than one of the level's pixels is taken; else the extents' ratio.
    """

    def ratio(full: int, reduced: int) -> float:
        whole = round(full / reduced)
        return float(whole) if abs(whole * reduced - full) < whole else full / reduced

    return ratio(level0.width, level.width), ratio(level0.height, level.height)


def kind_of(path: Path) -> Kind:
    """Return which library reads this file or folder. SlideError where a scanner's file cannot be read by any."""
    if path.is_dir():
        return "dicom"
    if not path.is_file():
        raise SlideError(f"{path}: no such file")
    import openslide

    with slide_errors(path):
        vendor = openslide.OpenSlide.detect_format(str(path))
        # OpenSlide takes any tiled TIFF for a generic one and then overlooks the levels that OME keeps in sub-IFDs.
        if vendor in (None, "generic-tiff") and is_ome(path):
            return "ome-tiff"
    if vendor is None and path.suffix.lower() in _SCANNERS:
        # Another library may still find a picture in it, without its pixel size, and not report the damage.
        raise SlideError(f"{path}: cannot be read: OpenSlide does not know it as a slide; truncated or corrupted?")
    return "picture" if vendor is None else "openslide"


def read_header(path: Path, kind: Kind) -> Header:
    """Return the header. SlideError with path and reason where it cannot be read."""
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
    """Turn what the decoding libraries raise into a SlideError of one line."""
    try:
        yield
    except HoverBatchError:
        raise
    except Exception as error:  # broken files raise anything: struct.error, KeyError, zlib.error …
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SlideError(f"{path}: cannot be read: {reason}") from error
