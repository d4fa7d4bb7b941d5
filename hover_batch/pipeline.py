"""One slide's whole way, on one page: infer(unit) → post(unit) → finalize(slide).

Where another run kept the slide's maps, there is nothing to infer, and no pixels to draw on: post(unit) → finalize.

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

from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.cohort.run_key import run_key
from hover_batch.config import Settings
from hover_batch.errors import SlideError
from hover_batch.export.pictures import View, densest_field, write_overlay, write_thumbnail
from hover_batch.export.summary import slide_summary
from hover_batch.files import sha256_file, to_json, write_atomically, write_first
from hover_batch.geometry import Box, Grid
from hover_batch.model.heads import MapLayout
from hover_batch.model.package import Card, Package
from hover_batch.nuclei.stitch import nuclei_of_region
from hover_batch.nuclei.table import SCHEMA_VERSION, TableContext, merge_parts, to_arrow, write_part
from hover_batch.nuclei.watershed import SobelConstants
from hover_batch.plan import PlannedSlide, StoredMaps
from hover_batch.slide.reader import SlideInfo, SlideReader, open_slide
from hover_batch.slide.staging import Copies
from hover_batch.slide.survey import read_info, read_tissue, write_survey
from hover_batch.slide.tiles import Unit, plan_units
from hover_batch.slide.tissue import TissueMask, tissue_mask
from hover_batch.store import PredictionStore
from hover_batch.taxonomy import Taxonomy
from hover_batch.version import __version__

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
    """Nuclei reach into units, named by (column, row), whose maps are not there yet; or of a whole slide, the units'
    results are not seen here yet."""

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
    key_mark: bytes
    """Content of the slide's key.json when the work began: see `stand_aside`."""
    kept: StoredMaps | None = None

    @property
    def card(self) -> Card:
        return self.package.card

    @property
    def maps(self) -> SlideLayout:
        """Where the store and the units' markers lie: here, or in the run that kept them, which is only read."""
        return self.layout if self.kept is None else self.kept.layout

    @property
    def taxonomy(self) -> Taxonomy:
        """The classes of the tables: the model's, or what the class map makes of them."""
        return self.card.taxonomy.merged(self.settings.post.class_map)[0]

    @property
    def context(self) -> TableContext:
        return TableContext(
            slide_id=self.record.slide_id,
            taxonomy=self.taxonomy,
            grid=self.grid,
            slide_mpp=self.info.mpp,
            mpp_source=self.info.mpp_source,
            bounds=self.info.bounds,
            model_id=self.card.name,
            model_sha256=self.package.sha256,
            software=__version__,
        )


def result_key(slide: PlannedSlide, package: Package, settings: Settings) -> str:
    """The slide's run key: a hash of all that its results depend on, its own mask among it; or the run key of the
    maps that are kept."""
    mask = slide.record.mask_path
    if slide.kept is not None:
        source = slide.kept.run_key
    else:
        source = slide.info.fingerprint + ("" if mask is None else sha256_file(mask))
    return run_key(package.sha256, settings.results_key(), source, SCHEMA_VERSION)


@contextmanager
def opened(slide: PlannedSlide | SlideWork, copies: Copies) -> Iterator[SlideReader | None]:
    """The slide, open, copied to this machine where it lies in other storage; None where its maps are kept, for then it
    need not be there."""
    if slide.kept is not None:
        yield None
        return
    with copies.staged(slide.record, slide.info.fingerprint) as record, open_slide(record) as reader:
        yield reader


def survey(
    reader: SlideReader | None, slide: PlannedSlide, package: Package, settings: Settings, layout: SlideLayout
) -> SlideWork:
    """Lay the grid, find the tissue and cut it into units; without a reader, as the run did that kept the maps."""
    if slide.kept is not None:
        path = slide.kept.layout.survey_json
        info, mask = read_info(path), read_tissue(path)
    else:
        assert reader is not None
        info, mask = reader.info, tissue_mask(reader, slide.record, settings.tissue)
    write_survey(layout.survey_json, info, mask)
    grid = Grid.over(info.level0, info.mpp, package.card.mpp)
    units = plan_units(grid, mask, settings.infer.unit, package.card.tile_out)
    mark = layout.key_json.read_bytes()
    return SlideWork(slide.record, info, grid, mask, units, package, settings, layout, mark, slide.kept)


