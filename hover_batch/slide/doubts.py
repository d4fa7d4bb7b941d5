"""Find pixels that contradict each other: levels of a pyramid among themselves, and a given mask with the tissue.

Only small parts of a slide are read.
"""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from hover_batch.config import TissueSettings
from hover_batch.geometry import Box, Grid
from hover_batch.slide.reader import SlideReader
from hover_batch.slide.tissue import TissueMask, detect_tissue

_PLACES = 3
"""Number of places at which two levels are compared, most of which must differ."""
_OVERVIEW = 1024
"""Longer side in pixels of the picture in which these places are found."""
_BLOCKS = 16
"""Blocks along each side of a place, whose mean colours are compared: they hardly depend on how a level was reduced."""
_MIN_BLOCK = 16
"""Minimum side of a block in pixels of the finer level."""
_MAX_COLOUR_DIFFERENCE = 40
_MIN_TEXTURE = 5
"""Minimum standard deviation of the blocks (0 to 255), without which there is nothing to correlate."""
_MIN_CORRELATION = 0.5
_MIN_GAIN = 0.05
"""Minimum gain in correlation from which a level counts as mirrored."""


def doubts_of_levels(reader: SlideReader) -> list[str]:
    """Return a warning for each level of a slide whose picture differs from that of the next finer level.

    The picture may be shifted or mirrored, for example. This matters, since nuclei are found in the level nearest to
    the model's pixel size, and tissue in a coarse level. Levels are compared at three places with much texture, by the
    mean colours of blocks; they differ if most of these places do. The list is empty if all levels agree or there is
    only one.

    `reader`: open slide.

    SlideError if the pixels cannot be read.
    """
    info = reader.info
    if len(info.downsamples) == 1:
        return []
    centres = _textured(reader.thumbnail(_OVERVIEW))
    doubts = []
    for fine, coarse in pairwise(info.downsamples):
        differing = [_differ(reader, x * info.level0.width, y * info.level0.height, fine, coarse) for x, y in centres]
        if 2 * sum(differing) > len(differing):
            doubts.append(
                f"its level of 1/{coarse:.3g} of the full size shows something else than that of 1/{fine:.3g} at the "
                "same place, so that nuclei or tissue are missed or displaced; save the slide again with levels made "
                "from its full-size picture"
            )
    return doubts


def share_on_tissue(reader: SlideReader, mask: TissueMask, settings: TissueSettings) -> float:
    """Return the fraction of a given tissue mask that lies where tissue is detected, from 0 to 1.

    The mask is compared, by area, with the tissue that `detect_tissue` finds on the slide.

    `reader`: open slide. `mask`: tissue mask that the user gave for it. `settings`: settings of the detection.

    SlideError if the pixels cannot be read.
    """
    detected = detect_tissue(reader, settings).array
    height, width = detected.shape
    share = cv2.resize(mask.array.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return float(share[detected].sum() / max(share.sum(), 1e-9))


def _textured(picture: NDArray[np.uint8]) -> list[tuple[float, float]]:
    """Return the places (x, y), as fractions of the sides, where an RGB picture (y, x, 3) varies most."""
    values = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    variance = cv2.blur(values**2, (15, 15)) - cv2.blur(values, (15, 15)) ** 2
    places = []
    for _ in range(_PLACES):
        row, column = np.unravel_index(int(variance.argmax()), variance.shape)
        places.append(((column + 0.5) / values.shape[1], (row + 0.5) / values.shape[0]))
        variance[max(0, row - 30) : row + 30, max(0, column - 30) : column + 30] = -1
    return places


def _differ(reader: SlideReader, x: float, y: float, fine: float, coarse: float) -> bool:
    """Return whether two levels, given by their downsamples, differ around the level-0 position (x, y).

    They also differ if the coarser level correlates clearly better when it is mirrored: near the middle, mirroring
    hardly displaces the picture, so that it correlates in any case.
    """
    half = _BLOCKS / 2 * max(_MIN_BLOCK * fine, 4 * coarse)  # in level-0 pixels
    width, height = reader.info.level0.width, reader.info.level0.height
    first, second = (_blocks(reader, x - half, y - half, 2 * half, scale) for scale in (fine, coarse))
    if first.shape != second.shape or not first.size:
        return False
    if np.abs(first.mean(axis=(0, 1)) - second.mean(axis=(0, 1))).max() > _MAX_COLOUR_DIFFERENCE:
        return True
    if np.sqrt(first.var(axis=(0, 1)).mean()) < _MIN_TEXTURE:
        return False
    alike = _correlation(first, second)
    mirrored = [
        _correlation(first, _blocks(reader, left - half, top - half, 2 * half, coarse)[::down, ::across])
        for left, top, down, across in ((width - x, y, 1, -1), (x, height - y, -1, 1), (width - x, height - y, -1, -1))
    ]
    return alike < _MIN_CORRELATION or max(mirrored) > alike + _MIN_GAIN


def _correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Return the correlation of two pictures (row, column, 3), without their mean colours; 0 if their sizes differ."""
    if first.shape != second.shape:
        return 0.0
    a, b = (part - part.mean(axis=(0, 1)) for part in (first, second))
    return float((a * b).mean() / max(np.sqrt((a**2).mean() * (b**2).mean()), 1e-9))


def _blocks(reader: SlideReader, left: float, top: float, side: float, scale: float) -> NDArray[np.float32]:
    """Return the mean colours (_BLOCKS, _BLOCKS, 3) of a square's blocks, read from the level of downsample `scale`.

    `left`, `top`, `side`: in level-0 pixels. The square is clipped to the canvas.
    """
    grid = Grid.scaled(reader.info.level0, reader.info.mpp, scale, scale)
    box = Box(*(round(value / scale) for value in (left, top, left + side, top + side))).intersect(grid.size.box)
    pixels = reader.read(box, grid)
    if not pixels.size:
        return np.empty((0, 0, 3), np.float32)
    return np.asarray(cv2.resize(pixels.astype(np.float32), (_BLOCKS, _BLOCKS), interpolation=cv2.INTER_AREA))
