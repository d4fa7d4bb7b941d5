"""Draw the pictures of a finished slide: its thumbnail, and the densest field with its nuclei."""

from __future__ import annotations

import shutil

import numpy as np

from hover_batch.export.pictures import View, densest_field, write_overlay, write_thumbnail
from hover_batch.files import read_json
from hover_batch.geometry import Grid
from hover_batch.quality.picture import PICTURE_MEASURES, picture_measures
from hover_batch.slide.reader import SlideReader
from hover_batch.slide_work import SlideWork

OVERLAY_SIDE = 2048
"""Side in level-0 pixels of the field in the overlay."""
THUMBNAIL_SIDE = 1024
"""Longer side of the thumbnail in pixels."""


def draw_thumbnail(work: SlideWork, reader: SlideReader | None) -> dict[str, float]:
    """Draw thumbnail.jpg, the slide with its tissue outlined. Return the measures of the picture and the mask by name.

    The longer side of the thumbnail has at most THUMBNAIL_SIDE (1024) pixels. The names are ink, brown, chroma and dark
    (PICTURE_MEASURES) and, for a given mask, mask_on_tissue. If `reader` is None, the thumbnail and its measures are
    copied from the run that stored the maps. Then a missing thumbnail is ignored, and measures that an older version of
    hover-batch did not store are left out.

    `work`: slide to draw. `reader`: reader of the slide; None for stored maps.

    OSError if the picture cannot be written, SlideError if the slide cannot be read.
    """
    layout, canvas = work.layout, work.grid.level0
    if reader is None:
        if work.maps.thumbnail_jpg.is_file():
            shutil.copyfile(work.maps.thumbnail_jpg, layout.thumbnail_jpg)
        measured = (read_json(work.maps.slide_json) or {}).get("quality", {})
        return {name: measured[name] for name in (*PICTURE_MEASURES, "mask_on_tissue") if name in measured}
    image = reader.thumbnail(THUMBNAIL_SIDE)
    view = View(image, 0, 0, canvas.width / image.shape[1], canvas.height / image.shape[0])
    rings = [ring for polygon in work.mask.polygons().geoms for ring in (polygon.exterior, *polygon.interiors)]
    write_thumbnail(layout.thumbnail_jpg, view, [np.asarray(ring.coords) for ring in rings])
    measures = picture_measures(image, view.scale_x * work.info.mpp.x)
    return measures if work.mask_on_tissue is None else measures | {"mask_on_tissue": work.mask_on_tissue}


def draw_overlay(work: SlideWork, reader: SlideReader | None) -> None:
    """Draw overlay.jpg: the square with the most nuclei, at full resolution, with their contours and a legend.

    The square has a side of OVERLAY_SIDE (2048) level-0 pixels.

    `work`: slide to draw, whose nuclei.parquet must exist. `reader`: reader of the slide; None for stored maps, for
    which nothing is drawn.

    OSError if the picture cannot be written or the table cannot be read, pyarrow.ArrowInvalid if the table is
    corrupted, SlideError if the slide cannot be read.
    """
    if reader is None:
        return
    layout, canvas = work.layout, work.grid.level0
    field = densest_field(layout.nuclei_parquet, OVERLAY_SIDE, canvas)
    level0 = Grid(canvas, 1.0, 1.0, work.info.mpp, canvas)
    view = View(reader.read(field, level0), field.x0, field.y0, 1.0, 1.0)
    write_overlay(layout.overlay_jpg, view, layout.nuclei_parquet, work.taxonomy)
