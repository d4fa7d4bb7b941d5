"""Find the places of a slide where two runs differ most, and draw both runs' contours there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.diff.slide import SlideDiff
from hover_batch.errors import HoverBatchError
from hover_batch.export.pictures import View, contoured, outlined
from hover_batch.export.read import NucleiTable
from hover_batch.geometry import Box, Grid, Mpp, Size
from hover_batch.report.pictures import data_uri
from hover_batch.report.slide import CROP_UM, crop_box
from hover_batch.slide.reopen import reopen
from hover_batch.taxonomy import Rgb

PER_SLIDE = 4
"""Maximum number of places of one slide."""
WIDTH = 384
"""Width of a picture in pixels."""
COLORS: tuple[Rgb, Rgb] = ((255, 200, 0), (0, 225, 255))
"""Colours of the contours of A and B: yellow and cyan do not occur in H&E, and differ for all eyes."""


@dataclass(frozen=True)
class Place:
    """Square of a slide with nuclei that differ."""

    slide_id: str
    """Id of the slide."""
    box: Box
    """Position in level-0 pixels."""
    counts: tuple[int, int, int]
    """Number of nuclei only in A, only in B, and with another class, whose centroids are in its grid cell."""
    pictures: tuple[str, ...] = ()
    """Data URIs of both runs' contours, of A by class and of B by class; empty if there is no picture."""
    source: str = ""
    """What the pictures show, or why there are none."""


def find_places(slide: SlideDiff, canvas: Size, mpp: Mpp) -> list[Place]:
    """Return the grid cells of a slide that have the most differing nuclei, as squares with sides of CROP_UM (64 µm).

    At most PER_SLIDE (4) are returned, in descending order of their number of differing nuclei; cells with the same
    number are in raster order. Squares that extend beyond the slide are moved inside.

    `slide`: differences of the slide, with the positions in `disputed`. `canvas`: size of the slide in level-0 pixels.
    `mpp`: size of a level-0 pixel in µm.
    """
    if not len(slide.disputed):
        return []
    side = np.array([CROP_UM / mpp.x, CROP_UM / mpp.y])
    cells, of, counts = np.unique(
        (slide.disputed // side).astype(np.int64)[:, ::-1], axis=0, return_inverse=True, return_counts=True
    )
    places = []
    for cell in np.argsort(-counts, kind="stable")[:PER_SLIDE]:
        x, y = ((cells[cell][::-1] + 0.5) * side).tolist()
        only_a, only_b, changed = np.bincount(slide.kinds[of.ravel() == cell], minlength=3).tolist()
        places.append(Place(slide.slide_id, crop_box(x, y, canvas, mpp), (only_a, only_b, changed)))
    return places


def draw(
    place: Place, layouts: Sequence[SlideLayout], tables: Sequence[NucleiTable], records: Sequence[SlideRecord]
) -> Place:
    """Return a copy of `place` with pictures of the slide, or of its thumbnail if the slide cannot be read.

    If there is no thumbnail either, `source` of the result gives the reason, and there are no pictures.

    `layouts`, `tables`, `records`: paths of the results, table and cohort row of the slide, each for A and for B.

    SlideError or OSError if the pictures are drawn on a thumbnail and a table cannot be read.
    """
    reasons = []
    for layout, record in zip(layouts, records, strict=True):
        try:
            return _with_pictures(place, _from_slide(place.box, layout, record), tables, "")
        except (HoverBatchError, OSError) as error:
            reasons.append(str(error))
    for layout, table in zip(layouts, tables, strict=True):
        if (view := _from_thumbnail(place.box, layout, table.level0)) is not None:
            return _with_pictures(place, view, tables, f"from thumbnail.jpg, since {reasons[0]}")
    return Place(
        place.slide_id, place.box, place.counts, (), f"no picture: {reasons[0]}, and there is no thumbnail.jpg"
    )


def _from_slide(box: Box, layout: SlideLayout, record: SlideRecord) -> View:
    """Return the pixels of `box`. HoverBatchError or OSError if the slide cannot be read."""
    with reopen(record, layout.survey_json) as reader:
        info = reader.info
        return _enlarged(reader.read(box, Grid(info.level0, 1.0, 1.0, info.mpp, info.level0)), box)


def _from_thumbnail(box: Box, layout: SlideLayout, canvas: Size) -> View | None:
    """Return the part of the thumbnail that shows `box`; None if there is none."""
    path = layout.thumbnail_jpg
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) if path.is_file() else None
    if image is None:
        return None
    height, width = image.shape[:2]
    x0, x1 = box.x0 * width // canvas.width, -(-box.x1 * width // canvas.width)
    y0, y1 = box.y0 * height // canvas.height, -(-box.y1 * height // canvas.height)
    scale_x, scale_y = canvas.width / width, canvas.height / height
    # In whole pixels of the thumbnail, so that contours lie where they belong.
    part = Box(round(x0 * scale_x), round(y0 * scale_y), round(x1 * scale_x), round(y1 * scale_y))
    return _enlarged(np.asarray(image[y0:y1, x0:x1], np.uint8), part)


def _enlarged(image: np.typing.NDArray[np.uint8], box: Box) -> View:
    """Return the picture of `box`, WIDTH pixels wide."""
    height = max(1, round(WIDTH * box.height / box.width))
    pixels = np.asarray(cv2.resize(image, (WIDTH, height), interpolation=cv2.INTER_LINEAR), np.uint8)
    return View(pixels, box.x0, box.y0, box.width / WIDTH, box.height / height)


def _with_pictures(place: Place, view: View, tables: Sequence[NucleiTable], source: str) -> Place:
    """Return the place with its pictures. SlideError or OSError if a table cannot be read."""
    both = view
    # A's are wider, so that they remain visible on both sides of those of B.
    for table, color, thickness in zip(tables, COLORS, (5, 2), strict=True):
        both = View(outlined(both, table.path, color, thickness), view.x0, view.y0, view.scale_x, view.scale_y)
    images = [both.image, *(contoured(view, table.path, table.taxonomy)[0] for table in tables)]
    pictures = tuple(data_uri(image[:, :, ::-1], ".jpg") for image in images)
    return Place(place.slide_id, place.box, place.counts, pictures, source)
