"""Read a slide's pixels on the inference grid. A pixel does not depend on the block in which it is read.

A block is read in whole pixels of the level just finer than the grid, with the margin that the filter needs, and
resampled at the phase that each pixel's absolute index gives it (`resample`). If a level has exactly the grid's pixels,
they are returned unchanged. Outside the canvas the picture is mirrored about its border, with the border pixel
repeated: … 1 0 | 0 1 2 … n−1 | n−1 n−2 …
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hover_batch.cohort.record import SlideRecord
from hover_batch.geometry import Box, Grid, Mpp, Size
from hover_batch.slide.headers import SlideInfo, describe, kind_of, level_ratios, peek, read_header, slide_errors
from hover_batch.slide.resample import resample, taps
from hover_batch.slide.sources import Source, open_source

__all__ = ["SlideInfo", "SlideReader", "open_slide", "peek"]

MAX_SOURCE_PIXELS = 1 << 23
"""Maximum number of source pixels decoded at once; larger blocks are read in parts, with the same result."""

_LEVEL_TOLERANCE = 0.01
"""Fraction by which a level may be coarser than the grid: 1 % is not worth reading a level four times as large."""


def open_slide(record: SlideRecord) -> SlideReader:
    """Open a slide on disk for reading; the caller closes it.

    A plain picture is decoded into memory as a whole. For other kinds, the first call imports tiatoolbox, which takes
    some seconds. While a DICOM slide is opened, Python warnings are suppressed in the whole process.

    `record`: row of the slide in the cohort.

    InputError if the pixel size is unknown, or a DICOM folder holds several slides. SlideError if the slide cannot be
    read or its format is not supported.
    """
    kind = kind_of(record.file)
    info = describe(record, read_header(record.file, kind))
    with slide_errors(record.file):
        return SlideReader(info, open_source(record.file, kind), record.file)


class SlideReader:
    """Open slide, which reads pixels on any grid. Its context manager closes it. Several threads may use it at once.

    `info`: properties of the slide: its size, pixel size, format and warnings. `source`: the slide's open `Source`.
    `path`: used in error messages.
    """

    def __init__(self, info: SlideInfo, source: Source, path: Path) -> None:
        self.info = info
        self.source = source
        self._path = path

    def read(self, box: Box, grid: Grid) -> NDArray[np.uint8]:
        """Return the pixels of a box as RGB (y, x, 3) uint8, resampled to a grid over the slide.

        A pixel does not depend on the box in which it is read.

        `box`: in pixels of `grid`; outside of `grid.size`, the picture is mirrored. `grid`: inference grid, or any
        other grid over this slide.

        ValueError if the grid belongs to a slide of another size, SlideError if the pixels cannot be read.
        """
        if grid.level0 != self.info.level0:
            raise ValueError(f"the grid was laid over {grid.level0}, the slide has {self.info.level0}")
        if box.empty:
            return np.empty((*box.shape, 3), np.uint8)
        columns = _mirror(box.x0, box.x1, grid.size.width)
        rows = _mirror(box.y0, box.y1, grid.size.height)
        on_canvas = Box(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        pixels = np.empty((*on_canvas.shape, 3), np.uint8)
        with slide_errors(self._path):
            self._fill(pixels, on_canvas, grid, best_level(self.source.levels, grid))
        if on_canvas == box:
            return pixels
        return pixels[(rows - on_canvas.y0)[:, None], columns - on_canvas.x0]

    def _fill(self, out: NDArray[np.uint8], box: Box, grid: Grid, level: int) -> None:
        size = self.source.levels[level]
        ratio_x, ratio_y = level_ratios(grid.level0, size)
        step_x, step_y = grid.scale_x / ratio_x, grid.scale_y / ratio_y
        if step_x == 1 and step_y == 1 and box.intersect(size.box) == box:
            if box.width * box.height <= MAX_SOURCE_PIXELS:
                out[:] = self.source.read(level, box)
            else:
                self._fill_halves(out, box, grid, level)
            return
        first_x, weights_x = taps(step_x, box.x0, box.x1)
        first_y, weights_y = taps(step_y, box.y0, box.y1)
        columns = np.clip(first_x[:, None] + np.arange(weights_x.shape[1]), 0, size.width - 1)
        rows = np.clip(first_y[:, None] + np.arange(weights_y.shape[1]), 0, size.height - 1)
        needed = Box(int(columns[0, 0]), int(rows[0, 0]), int(columns[-1, -1]) + 1, int(rows[-1, -1]) + 1)
        if needed.width * needed.height > MAX_SOURCE_PIXELS and max(box.shape) > 1:
            self._fill_halves(out, box, grid, level)
            return
        pixels = self.source.read(level, needed)
        resample(np.ascontiguousarray(pixels), rows - needed.y0, weights_y, columns - needed.x0, weights_x, out)

    def _fill_halves(self, out: NDArray[np.uint8], box: Box, grid: Grid, level: int) -> None:
        if box.width >= box.height:
            middle = (box.x0 + box.x1) // 2
            halves = Box(box.x0, box.y0, middle, box.y1), Box(middle, box.y0, box.x1, box.y1)
        else:
            middle = (box.y0 + box.y1) // 2
            halves = Box(box.x0, box.y0, box.x1, middle), Box(box.x0, middle, box.x1, box.y1)
        for half in halves:
            self._fill(out[half.slices_in(box)], half, grid, level)

    def thumbnail(self, max_side: int) -> NDArray[np.uint8]:
        """Return the whole canvas as RGB (y, x, 3) uint8, with a longer side of at most `max_side` pixels.

        A smaller canvas is not enlarged. SlideError if the pixels cannot be read.
        """
        grid = whole_grid(self.info, max(1.0, max(self.info.level0.width, self.info.level0.height) / max_side))
        return self.read(grid.size.box, grid)

    def close(self) -> None:
        """Close the slide's files. The slide cannot be read afterwards."""
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def whole_grid(info: SlideInfo, scale: float) -> Grid:
    """Return a grid for pictures of the whole slide, whose pixels cover the canvas exactly.

    `info`: properties of the slide. `scale`: level-0 pixels per pixel of the grid. It is adjusted slightly along x and
    y so that the grid has a whole number of pixels, at least one.
    """
    width, height = max(1, round(info.level0.width / scale)), max(1, round(info.level0.height / scale))
    scale_x, scale_y = info.level0.width / width, info.level0.height / height
    return Grid(
        level0=info.level0,
        scale_x=scale_x,
        scale_y=scale_y,
        mpp=Mpp(info.mpp.x * scale_x, info.mpp.y * scale_y),
        size=Size(width, height),
    )


def best_level(levels: Sequence[Size], grid: Grid) -> int:
    """Return the index of the coarsest level that is not coarser than the grid; 0 if all levels are coarser.

    A level whose pixels are up to 1 % larger than those of the grid still counts.

    `levels`: sizes of the slide's levels in pixels, largest first. `grid`: grid over the slide.
    """
    allowed = 1 + _LEVEL_TOLERANCE
    ratios = [level_ratios(grid.level0, size) for size in levels]
    fine_enough = [i for i, (x, y) in enumerate(ratios) if x <= grid.scale_x * allowed and y <= grid.scale_y * allowed]
    return fine_enough[-1] if fine_enough else 0


def _mirror(start: int, stop: int, extent: int) -> NDArray[np.int64]:
    """Return the indices in [0, extent) for start … stop−1, reflected with the border pixel repeated."""
    turn = np.arange(start, stop, dtype=np.int64) % (2 * extent)
    return np.minimum(turn, 2 * extent - 1 - turn)
