"""One slide's whole way, on one page: infer(unit) → post(unit) → finalize(slide).

Nothing here knows who calls it: the executors decide where and when. Each step leaves its result on disk whole or not
at all, and is not done again where its result lies: a unit's shard and marker, a region's part, the slide's slide.json.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hover_batch import __version__
from hover_batch.cohort.durable import sha256_file, to_json, write_atomically, write_first
from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.ledger import run_key
from hover_batch.cohort.record import SlideRecord
from hover_batch.config import Settings
from hover_batch.export.pictures import View, densest_field, write_overlay, write_thumbnail
from hover_batch.export.summary import slide_summary
from hover_batch.geometry import Box, Grid
from hover_batch.model.package import Card, Package
from hover_batch.nuclei.stitch import nuclei_of_region
from hover_batch.nuclei.table import SCHEMA_VERSION, TableContext, merge_parts, to_arrow, write_part
from hover_batch.nuclei.watershed import SobelConstants
from hover_batch.slide.reader import SlideInfo, SlideReader
from hover_batch.slide.tiles import Unit, plan_units
from hover_batch.slide.tissue import TissueMask, tissue_mask
from hover_batch.store import PredictionStore

if TYPE_CHECKING:  # it brings torch, which readers and post-processing do without
    from hover_batch.model.predict import Predictor

READ_BLOCK = 1024
"""Kept inference pixels that are read at once: large enough for the JPEG tiles beneath, small enough for memory."""

OVERLAY_SIDE = 2048
"""Side in level-0 pixels of the field that the overlay shows."""
THUMBNAIL_SIDE = 1024


class Seconds:
    """Wall time by stage.

    `totals`: seconds by stage, of all blocks together. `spans`: by stage, when its first block began and its last one
    ended, in seconds since 1970, so that those of several processes compare.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.spans: dict[str, tuple[float, float]] = {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Add the time of the block to `stage`."""
        started, clock = time.time(), time.monotonic()
        try:
            yield
        finally:
            self._add(stage, time.monotonic() - clock, (started, time.time()))

    def add(self, other: Seconds) -> None:
        for stage, seconds in other.totals.items():
            self._add(stage, seconds, other.spans[stage])

    def _add(self, stage: str, seconds: float, span: tuple[float, float]) -> None:
        self.totals[stage] = self.totals.get(stage, 0.0) + seconds
        first, last = self.spans.get(stage, span)
        self.spans[stage] = min(first, span[0]), max(last, span[1])


ReadBlocks = Callable[[list[Box], Seconds], Iterable[NDArray[np.uint8]]]
"""Boxes of inference pixels → their RGB (h, w, 3), one after the other; the time it took goes to the stage `read`."""


class NetworkFailed(Exception):
    """The network raised, out of memory perhaps, or its device is broken: no fault of the pixels, as a rule."""


class UnitsMissing(Exception):
    """A region's nuclei reach into units, named by (column, row), whose maps are not there yet."""

    def __init__(self, cells: tuple[tuple[int, int], ...]) -> None:
        super().__init__(cells)
        self.cells = cells


@dataclass(frozen=True)
class SlideWork:
    """What is known of a slide before its first pixel is predicted."""

    record: SlideRecord
    info: SlideInfo
    grid: Grid
    mask: TissueMask
    units: tuple[Unit, ...]
    package: Package
    settings: Settings
    layout: SlideLayout

    @property
    def card(self) -> Card:
        return self.package.card

    @property
    def context(self) -> TableContext:
        return TableContext(
            slide_id=self.record.slide_id,
            taxonomy=self.card.taxonomy,
            grid=self.grid,
            slide_mpp=self.info.mpp,
            mpp_source=self.info.mpp_source,
            bounds=self.info.bounds,
            model_id=self.card.name,
            model_sha256=self.package.sha256,
            software=__version__,
        )


def result_key(record: SlideRecord, info: SlideInfo, package: Package, settings: Settings) -> str:
    """The slide's run key: a hash of all that its results depend on, its own mask among it."""
    mask = "" if record.mask_path is None else sha256_file(record.mask_path)
    return run_key(package.sha256, settings.results_key(), info.fingerprint + mask, SCHEMA_VERSION)


def survey(
    reader: SlideReader, record: SlideRecord, package: Package, settings: Settings, layout: SlideLayout
) -> SlideWork:
    """Lay the grid, find the tissue and cut it into units."""
    grid = Grid.over(reader.info.level0, reader.info.mpp, package.card.mpp)
    mask = tissue_mask(reader, record, settings.tissue)
    units = plan_units(grid, mask, settings.infer.unit, package.card.tile_out)
    return SlideWork(record, reader.info, grid, mask, units, package, settings, layout)


def open_store(work: SlideWork) -> PredictionStore:
    """The slide's store, made where it is not there yet."""
    card = work.card
    return PredictionStore.create(
        work.layout.predictions_zarr,
        work.grid.size,
        card.layout.planes,
        work.settings.infer.unit,
        {
            "mpp": [work.grid.mpp.x, work.grid.mpp.y],
            "level0_per_pixel": [work.grid.scale_x, work.grid.scale_y],
            "level0_size": [work.grid.level0.width, work.grid.level0.height],
            "planes": card.layout.names(tuple(c.name for c in card.taxonomy.classes)),
            "od_scale": card.layout.OD_SCALE,
            "model": card.to_json(),
            "model_sha256": work.package.sha256,
        },
    )


def inferred(unit: Unit, work: SlideWork, store: PredictionStore) -> bool:
    """Whether the unit's maps are in the store, unharmed: its marker is there and tells the hash of the shard.

    A shard that is not what its marker says is removed with it, to be predicted again, and so are the parts of the
    regions that may have looked at it. Call it while nobody writes.
    """
    path = work.layout.marker(unit.column, unit.row)
    try:
        marker = json.loads(path.read_bytes())
    except FileNotFoundError:
        return False
    except ValueError:
        marker = {}
    if "shard_sha256" in marker and marker["shard_sha256"] == store.shard_sha256(unit.box):
        return True
    for cell in neighbours(unit):
        work.layout.part(*cell).unlink(missing_ok=True)
    path.unlink()
    store.remove(unit.box)
    return False


def posted(unit: Unit, work: SlideWork) -> bool:
    """Whether the unit's part of the table is there."""
    return work.layout.part(unit.column, unit.row).exists()


def infer(
    unit: Unit,
    work: SlideWork,
    read: ReadBlocks,
    predictor: Predictor,
    store: PredictionStore,
    advance: Callable[[int], None],
) -> Seconds:
    """Predict a unit's tiles, write its shard, then its marker; `advance` is told the number of tiles as they are done.
    Several threads may share one predictor: they take turns. NetworkFailed where it raises.

    A shard found without a marker was written by a run that died in between: it is adopted.
    """
    seconds = Seconds()
    digest = store.shard_sha256(unit.box)
    if digest is not None:
        advance(len(unit.cells))
    else:
        maps = np.zeros((work.card.layout.planes, *unit.box.shape), np.uint8)
        for tiles, pixels in _batches(unit, work, read, predictor.batch, seconds):
            with predictor.turn, seconds.of("infer"):
                try:
                    predicted = predictor.predict(pixels)
                except Exception as error:
                    raise NetworkFailed(f"{type(error).__name__}: {error}") from error
            for tile, tile_maps in zip(tiles, predicted, strict=True):
                inside = tile.intersect(unit.box)
                rows, columns = inside.slices_in(unit.box)
                tile_rows, tile_columns = inside.slices_in(tile)
                maps[:, rows, columns] = tile_maps[:, tile_rows, tile_columns]
            advance(len(tiles))
        with seconds.of("write"):
            digest = store.write(unit.box, maps)
    marker = {"unit": unit.unit_id, "tiles": len(unit.cells), "shard_sha256": digest}
    write_first(work.layout.marker(unit.column, unit.row), to_json(marker))
    return seconds


def _batches(
    unit: Unit, work: SlideWork, read: ReadBlocks, size: int, seconds: Seconds
) -> Iterator[tuple[list[Box], NDArray[np.uint8]]]:
    """The unit's tiles, `size` at a time: their kept boxes and the pixels (n, tile_in, tile_in, 3) uint8 to predict."""
    card = work.card
    boxes: list[Box] = []
    pixels: list[NDArray[np.uint8]] = []
    together: dict[tuple[int, int], list[Box]] = {}
    for tile in unit.tiles:
        together.setdefault((tile.y0 // READ_BLOCK, tile.x0 // READ_BLOCK), []).append(tile)
    blocks = [_hull(tiles).expand(card.margin) for tiles in together.values()]
    for tiles, block, image in zip(together.values(), blocks, read(blocks, seconds), strict=True):
        for tile in tiles:
            boxes.append(tile)
            pixels.append(image[tile.expand(card.margin).slices_in(block)])
            if len(boxes) == size:
                yield boxes, np.stack(pixels)
                boxes, pixels = [], []
    if boxes:
        yield boxes, np.stack(pixels)


def _hull(tiles: list[Box]) -> Box:
    return Box(min(t.x0 for t in tiles), min(t.y0 for t in tiles), max(t.x1 for t in tiles), max(t.y1 for t in tiles))


def reading(reader: SlideReader, work: SlideWork) -> ReadBlocks:
    """Blocks read by an open reader, here and now."""

    def read(boxes: list[Box], seconds: Seconds) -> Iterator[NDArray[np.uint8]]:
        for box in boxes:
            with seconds.of("read"):
                image = reader.read(box, work.grid)
            yield image

    return read


def neighbours(unit: Unit) -> Iterator[tuple[int, int]]:
    """The nine cells of the unit grid round a unit, itself among them: what its region needs, as a rule."""
    for row in (unit.row - 1, unit.row, unit.row + 1):
        for column in (unit.column - 1, unit.column, unit.column + 1):
            yield column, row


def post(unit: Unit, work: SlideWork, store: PredictionStore) -> Seconds:
    """The nuclei that the unit's core owns, as a part of the table. Needs the maps of the units around it.

    Raises UnitsMissing where a nucleus reaches into units whose maps are not there yet.
    """
    seconds = Seconds()
    settings = work.settings.post
    constants = SobelConstants(**work.card.sobel) if settings.sobel_norm == "fixed" else None
    with seconds.of("post"):
        nuclei = nuclei_of_region(_complete(store, work), unit.box, work.card.layout, settings, constants)
        write_part(work.layout.part(unit.column, unit.row), to_arrow(nuclei, work.context))
    return seconds


def _complete(store: PredictionStore, work: SlideWork) -> Callable[[Box], NDArray[np.uint8]]:
    """`store.read`, but never of a unit that is still to be predicted."""
    waiting = {(unit.column, unit.row) for unit in work.units}

    def read(box: Box) -> NDArray[np.uint8]:
        needed = waiting.intersection(box.intersect(store.canvas).cells(work.settings.infer.unit))
        there = {cell for cell in needed if work.layout.marker(*cell).exists()}
        if missing := needed - there:
            raise UnitsMissing(tuple(sorted(missing)))
        waiting.difference_update(there)
        return store.read(box)

    return read


def finalize(work: SlideWork, reader: SlideReader, seconds: Seconds) -> dict[str, Any]:
    """Merge the parts into nuclei.parquet and draw the pictures. Returns what slide.json says, the summary among it."""
    layout, record = work.layout, work.record
    with seconds.of("finalize"):
        keep = work.mask.contains if work.mask.given else None
        parts = [(unit.row, layout.part(unit.column, unit.row)) for unit in work.units]
        merged = merge_parts(parts, layout.nuclei_parquet, work.context, keep)
        work.mask.write_geojson(layout.tissue_geojson)
        _draw(work, reader)
    write_atomically(layout.timings_json, to_json(seconds.totals))
    return {
        "nuclei": merged.nuclei,
        "nuclei_sha256": sha256_file(layout.nuclei_parquet),
        "seam_uncertain": merged.seam_uncertain,
        "units": len(work.units),
        "tiles": sum(len(u.cells) for u in work.units),
        "mpp": [work.info.mpp.x, work.info.mpp.y],
        "inference_mpp": [work.grid.mpp.x, work.grid.mpp.y],
        "warnings": list(work.info.warnings),
        "summary": slide_summary(
            record,
            work.card.taxonomy,
            status="done",
            nuclei=layout.nuclei_parquet,
            tissue_mm2=work.mask.area_mm2(work.info.mpp),
            seconds=seconds.totals,
        ),
    }


def _draw(work: SlideWork, reader: SlideReader) -> None:
    """The thumbnail with the tissue's outline, and the densest field with its nuclei at full resolution."""
    layout, canvas = work.layout, work.grid.level0
    image = reader.thumbnail(THUMBNAIL_SIDE)
    small = View(image, 0, 0, canvas.width / image.shape[1], canvas.height / image.shape[0])
    rings = [ring for polygon in work.mask.polygons().geoms for ring in (polygon.exterior, *polygon.interiors)]
    write_thumbnail(layout.thumbnail_jpg, small, [np.asarray(ring.coords) for ring in rings])
    field = densest_field(layout.nuclei_parquet, OVERLAY_SIDE, canvas)
    level0 = Grid(canvas, 1.0, 1.0, work.info.mpp, canvas)
    close = View(reader.read(field, level0), field.x0, field.y0, 1.0, 1.0)
    write_overlay(layout.overlay_jpg, close, layout.nuclei_parquet, work.card.taxonomy)


def discard_predictions(layout: SlideLayout) -> None:
    """Remove the slide's store; only once slide.json is there, for a table is made from it."""
    shutil.rmtree(layout.predictions_zarr, ignore_errors=True)
