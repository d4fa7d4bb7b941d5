"""Read the image files of annotated images: RGB images, instance ids and class codes.

Orientation tags are ignored, because annotations refer to the pixels as stored. Files that would be misread are
rejected: images with more than 8 bits, and labels that are not instance ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from hover_batch.errors import InputError
from kd.data.pieces import pieces_of

UPRIGHT = 1
"""Orientation tag of images that are displayed as stored."""
JPEG = b"\xff\xd8\xff"
"""First bytes of a JPEG."""
NUCLEUS_AREA = 20
"""Smallest area in pixels of a piece that may be a separate nucleus."""
SEMANTIC_PIECES = 3
"""Number of such pieces from which a value looks like a class instead of an id."""
INTERPOLATED_IDS = 10
"""Smallest number of ids in an image of which half may be in several pieces only if the labels were interpolated."""
LARGEST_AREA = 128**2
"""Area in pixels, 1024 µm², above which an instance that covers most of its image is no nucleus."""

_OPENCV_COMPRESSIONS = (1, 5, 7, 8, 32773, 32946)
"""TIFF without compression, LZW, JPEG, deflate and PackBits; OpenCV reads some others, such as JPEG 2000, as black."""
_LAB = (tifffile.PHOTOMETRIC.CIELAB, tifffile.PHOTOMETRIC.ICCLAB, tifffile.PHOTOMETRIC.ITULAB)
_GREY = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE)

# OpenCV would print its messages on stderr, beside the error that names the file.
cv2.setLogLevel(0)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Return the pixels of the image file `path` as stored, RGB (y, x, 3) uint8.

    Grey images become RGB, and an alpha channel is dropped. Orientation tags are ignored, except in TIFFs.

    Raises InputError if the file cannot be read as an image, has more than 8 bits per channel, or is a TIFF with
    several pages, an orientation tag other than upright, a compression that OpenCV does not decode, CIELab
    colours, or grey with several samples per pixel.
    """
    # Without ANYDEPTH, OpenCV drops the low bits, so that a 12-bit image in 16 bits becomes nearly black.
    image = _read(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION)
    if image.dtype != np.uint8:
        raise InputError(
            f"{path}: an image of {image.dtype}, but must have 8 bits per channel; scale its full range to 0–255 and "
            "save it as an 8-bit RGB PNG"
        )
    return np.ascontiguousarray(image[..., ::-1])  # OpenCV reads BGR


