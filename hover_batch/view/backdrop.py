"""Serve a slide's pixels as a pyramid of tiles; those of the run's thumbnail if the slide is not available.

The pixels come from the reader that segmentation uses, so that contours lie where the network saw them and the same
formats open. tiatoolbox's tile generators require one of its own readers, and resample with a phase that depends on
the tile.
"""

from __future__ import annotations

import math
from pathlib import Path

import cv2

from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import HoverBatchError, InputError
from hover_batch.export.read import NucleiTable
from hover_batch.geometry import Grid, Mpp, Size, cell_box
from hover_batch.slide.headers import SlideInfo, kind_of, level_ratios
from hover_batch.slide.reader import SlideReader
from hover_batch.slide.reopen import reopen
from hover_batch.slide.sources import open_source

TILE = 512
"""Side of a tile in pixels."""
_QUALITY = 90


class Backdrop:
    """Tile pyramid of a slide or of its thumbnail; thread-safe.

    Level 0 fits into one tile; each level doubles the size, up to `max_level`. `reader`: open reader of the slide or
    the thumbnail. `finest`: level-0 pixels of the slide per pixel of the finest level. `missing`: reason why the
    thumbnail is shown instead of the slide; None if the slide is shown.
    """

    def __init__(self, reader: SlideReader, finest: int = 1, missing: str | None = None) -> None:
        self._reader = reader
        self.finest = finest
        self.missing = missing
        level0 = reader.info.level0
        self.max_level = max(0, math.ceil(math.log2(max(level0.width, level0.height) / finest / TILE)))

    def tile(self, level: int, column: int, row: int) -> bytes | None:
        """Return a tile of the pyramid as a JPEG of at most 512 × 512 pixels (TILE); None if there is no such tile.

        Tiles at the right and lower edges may be smaller. `level`: level of the pyramid, 0 for the coarsest. `column`,
        `row`: position in the grid of tiles of this level. SlideError if the slide can no longer be read.
        """
        if not 0 <= level <= self.max_level:
            return None
        info = self._reader.info
        scale = self.finest * 2 ** (self.max_level - level)
        size = Size(-(-info.level0.width // scale), -(-info.level0.height // scale))
        box = cell_box(column, row, TILE).intersect(size.box)
        if box.empty:
            return None
        grid = Grid(info.level0, scale, scale, Mpp(info.mpp.x * scale, info.mpp.y * scale), size)
        pixels = self._reader.read(box, grid)
        # Full chroma: the stain is colour, and the viewer enlarges it up to eight times.
        sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        _, encoded = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY, *sampling])
        return encoded.tobytes()


def open_backdrop(slide: SlideLayout, record: SlideRecord, table: NucleiTable) -> Backdrop:
    """Return the pyramid of the slide, or of its thumbnail if the slide cannot be opened.

    The file stays open as long as the result is in use; it cannot be closed explicitly.

    `slide`: paths of the slide's results. `record`: its row of the cohort. `table`: its nuclei, which give the size of
    the slide.

    InputError if the slide cannot be opened and there is no thumbnail. Errors of a corrupted thumbnail propagate.
    """
    try:
        return Backdrop(reopen(record, slide.survey_json))
    except (HoverBatchError, OSError) as error:
        missing = str(error)
        if not slide.thumbnail_jpg.is_file():
            raise InputError(
                f"{missing}, and {slide.thumbnail_jpg} is missing, too; restore the slide, or run it again"
            ) from error
    return _thumbnail(slide.thumbnail_jpg, table, missing)


def _thumbnail(path: Path, table: NucleiTable, missing: str) -> Backdrop:
    """Open the thumbnail as a slide with one level, with the nominal size of the slide, to which positions refer.

    `missing`: reason why the slide itself is not shown.
    """
    source = open_source(path, kind_of(path))
    info = SlideInfo(
        level0=table.level0,
        mpp=table.mpp,
        mpp_source="file",
        bounds=table.bounds,
        downsamples=(1.0,),
        vendor="",
        magnification=None,
        fingerprint="",
        warnings=(),
    )
    ratio = min(level_ratios(table.level0, source.levels[0]))
    return Backdrop(SlideReader(info, source, path), 2 ** max(0, math.floor(math.log2(ratio))), missing)