def stand_aside(work: SlideWork) -> None:
    """SlideError where the slide's folder has passed to a run of another key: a process that was thought dead, on a
    machine that was lost, must not mix its results into that run's. Asked before each write."""
    try:
        ours = work.layout.key_json.read_bytes() == work.key_mark
    except FileNotFoundError:
        ours = False
    if not ours:
        raise SlideError(f"{work.layout.folder}: another run has taken over; nothing was written")


def open_store(work: SlideWork) -> PredictionStore:
    """The slide's store, made where it is not there yet; that of a run which kept it is opened for reading."""
    if work.kept is not None:
        store = PredictionStore.open(work.maps.predictions_zarr, read_only=True)
        planes, unit = work.card.layout.planes, work.settings.infer.unit
        if store.canvas != work.grid.size.box or store.array.shards != (planes, unit, unit):
            raise SlideError(f"{store.path}: is not laid out as its run's settings and survey.json say; run it anew")
        return store
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


def swept_store(work: SlideWork) -> PredictionStore:
    """`open_store`, with what killed writes left behind removed, unless another run keeps it. While nobody writes."""
    store = open_store(work)
    if work.kept is None:
        store.sweep()
    return store


def inferred(unit: Unit, work: SlideWork, store: PredictionStore) -> bool:
    """Whether the unit's maps are in the store, unharmed: its marker is there and tells the hash of the shard.

    A shard that is not what its marker says is removed with it, to be predicted again, and so are the parts of the
    regions that may have looked at it; in the store that another run kept, it is a SlideError. Call it while nobody
    writes.
    """
    path = work.maps.marker(unit.column, unit.row)
    try:
        marker = json.loads(path.read_bytes())
    except FileNotFoundError:
        marker = None
    except ValueError:
        marker = {}
    if marker and "shard_sha256" in marker and marker["shard_sha256"] == store.shard_sha256(unit.box):
        return True
    if work.kept is not None:
        raise SlideError(
            f"{work.maps.predictions_zarr}: unit {unit.unit_id} is not as it was predicted; remove "
            f"{work.maps.slide_json} and run that folder's own command again, which mends it"
        )
    if marker is None:
        return False
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

    A shard found without a marker was written by a run that died in between: it is adopted. Where the device ran out
    of memory, the marker tells of the smaller batch, which may have moved the last bits of the maps.
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
        stand_aside(work)
        with seconds.of("write"):
            digest = store.write(unit.box, maps)
    marker: dict[str, Any] = {"unit": unit.unit_id, "tiles": len(unit.cells), "shard_sha256": digest}
    if predictor.at_once < predictor.batch:
        marker["batch"] = predictor.at_once
    stand_aside(work)
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


def reading(reader: SlideReader | None, work: SlideWork) -> ReadBlocks:
    """Blocks read by an open reader, here and now."""

    def read(boxes: list[Box], seconds: Seconds) -> Iterator[NDArray[np.uint8]]:
        assert reader is not None
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
        layout = MapLayout(len(work.taxonomy.classes))
        nuclei = nuclei_of_region(_complete(store, work), unit.box, layout, settings, constants)
        stand_aside(work)
        write_part(work.layout.part(unit.column, unit.row), to_arrow(nuclei, work.context))
    return seconds


def _seen(unit: Unit, work: SlideWork, store: PredictionStore) -> bool:
    """Whether the unit's maps can be read here. A network file system may show the marker before the shard, which a
    read would take for zeros."""
    try:
        marker = json.loads(work.maps.marker(unit.column, unit.row).read_bytes())
    except FileNotFoundError:
        return False
    return marker["shard_sha256"] is None or store.has_shard(unit.box)


