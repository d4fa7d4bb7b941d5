"""Draw images side by side, such as annotations and the predictions of a teacher and a student."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hover_batch.taxonomy import Rgb, Taxonomy

UNTYPED: Rgb = (0, 220, 255)
"""Colour of contours without a known class."""
GAP = 6
"""Space between images in pixels."""
HEADING = 22
"""Height of the column names in pixels."""

Image = NDArray[np.uint8]
"""(y, x, 3) uint8 RGB."""


def outlined(image: Image, instances: NDArray[np.int32], types: NDArray[np.uint8] | None, taxonomy: Taxonomy) -> Image:
    """Return a copy of an image with outlines of the nuclei in the colours of their classes.

    Outlines are one pixel wide, inside the nuclei; edges of the image are not outlined. A nucleus has the class of most
    of its pixels; pixels of class 0 are not counted. The outlines of nuclei without a class have the colour UNTYPED.

    `image`: (y, x, 3) uint8 RGB. `instances`: (y, x) int32 ids, 0 = background. `types`: (y, x) uint8 class ids; None
    if types are unknown. `taxonomy`: classes of the types.
    """
    edge = np.zeros(instances.shape, bool)
    for ids, border in ((instances, edge), (instances.T, edge.T)):  # the transposed arrays are views
        differs = ids[1:] != ids[:-1]
        border[1:] |= differs
        border[:-1] |= differs
    edge &= instances > 0
    colors = np.array([UNTYPED, *(c.color for c in taxonomy.nuclei)], np.uint8)
    n_ids, n = int(instances.max()) + 1, len(colors)
    numbered = instances.astype(np.int64) * n + (0 if types is None else types)
    # Pixels of class 0 are not counted; a nucleus with no other pixels has no class.
    pixels = np.bincount(numbered.ravel(), minlength=n_ids * n).reshape(n_ids, n)
    pixels[:, 0] = 0
    drawn = image.copy()
    drawn[edge] = colors[pixels.argmax(1)[instances[edge]]]
    return drawn


def panel(columns: Sequence[str], rows: Sequence[Sequence[Image]]) -> Image:
    """Return a picture (y, x, 3) uint8 RGB of images in rows and columns on white, with column names above.

    Each row is as high as its highest image, and each column as wide as its widest.

    `columns`: names of the columns. `rows`: for each row, one image (y, x, 3) uint8 RGB per column.

    Raises ValueError if a row does not have one image per column.
    """
    widths = [max(image.shape[1] for image in column) for column in zip(*rows, strict=True)]
    heights = [max(image.shape[0] for image in row) for row in rows]
    sheet = np.full((HEADING + sum(heights) + GAP * len(rows), sum(widths) + GAP * (len(widths) - 1), 3), 255, np.uint8)
    lefts = [sum(widths[:i]) + GAP * i for i in range(len(widths))]
    for name, left in zip(columns, lefts, strict=True):
        cv2.putText(sheet, name, (left + 2, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    top = HEADING
    for row, height in zip(rows, heights, strict=True):
        for image, left in zip(row, lefts, strict=True):
            sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
        top += height + GAP
    return sheet


def write_panel(path: Path, picture: Image) -> None:
    """Write a picture to a file, in the format of its suffix. Missing folders are created.

    `path`: file to write. `picture`: (y, x, 3) uint8 RGB.

    Raises OSError if the file cannot be written, cv2.error if OpenCV does not know the suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), picture[..., ::-1]):  # OpenCV writes BGR
        raise OSError(errno.EIO, "the picture cannot be written", str(path))
