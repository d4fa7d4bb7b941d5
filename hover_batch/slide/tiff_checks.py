"""Refuse TIFFs that OpenSlide, Pillow or tifffile would read wrongly, without a message, or with one of their own.

Each check raises SlideError with what is wrong and what to do. Only headers are read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import tifffile

from hover_batch.errors import SlideError

ORIENTATION = 274
"""TIFF tag of how to turn or flip the stored pixels; 1 = not at all."""
_REDUCED, _MASK = 1, 4
"""Bits of the tag NewSubfileType."""
_RGB_OR_GREY = (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.MINISBLACK)
_OPENSLIDE_COMPRESSIONS = frozenset((1, 5, 7, 8, 32773, 32946, 33003, 33005))
"""None, LZW, JPEG, deflate (8, 32946), PackBits, and JPEG 2000 in SVS."""
_PILLOW_COMPRESSIONS = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000))
"""None, fax (2 to 4), LZW, JPEG (6, 7), deflate (8, 32946), PackBits, LZMA and Zstandard."""
_UNSIGNED = (1, 4)
"""SampleFormat of unsigned integers, and of values that the writer did not define."""

# Python would print its messages on stderr, beside the one that names the slide.
tifffile.logger().addHandler(logging.NullHandler())


def open_tiff(path: Path) -> tifffile.TiffFile | None:
    """Open the TIFF at `path`, which the caller closes; None if the file has another format.

    SlideError if the TIFF has no directory that describes its pixels, because it is truncated. OSError if the file
    cannot be read.
    """
    try:
        tiff = tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        return None
    if not len(tiff.pages):
        tiff.close()
        raise SlideError(
            f"{path}: is truncated: the part of the TIFF that describes its pixels is missing; copy it again"
        )
    return tiff


def first_page(tiff: tifffile.TiffFile) -> tifffile.TiffPage:
    """Return the first page of `tiff` with all its tags. AssertionError if tifffile has not read all of them."""
    page = tiff.pages.first
    assert isinstance(page, tifffile.TiffPage)
    return page


def check_for_openslide(path: Path, tiff: tifffile.TiffFile, *, generic: bool) -> None:
    """Raise SlideError if OpenSlide would read a TIFF wrongly or not at all.

    The first page and all tiled pages must be complete, and have pixels of 8 unsigned bits per channel, a compression
    that OpenSlide decodes, the usual orientation and a valid palette, if any. A generic TIFF must also have one
    full-size picture, all tiles, and no samples beyond grey or RGB, except one for the transparency of RGB.

    `path`: path for messages. `tiff`: the open file. `generic`: whether OpenSlide opens it as a generic TIFF, not as
    the format of a scanner.
    """
    _check_pages(path, tiff, _OPENSLIDE_COMPRESSIONS)
    if generic:
        _check_plain(path, tiff)
        _check_extra_samples(path, first_page(tiff))


def check_for_pillow(path: Path, tiff: tifffile.TiffFile) -> None:
    """Raise SlideError if Pillow would read a TIFF wrongly or not at all.

    The first page and all tiled pages must be complete, and have pixels of 8 unsigned bits per channel (or fewer, in
    pages without tiles), a compression that Pillow decodes, the usual orientation and a valid palette, if any. The file
    must have one full-size picture, with all its tiles.

    `path`: path for messages. `tiff`: the open file.
    """
    _check_pages(path, tiff, _PILLOW_COMPRESSIONS)
    _check_plain(path, tiff)


def check_ome(path: Path, images: Sequence[tifffile.TiffPageSeries], largest: tifffile.TiffPageSeries) -> None:
    """Raise SlideError unless the largest image of an OME-TIFF is one complete plane of 8-bit RGB.

    This image must also be the only one in the file with more than half as many pixels.

    `path`: path for messages. `images`: all images in the file. `largest`: the largest of them, which is read.
    """
    extents = dict(zip(largest.axes, largest.shape, strict=True))
    if len(largest.axes) != 3 or extents.get("S", extents.get("C")) != 3 or largest.dtype != "uint8":
        raise SlideError(
            f"{path}: an OME-TIFF of axes {largest.axes}, shape {largest.shape}, {largest.dtype}; "
            "one plane of 8-bit RGB is needed"
        )
    keyframe = largest.keyframe
    large = [image for image in images if 2 * _area(image.keyframe) > _area(keyframe)]
    if len(large) > 1:
        raise several_pictures(path, len(large))
    # tifffile converts the colours of JPEG only.
    if keyframe.photometric not in _RGB_OR_GREY and keyframe.compression != tifffile.COMPRESSION.JPEG:
        raise _colour_error(path, keyframe)
    for page in (page for level in largest.levels for page in level.pages):
        if page is None:
            raise SlideError(f"{path}: lacks pixels that are in another file of the OME-TIFF; put it beside this one")
        _check_complete(path, page)
        _check_dense(path, page)


def _check_pages(path: Path, tiff: tifffile.TiffFile, compressions: frozenset[int]) -> None:
    """Raise SlideError for pages that are truncated, turned, in CIELab, of other compressions, or not 8 unsigned bits.

    OpenSlide and Pillow keep the high byte of 16 bits, which makes 12-bit pictures black, and read the others as
    unsigned. OpenSlide turns each tile of a turned page on its own, Pillow the whole page.
    """
    for number, page in enumerate(tiff.pages):
        assert isinstance(page, tifffile.TiffPage)
        if number and not page.is_tiled:  # a label or macro picture
            continue
        too_few = page.bitspersample < 8 and page.is_tiled and not number
        if page.bitspersample > 8 or too_few or page.sampleformat not in _UNSIGNED:
            kind = {2: "signed ", 3: "float "}.get(int(page.sampleformat), "")
            raise SlideError(
                f"{path}: pixels of {kind}{page.bitspersample} bits a channel; 8-bit grey or colour is needed: scale "
                "its values to 0 … 255 and save it again"
            )
        orientation = page.tags.get(ORIENTATION)
        if orientation is not None and orientation.value != 1:
            raise orientation_error(path, orientation.value)
        if page.compression not in compressions:
            raise SlideError(
                f"{path}: a TIFF with compression {getattr(page.compression, 'name', page.compression)}, which is read "
                "only in an OME-TIFF; save it with JPEG, LZW or deflate, or convert it to an OME-TIFF with bfconvert"
            )
        if page.photometric == tifffile.PHOTOMETRIC.CIELAB:  # libtiff converts it, but to wrong colours
            raise _colour_error(path, page)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            _check_colour_map(path, page)
        _check_complete(path, page)


def _colour_error(path: Path, page: tifffile.TiffPage) -> SlideError:
    kind = getattr(page.photometric, "name", page.photometric)
    return SlideError(f"{path}: a TIFF with colours of type {kind}; save it as RGB")


def orientation_error(path: Path, orientation: int) -> SlideError:
    """Return the SlideError to raise for the picture at `path` because programs turn or flip it.

    `orientation`: value of the tag Orientation; not 1, which means upright.
    """
    return SlideError(
        f"{path}: the tag Orientation is {orientation}, so that programs turn or flip the picture; save it upright, "
        "without this tag"
    )


def _check_colour_map(path: Path, page: tifffile.TiffPage) -> None:
    """Raise SlideError if the values of a palette have 8 bits instead of the standard's 16.

    OpenSlide's libtiff guesses this and warns on stderr for each tile; Pillow keeps the high bytes, which are all 0.
    """
    if page.colormap is None or page.colormap.max() < 256:
        raise SlideError(
            f"{path}: its palette has no colours of 16 bits, as the TIFF standard requires; save it as RGB"
        )


def _check_complete(path: Path, page: tifffile.TiffPage | tifffile.TiffFrame) -> None:
    """Raise SlideError if the file ends before the page's pixels do."""
    end = max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=False)), default=0)
    size = page.parent.filehandle.size
    if end > size:
        raise SlideError(
            f"{path}: is truncated: it has {size:,} bytes, and its pixels extend to {end:,}; copy it again"
        )