def _complete(store: PredictionStore, work: SlideWork) -> Callable[[Box], NDArray[np.uint8]]:
    """`store.read` in the tables' classes, but never of a unit that is still to be predicted."""
    class_map = work.settings.post.class_map
    _, ids = work.card.taxonomy.merged(class_map)
    waiting = {(unit.column, unit.row): unit for unit in work.units}

    def read(box: Box) -> NDArray[np.uint8]:
        needed = waiting.keys() & set(box.intersect(store.canvas).cells(work.settings.infer.unit))
        if missing := [cell for cell in needed if not _seen(waiting[cell], work, store)]:
            raise UnitsMissing(tuple(sorted(missing)))
        for cell in needed:
            del waiting[cell]
        maps = store.read(box)
        return work.card.layout.merge(maps, ids) if class_map else maps

    return read


def finalize(work: SlideWork, reader: SlideReader | None, seconds: Seconds) -> dict[str, Any]:
    """Merge the parts into nuclei.parquet and draw the pictures. Returns what slide.json says, the summary among it.

    Without a reader there are no pixels to draw on: the thumbnail is that of the run which kept the maps.

    Raises UnitsMissing where parts or markers, written elsewhere, are not seen here yet.
    """
    layout, record = work.layout, work.record
    cells = [(unit.column, unit.row) for unit in work.units]
    if unseen := [c for c in cells if not (layout.part(*c).exists() and work.maps.marker(*c).exists())]:
        raise UnitsMissing(tuple(unseen))
    with seconds.of("finalize"):
        keep = work.mask.contains if work.mask.given else None
        parts = [(unit.row, layout.part(unit.column, unit.row)) for unit in work.units]
        stand_aside(work)
        merged = merge_parts(parts, layout.nuclei_parquet, work.context, keep)
        work.mask.write_geojson(layout.tissue_geojson, work.info.bounds)
        if reader is not None:
            _draw(work, reader)
        elif work.maps.thumbnail_jpg.is_file():
            shutil.copyfile(work.maps.thumbnail_jpg, layout.thumbnail_jpg)
    write_atomically(layout.timings_json, to_json(seconds.totals))
    return {
        "nuclei": merged.nuclei,
        "nuclei_sha256": sha256_file(layout.nuclei_parquet),
        "seam_uncertain": merged.seam_uncertain,
        "units": len(work.units),
        "tiles": sum(len(u.cells) for u in work.units),
        "mpp": [work.info.mpp.x, work.info.mpp.y],
        "inference_mpp": [work.grid.mpp.x, work.grid.mpp.y],
        "warnings": [*work.info.warnings, *_smaller_batches(work)],
        "summary": slide_summary(
            record,
            work.taxonomy,
            status="done",
            nuclei=layout.nuclei_parquet,
            tissue_mm2=work.mask.area_mm2(work.info.mpp),
            seconds=seconds.totals,
        ),
    }


def _smaller_batches(work: SlideWork) -> list[str]:
    """What the markers tell of devices that ran out of memory, as one warning or none."""
    markers = [json.loads(work.maps.marker(unit.column, unit.row).read_bytes()) for unit in work.units]
    if halved := [marker["batch"] for marker in markers if "batch" in marker]:
        return [
            f"{len(halved)} of {len(markers)} units were predicted in batches of {min(halved)}, for want of memory on "
            "the device: another run may differ in the last bits; give a smaller --batch"
        ]
    return []


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
    write_overlay(layout.overlay_jpg, close, layout.nuclei_parquet, work.taxonomy)


def discard_predictions(layout: SlideLayout) -> None:
    """Remove the slide's store; only once slide.json is there, for a table is made from it."""
    shutil.rmtree(layout.predictions_zarr, ignore_errors=True)