def read_instances(path: Path, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Return the instance ids (y, x) int32, 0 = background, in the label file `path`.

    `shape`: (y, x) of the image.

    Raises InputError if the file cannot be read as labels of this shape (see `read_codes`), or the values are not
    instance ids (see `check_instance_ids`). Labels of 8 bits that contain 255 are rejected, because larger ids may have
    been truncated. Labels that were resized with interpolation, which creates values between those of neighbours, are
    rejected, too: of their values, most are in several pieces; of published annotations, at most one in fifty.
    """
    ids, dtype = _read_labels(path, shape)
    check_instance_ids(ids, str(path))
    limit = np.iinfo(np.uint8).max
    if dtype == np.uint8 and ids.max(initial=0) == limit:
        raise InputError(
            f"{path}: 8-bit labels with {limit}, the largest value of 8 bits: a mask of 0 and {limit}, or ids of which "
            "the larger ones were truncated; save the original instance ids as a 16-bit grey PNG"
        )
    in_several = pieces_of(ids) > 1
    if len(in_several) >= INTERPOLATED_IDS and in_several.mean() >= 0.5:
        raise InputError(
            f"{path}: {in_several.sum()} of its {len(in_several)} ids are in several pieces, as after a resize with "
            "interpolation; resize labels with nearest neighbour"
        )
    return ids


def read_codes(path: Path, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Return the class codes (y, x) int32, 0 = background, in the label file `path`.

    `shape`: (y, x) of the image.

    Raises InputError if the file cannot be read, does not have one channel of whole numbers from 0 on, has another
    shape, or is a JPEG, or a TIFF with several pages or an orientation tag other than upright.
    """
    return _read_labels(path, shape)[0]


def check_instance_ids(instances: NDArray[np.int32], where: str) -> None:
    """Check that labels are instance ids, not a semantic mask, and that the background is 0.

    In a semantic mask, many nuclei have the same value, such as 1, 255 or a class code. Labels count as a semantic mask
    if at least half of the values other than 0 have SEMANTIC_PIECES (3) or more separate pieces each; only pieces of at
    least NUCLEUS_AREA (20) pixels count. Published annotations contain a few nuclei in several pieces; these are
    accepted.

    Labels in which the background has an id are also rejected. This is assumed if no pixel is 0, or if one id covers
    more than half of the image and more than LARGEST_AREA (128²) pixels.

    `instances`: labels (y, x) int32. `where`: file, for the message.

    Raises InputError if the labels look like a semantic mask, or the background has an id.
    """
    ids, areas = np.unique(instances, return_counts=True)
    largest = areas.argmax()
    covered = areas[largest] / instances.size
    no_background = ids[0] != 0
    background_has_id = ids[largest] and areas[largest] > LARGEST_AREA and covered > 0.5
    if no_background or background_has_id:
        raise InputError(
            f"{where}: the background has an id, but must be 0 ({'no' if ids[0] else areas[0]} pixels are 0, and "
            f"{ids[largest]} covers {covered:.0%} of the image); save labels in which only nuclei have ids"
        )
    pieces = pieces_of(instances, NUCLEUS_AREA)
    if len(pieces) and np.mean(pieces >= SEMANTIC_PIECES) >= 0.5:
        raise InputError(
            f"{where}: looks like a semantic mask, not like instance ids: its values other than 0 ({len(pieces)} in "
            f"all) are on up to {pieces.max()} separate nuclei each; give every nucleus its own id (1, 2, 3, …) and "
            "save them as 16-bit labels"
        )


def _read_labels(path: Path, shape: tuple[int, ...]) -> tuple[NDArray[np.int32], np.dtype[Any]]:
    """Return the labels (y, x) int32, and the dtype in which they are stored."""
    labels = _read(path, cv2.IMREAD_UNCHANGED)
    with path.open("rb") as file:
        if file.read(len(JPEG)) == JPEG:
            raise InputError(f"{path}: a JPEG, whose compression changes ids; save the original labels as a PNG")
    highest = np.iinfo(np.int32).max
    if (
        labels.ndim != 2
        or labels.dtype.kind not in "ui"
        or labels.min(initial=0) < 0
        or labels.max(initial=0) > highest
    ):
        raise InputError(
            f"{path}: {labels.dtype} of shape {labels.shape}, but should be ids from 0 to {highest}, (y, x); save it "
            "as a grey PNG of 16 bits"
        )
    if labels.shape != shape:
        raise InputError(f"{path}: shape {labels.shape}, but its image has {shape}; save labels of the same size")
    return labels.astype(np.int32), labels.dtype


def _read(path: Path, flags: int) -> NDArray[Any]:
    """Return the pixels as OpenCV reads them with `flags`; those of a TIFF unchanged if the flags say so.

    Raises InputError if they cannot be read as stored.
    """
    is_unchanged = flags == cv2.IMREAD_UNCHANGED
    if path.suffix.lower() in (".tif", ".tiff") and (fault := _fault_of_tiff(path, is_unchanged)):
        raise InputError(f"{path}: {fault}")
    pixels = _tiff_pixels(path) if is_unchanged else None
    try:
        # imread prints a warning of its own for a missing file, and fills up a truncated JPEG with grey.
        if pixels is None and path.is_file():  # a pipe would never end
            pixels = cv2.imdecode(np.fromfile(path, np.uint8), flags)
    except (OSError, cv2.error):
        pixels = None
    if pixels is None:
        raise InputError(
            f"{path} cannot be read as an image; check that it exists and is complete, and save it as a PNG"
        )
    return np.asarray(pixels)


def _tiff_pixels(path: Path) -> NDArray[Any] | None:
    """Return the pixels of the first page of a TIFF as stored; None if `path` is not a TIFF or cannot be read.

    OpenCV reads no labels of uint32 or 64 bits, none in tiles of 8 bits, and few compressions.
    """
    try:
        with tifffile.TiffFile(path) as file:
            return np.asarray(file.pages.first.asarray())
    except Exception:  # tifffile and its decoders raise many kinds
        return None


def _fault_of_tiff(path: Path, is_unchanged: bool) -> str:
    """Return why a TIFF would be misread, and the remedy; "" if it is read correctly or not at all.

    Thumbnails and lower resolutions do not count as pages. `is_unchanged`: whether `_tiff_pixels` reads the pixels, not
    OpenCV.
    """
    try:
        with tifffile.TiffFile(path) as file:
            first = file.pages.first
            tag = first.tags.get("Orientation")
            pages = sum(not getattr(page, "is_reduced", False) for page in file.pages)
    except (OSError, tifffile.TiffFileError):
        return ""
    if tag is not None and tag.value != UPRIGHT:  # OpenCV always rotates it, even with IGNORE_ORIENTATION
        return f"a TIFF with the orientation tag {tag.value}; save its stored pixels as a PNG without rotation"
    if pages > 1:  # OpenCV would read the first
        return (
            f"a TIFF of {pages} pages, such as channels or a stack; save the right one, or an image in colour, as a PNG"
        )
    if is_unchanged:
        return ""
    if first.compression not in _OPENCV_COMPRESSIONS:
        kind = getattr(first.compression, "name", first.compression)
        return f"a TIFF with compression {kind}; save it as a PNG"
    if first.photometric in _LAB:
        return "a TIFF with CIELab colours; save it as an RGB PNG"
    if first.photometric in _GREY and first.samplesperpixel > 1:
        return f"a grey TIFF with {first.samplesperpixel} samples per pixel; save it as an RGB PNG"
    return ""