def _check_dense(path: Path, page: tifffile.TiffPage | tifffile.TiffFrame) -> None:
    """Raise SlideError if the page leaves out tiles, which tifffile reads as black and OpenSlide rejects."""
    if missing := sum(count == 0 for count in page.databytecounts):
        raise SlideError(
            f"{path}: {missing:,} of its {len(page.databytecounts):,} tiles are not stored; save it with all its tiles"
        )


def _check_plain(path: Path, tiff: tifffile.TiffFile) -> None:
    """Raise SlideError for a plain TIFF of several full-size pictures, of which only the first is read.

    The pictures may be pages, SubIFDs or planes of the first page. Also raise SlideError if the first page lacks tiles.
    Pages and SubIFDs of at most half its pixels are levels of a pyramid, labels or thumbnails.
    """
    first, *others = (page for page in tiff.pages if isinstance(page, tifffile.TiffPage))
    _check_dense(path, first)
    others += [below for page in (first, *others) for below in page.pages or () if isinstance(below, tifffile.TiffPage)]
    # ImageJ and tifffile write a stack as one page, and say so in its description.
    stacked = tiff.series[0].levels[0].size // max(1, first.size) if tiff.is_imagej or tiff.is_shaped else 1
    if (planes := max(first.imagedepth, stacked)) > 1:
        raise several_pictures(path, planes)
    large = [
        page
        for page in others
        # A picture that is larger than the first is not its reduced copy, as the tag may say.
        if _area(page) > _area(first) or (2 * _area(page) > _area(first) and not page.subfiletype & (_REDUCED | _MASK))
    ]
    if large:
        raise several_pictures(path, 1 + len(large))


def several_pictures(path: Path, number: int) -> SlideError:
    """Return the SlideError to raise for a slide at `path` with `number` full-size pictures; only one would be read."""
    return SlideError(f"{path}: holds {number} full-size pictures; save each as a file of its own")


def _area(page: tifffile.TiffPage) -> int:
    return page.imagewidth * page.imagelength


def _check_extra_samples(path: Path, page: tifffile.TiffPage) -> None:
    """Raise SlideError for samples beyond colour or grey that OpenSlide reads wrongly.

    It takes a fourth sample of any meaning for transparency, and shifts the rows of grey tiles with a second one that
    cross the slide's right edge.
    """
    grey = page.photometric in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE)
    if grey and page.samplesperpixel > 1:
        raise SlideError(f"{path}: grey with {page.samplesperpixel} samples a pixel; save it as RGB")
    more = page.samplesperpixel - 3
    if page.photometric == tifffile.PHOTOMETRIC.RGB and more > 0 and (more > 1 or not is_alpha(page.extrasamples)):
        raise SlideError(
            f"{path}: {page.samplesperpixel} samples a pixel, of which the fourth is not marked as transparency (tag "
            "ExtraSamples); save it as RGB"
        )


def is_alpha(extra_samples: tuple[int, ...]) -> bool:
    """Return whether the first extra sample of a TIFF is transparency; by the standard, it may be anything else.

    True if its value is 1 (associated alpha) or 2 (unassociated alpha). `extra_samples`: values of the tag
    ExtraSamples; empty if there is none.
    """
    return extra_samples[:1] in ((1,), (2,))
