"""Choose the fields on which two networks are compared: the squares with the most tissue, or all with tissue."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.config import TissueSettings
from hover_batch.errors import InputError
from hover_batch.geometry import Box, Grid
from hover_batch.slide.reader import SlideReader, open_slide
from hover_batch.slide.tissue import TissueMask, tissue_mask


@dataclass(frozen=True)
class Field:
    """Square of a slide with its pixels. Both networks mirror the image at its border."""

    slide_id: str
    """Slide of the field."""
    box: Box
    """Position in inference pixels."""
    image: NDArray[np.uint8]
    """RGB (y, x, 3) uint8."""
    mpp: float
    """Pixel size of the image in µm."""
    read_s: float
    """Wall time of reading the pixels, in seconds."""

    @property
    def pixels(self) -> int:
        """Number of inference pixels in the field."""
        return self.box.width * self.box.height


@dataclass(frozen=True)
class Place:
    """Position of a field, whose pixels are read only when it is compared."""

    record: SlideRecord
    """Slide of the field."""
    box: Box
    """Position in inference pixels of `mpp` µm."""
    mpp: float
    """Size of an inference pixel in µm."""

    def read(self) -> Field:
        """Read the field's pixels from its slide, and measure how long this takes without opening the slide.

        The slide is closed afterwards.

        InputError if the slide's pixel size is unknown or a DICOM folder holds several slides, SlideError if the slide
        cannot be opened or read.
        """
        with open_slide(self.record) as reader:
            started = time.perf_counter()
            image = reader.read(self.box, Grid.over(reader.info.level0, reader.info.mpp, self.mpp))
            return Field(self.record.slide_id, self.box, image, self.mpp, time.perf_counter() - started)


def choose_fields(records: Sequence[SlideRecord], mpp: float, side: int, per_slide: int) -> Iterator[Place]:
    """Yield the fields of each slide: the `per_slide` squares with the most tissue, in descending order.

    Squares with the same amount of tissue are in raster order. If `per_slide` is 0, all squares with tissue are yielded
    in raster order. Squares are clipped to the slide. Each slide is opened, and its tissue found with the default
    settings, when its first field is requested; it is closed after its last field.

    `records`: slides. `mpp`: size of an inference pixel in µm. `side`: side of a square in inference pixels.

    InputError if a slide is given by a URL, its pixel size is unknown or a DICOM folder holds several slides;
    SlideError if a slide cannot be read, or its mask cannot be used.
    """
    for record in records:
        if isinstance(record.path, Url):
            raise InputError(
                f"{record.path}: compare reads slides from disk only; copy the slide to this machine and give its path"
            )
        with open_slide(record) as reader:
            yield from _of_slide(reader, record, mpp, side, per_slide)


def _of_slide(reader: SlideReader, record: SlideRecord, mpp: float, side: int, per_slide: int) -> Iterator[Place]:
    """Yield the fields of one slide."""
    grid = Grid.over(reader.info.level0, reader.info.mpp, mpp)
    mask = tissue_mask(reader, record, TissueSettings())
    boxes = [
        Box(column * side, row * side, (column + 1) * side, (row + 1) * side).intersect(grid.size.box)
        for column, row in grid.size.box.cells(side)
    ]
    shares = [_tissue_pixels(mask, box, grid) for box in boxes]
    best = [i for i in np.argsort(-np.array(shares), kind="stable") if shares[i] > 0]
    for i in best[:per_slide] if per_slide else sorted(best):
        yield Place(record, boxes[i], mpp)


def _tissue_pixels(mask: TissueMask, box: Box, grid: Grid) -> float:
    """Return the approximate number of inference pixels of `box` that are tissue."""
    height, width = mask.array.shape
    x = np.array([box.x0, box.x1]) * grid.scale_x / mask.level0_per_pixel[0]
    y = np.array([box.y0, box.y1]) * grid.scale_y / mask.level0_per_pixel[1]
    columns = slice(int(x[0]), min(width, max(int(x[0]) + 1, round(x[1]))))
    rows = slice(int(y[0]), min(height, max(int(y[0]) + 1, round(y[1]))))
    part = mask.array[rows, columns]
    return float(part.mean()) * box.width * box.height if part.size else 0.0
