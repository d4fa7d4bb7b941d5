"""The pixels that both sides see: the squares of each slide that hold most tissue, or all of it."""

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
    """A square of a slide in inference pixels, RGB (y, x, 3) uint8 at `mpp`; what lies beyond its border is mirrored,
    for both sides."""

    slide_id: str
    box: Box
    image: NDArray[np.uint8]
    mpp: float
    read_s: float
    """Seconds that reading it took."""

    @property
    def pixels(self) -> int:
        return self.box.width * self.box.height


@dataclass(frozen=True)
class Place:
    """Where a field lies: its pixels are read when their turn comes, and never all of a slide's at once."""

    record: SlideRecord
    box: Box
    mpp: float

    def read(self) -> Field:
        """SlideError where the slide cannot be read."""
        with open_slide(self.record) as reader:
            started = time.perf_counter()
            image = reader.read(self.box, Grid.over(reader.info.level0, reader.info.mpp, self.mpp))
            return Field(self.record.slide_id, self.box, image, self.mpp, time.perf_counter() - started)


def places_of(records: Sequence[SlideRecord], mpp: float, side: int, per_slide: int) -> Iterator[Place]:
    """The `per_slide` squares with most tissue of each slide, those that come first in raster order where several have
    as much; 0 = all that have tissue. Squares are cut off at the canvas.

    InputError where a slide lies in other storage, SlideError where one cannot be read.
    """
    for record in records:
        if isinstance(record.path, Url):
            raise InputError(f"{record.path}: compare reads slides from disk; copy it there")
        with open_slide(record) as reader:
            yield from _of_slide(reader, record, mpp, side, per_slide)


def _of_slide(reader: SlideReader, record: SlideRecord, mpp: float, side: int, per_slide: int) -> Iterator[Place]:
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
    """Inference pixels of the box on tissue, about."""
    height, width = mask.array.shape
    x = np.array([box.x0, box.x1]) * grid.scale_x / mask.level0_per_pixel[0]
    y = np.array([box.y0, box.y1]) * grid.scale_y / mask.level0_per_pixel[1]
    columns = slice(int(x[0]), min(width, max(int(x[0]) + 1, round(x[1]))))
    rows = slice(int(y[0]), min(height, max(int(y[0]) + 1, round(y[1]))))
    part = mask.array[rows, columns]
    return float(part.mean()) * box.width * box.height if part.size else 0.0
