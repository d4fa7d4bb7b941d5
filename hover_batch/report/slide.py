"""Gather one slide's part of the report from its folder; crops come from the slide itself, if it can be opened."""

from __future__ import annotations

from dataclasses import dataclass

from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import HoverBatchError, SlideError
from hover_batch.export.pictures import View, contoured
from hover_batch.export.read import NucleiTable
from hover_batch.geometry import Box, Mpp, Size
from hover_batch.report.content import Crop, SlideDetail, SlideRow
from hover_batch.report.measure import Measured, measure
from hover_batch.report.pictures import data_uri, heatmaps, reduced_picture
from hover_batch.slide.reopen import reopen
from hover_batch.slide.survey import read_tissue
from hover_batch.slide.tissue import TissueMask

CROPS = 4
"""Maximum number of crops of a slide."""
CROP_UM = 64.0
"""Side of a crop in µm: about ten nuclei, and 256 pixels at 40×."""
_THUMBNAIL, _OVERLAY = 320, 480
"""Longer sides of the thumbnail and the overlay in pixels: small, so that many slides fit into a page."""


@dataclass(frozen=True)
class SlideReport:
    """Report on one slide."""

    detail: SlideDetail
    """Pictures of the slide."""
    table: NucleiTable | None
    """Table of nuclei; None if it cannot be read, as `detail.missing` then says."""
    measured: Measured | None
    """Measurements of the table; None if it cannot be read."""


def report_slide(layout: SlideLayout, row: SlideRow, record: SlideRecord, to_run: str | None) -> SlideReport:
    """Return the pictures and measurements of a finished slide.

    Missing and corrupted files, and a slide that cannot be opened, are listed in `detail.missing` of the result. They
    raise no error.

    `layout`: paths of the slide's results. `row`: its row in the report's table. `record`: its row in the cohort.
    `to_run`: relative link from the page to the run's folder; None if the report is outside of it.
    """
    missing: list[str] = []
    table = measured = None
    try:
        table = NucleiTable.open(layout.nuclei_parquet)
        measured = measure(table, CROPS)
    except SlideError as error:
        missing.append(str(error))
        table = None
    crops: list[Crop] = []
    if table is not None and measured is not None and len(measured.chosen):
        try:
            crops = _crops(layout, record, table, measured)
        except (HoverBatchError, OSError) as error:
            missing.append(f"No crops: {error}")
    pictures = {
        path.name: reduced_picture(path, side)
        for path, side in ((layout.thumbnail_jpg, _THUMBNAIL), (layout.overlay_jpg, _OVERLAY))
    }
    if missing_files := [name for name, picture in pictures.items() if picture is None]:
        missing.append(f"Missing files: {', '.join(missing_files)}.")
    overlay = layout.overlay_jpg
    detail = SlideDetail(
        row=row,
        extra=record.extra,
        mpp=table.mpp.x if table else None,
        thumbnail=pictures[layout.thumbnail_jpg.name],
        overlay=pictures[overlay.name],
        overlay_file=None if to_run is None else to_run + overlay.relative_to(layout.root).as_posix(),
        heatmaps=heatmaps(measured, table.taxonomy.nuclei, _tissue(layout)) if table and measured else (),
        crops=crops,
        missing=missing,
    )
    return SlideReport(detail, table, measured)


def _tissue(layout: SlideLayout) -> TissueMask | None:
    """Return where the run searched for nuclei; None if survey.json is missing or corrupted."""
    try:
        return read_tissue(layout.survey_json)
    except (OSError, SlideError):
        return None


def _crops(layout: SlideLayout, record: SlideRecord, table: NucleiTable, measured: Measured) -> list[Crop]:
    """Return fields around the chosen nuclei, moved inside the canvas.

    SlideError if the slide cannot be read, or is not the one that was segmented.
    """
    crops = []
    with reopen(record, layout.survey_json) as reader:
        boxes = {crop_box(x, y, table.level0, table.mpp) for x, y in measured.chosen.tolist()}
        for box in sorted(boxes):
            view = View(reader.read(box, measured.cells.grid), box.x0, box.y0, 1.0, 1.0)
            image, counts = contoured(view, layout.nuclei_parquet, table.taxonomy)
            picture = data_uri(image[:, :, ::-1], ".jpg")
            crops.append(Crop(picture, box.x0, box.y0, box.width * table.mpp.x, int(counts.sum())))
    return crops


def crop_box(x: float, y: float, canvas: Size, mpp: Mpp) -> Box:
    """Return the square with sides of CROP_UM (64 µm) around a position, as a box in level-0 pixels.

    A square that extends beyond the slide is moved inside, and clipped if the slide is smaller.

    `x`, `y`: position in level-0 pixels. `canvas`: size of the slide in level-0 pixels. `mpp`: size of a level-0 pixel
    in µm.
    """
    width, height = (
        min(round(CROP_UM / side), extent) for side, extent in ((mpp.x, canvas.width), (mpp.y, canvas.height))
    )
    x0 = int(min(max(0, x - width / 2), canvas.width - width))
    y0 = int(min(max(0, y - height / 2), canvas.height - height))
    return Box(x0, y0, x0 + width, y0 + height)
