"""A slide's pixels in tiles, each level half the one above; of the run's thumbnail where the slide is not at hand.

They come from the project's own reader, as what was segmented did, so that contours lie where the network saw them,
and every kind of slide opens in the same way. tiatoolbox's tile generators want one of its readers, which a plain
picture has only as a VirtualWSIReader, and resample at a phase that depends on the tile.
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
from hover_batch.slide.reader import GridReader, SlideReader
from hover_batch.slide.reopen import reopen
from hover_batch.slide.sources import open_source

TILE = 512
"""Side of a tile in pixels."""
_QUALITY = 90


class Backdrop:
    """`finest`: level-0 pixels per pixel of the finest level, which is `max_level`; level 0 fits into one tile.
    `missing`: why this is not the slide itself, if it is not. May be asked by several threads."""

    def __init__(self, reader: SlideReader, finest: int = 1, missing: str | None = None) -> None:
        self._reader = reader
        self.finest = finest
        self.missing = missing
        level0 = reader.info.level0
        self.max_level = max(0, math.ceil(math.log2(max(level0.width, level0.height) / finest / TILE)))

    def tile(self, level: int, column: int, row: int) -> bytes | None:
        """JPEG, of less than TILE × TILE pixels at the right and lower edges; None where there is no such tile.
        SlideError where the slide cannot be read any more."""
        if not 0 <= level <= self.max_level:
            return None
        info, scale = self._reader.info, self.finest * 2 ** (self.max_level - level)
        size = Size(-(-info.level0.width // scale), -(-info.level0.height // scale))
        box = cell_box(column, row, TILE).intersect(size.box)
        if box.empty:
            return None
        pixels = self._reader.read(
            box, Grid(info.level0, scale, scale, Mpp(info.mpp.x * scale, info.mpp.y * scale), size)
        )
        # Full chroma: stain is colour, and is looked at eight times enlarged.
        sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        _, encoded = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY, *sampling])
        return encoded.tobytes()


def open_backdrop(slide: SlideLayout, record: SlideRecord, table: NucleiTable) -> Backdrop:
    """The slide's own pixels or, where it is not at hand, its thumbnail's. InputError where there is neither."""
    try:
        return Backdrop(reopen(record, slide.survey_json))
    except (HoverBatchError, OSError) as error:
        missing = str(error)
        if not slide.thumbnail_jpg.is_file():
            raise InputError(
                f"{missing}, and there is no {slide.thumbnail_jpg} either; bring the slide back, or run it anew"
            ) from error
    return _thumbnail(slide.thumbnail_jpg, table, missing)


def _thumbnail(path: Path, table: NucleiTable, missing: str) -> Backdrop:
    """The thumbnail as a slide of one level: of the size in the table, to whose pixels the nuclei's positions refer."""
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
    return Backdrop(GridReader(info, source, path), 2 ** max(0, math.floor(math.log2(ratio))), missing)
