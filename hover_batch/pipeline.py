"""Process one surveyed slide in three steps: infer(unit) → post(unit) → finalize(slide).

`slide_work.survey` comes before them, and `sampled` wraps both ends for estimates (--stop-at). For a slide whose maps
another run has stored, infer is skipped, and no pixels are read.

The executors decide where and when a step runs, and skip steps whose results exist: a unit's shard and marker, a
region's part, the slide's slide.json. Each step writes its result completely or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.blocks import ReadBlocks
from hover_batch.blocks import batches as tile_batches
from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.record import Stage
from hover_batch.errors import SlideError
from hover_batch.export.summary import slide_summary
from hover_batch.files import sha256_file, to_json, write_atomically, write_first
from hover_batch.geometry import Box
from hover_batch.model.heads import MapLayout
from hover_batch.model.in_flight import in_flight
from hover_batch.nuclei.energy import mask_hv
from hover_batch.nuclei.stitch import Read, nuclei_of_region
from hover_batch.nuclei.systems import splitter_of
from hover_batch.nuclei.table import merge_parts, to_arrow, write_part
from hover_batch.quality.measures import field_sharpness, mean_measures, sampled_fields
from hover_batch.seconds import Seconds
from hover_batch.slide.reader import SlideReader
from hover_batch.slide.tiles import Unit
from hover_batch.slide_pictures import draw_overlay, draw_thumbnail
from hover_batch.slide_work import SlideWork, open_sampled_tiles, open_store, refuse_if_taken_over
from hover_batch.store import PredictionStore

if TYPE_CHECKING:  # it imports torch, which readers and post-processing do not need
    from hover_batch.model.predict import Predictor


class NetworkFailed(Exception):
    """The network raised an exception: it ran out of memory, or its device is broken. Usually not the slide's fault."""


class UnitsMissing(Exception):
    """A step needs units that are not predicted yet, or that another node wrote and are not visible here yet.

    `unit_cells`: (column, row) of each of these units in the unit grid.
    """

    def __init__(self, unit_cells: tuple[tuple[int, int], ...]) -> None:
        super().__init__(unit_cells)
        self.unit_cells = unit_cells


def verify_unit(unit: Unit, work: SlideWork, store: PredictionStore) -> bool:
    """Return whether the unit's maps are stored and intact: its marker exists and has the checksum of its shard.

    On a checksum mismatch, the shard, its marker, and the post-processed parts that may have used it are removed, and
    the result is False; the caller must then predict the unit again. Without a marker, the result is False and nothing
    is removed. Call this only while nothing writes to the slide.

    `work`: slide of the unit. `store`: store of the slide.

    If the store belongs to another run, whose files must not change, SlideError instead of False. OSError if a file
    cannot be read or removed.
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
    if work.stored is not None:
        raise SlideError(
            f"{work.maps.predictions_zarr}: checksum mismatch in unit {unit.unit_id}; remove "
            f"{work.maps.slide_json} and repeat that run's own segment command, which predicts the unit again"
        )
    if marker is None:
        return False
    for cell in neighbours(unit):
        work.layout.part(*cell).unlink(missing_ok=True)
    path.unlink()
    store.remove(unit.box)
    return False


def is_post_processed(unit: Unit, work: SlideWork) -> bool:
    """Return whether the region of `unit` is post-processed, which means that its part of the slide's table exists."""
    return work.layout.part(unit.column, unit.row).exists()


def infer(
    unit: Unit,
    work: SlideWork,
    read: ReadBlocks,
    predictor: Predictor,
    store: PredictionStore,
    advance: Callable[[int], None],
) -> Seconds:
    """Run the network on a unit's tiles, and write its shard, then its marker. Return the seconds by stage.

    If there is a shard without a marker, from a process that was killed in between, only the marker is written. Tiles
    already predicted for an earlier estimate of the slide (--stop-at) are copied instead of predicted again. If the
    device ran out of memory, the marker records the smaller batch size, which may have changed the last bits of the
    maps.

    `work`: slide of the unit. `read`: function that reads the pixels. `predictor`: network, which several threads may
    share. `store`: store of the slide. `advance`: function that is called with the number of tiles that are newly done,
    after each batch and for tiles that were stored already.

    NetworkFailed if the network raises an exception; SlideError if the slide cannot be read, a shard of an estimate is
    corrupted, or another run has taken over the slide's folder; OSError if a file cannot be read or written.
    """
    seconds = Seconds()
    # A cluster has several shards, which it shares with other clusters.
    digest = store.shard_sha256(unit.box) if work.sample is None else None
    if digest is not None:
        advance(len(unit.tile_cells))
    else:
        maps = np.zeros((work.card.layout.planes, *unit.box.shape), np.uint8)
        tiles_to_predict = _copy_sampled(unit, work, maps)
        advance(len(unit.tile_cells) - len(tiles_to_predict))
        batches = tile_batches(tiles_to_predict, work.card.margin, read, predictor.batch, seconds)
        # Only errors of the network become NetworkFailed, not those of reading the next tiles.
        submit = _as_network_failed()(predictor.submit)  # as a decorator, it wraps each call
        for tiles, pending in in_flight(batches, submit):
            with _as_network_failed():
                predicted = pending.result()
            seconds.add_span(Stage.INFER, pending.seconds, pending.span)
            for tile, tile_maps in zip(tiles, predicted, strict=True):
                _paste(tile_maps, tile, maps, unit.box)
            advance(len(tiles))
        refuse_if_taken_over(work)
        with seconds.measure(Stage.WRITE):
            if store.hv_masked:
                mask_hv(maps)
            digest = store.write(unit.box, maps)
    marker: dict[str, Any] = {"unit": unit.unit_id, "tiles": len(unit.tile_cells), "shard_sha256": digest}
    if predictor.at_once < predictor.batch:
        marker["batch"] = predictor.at_once
    refuse_if_taken_over(work)
    write_first(work.layout.marker(unit.column, unit.row), to_json(marker))
    return seconds


def _paste(tile_maps: NDArray[np.uint8], tile: Box, maps: NDArray[np.uint8], box: Box) -> None:
    """Copy the maps of a tile to those of `box`, as far as the tile lies in it; both are (plane, y, x) uint8."""
    inside = tile.intersect(box)
    rows, columns = inside.slices_in(box)
    tile_rows, tile_columns = inside.slices_in(tile)
    maps[:, rows, columns] = tile_maps[:, tile_rows, tile_columns]


def _copy_sampled(unit: Unit, work: SlideWork, maps: NDArray[np.uint8]) -> list[Box]:
    """Copy the tiles of a unit that a sample has predicted to its maps (plane, y, x) uint8. Return the other tiles."""
    sampled = open_sampled_tiles(work)
    if sampled is None:
        return list(unit.tiles)
    others = []
    for tile in unit.tiles:
        if sampled.has_shard(tile):
            _paste(sampled.read(tile), tile, maps, unit.box)
        else:
            others.append(tile)
    return others


@contextmanager
def _as_network_failed() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise NetworkFailed(f"{type(error).__name__}: {error}") from error


def neighbours(unit: Unit) -> Iterator[tuple[int, int]]:
    """Yield the (column, row) in the unit grid of a unit and its eight neighbours.

    Post-processing of the unit's region usually needs these units. Some cells may lie outside the slide.
    """
    for row in (unit.row - 1, unit.row, unit.row + 1):
        for column in (unit.column - 1, unit.column, unit.column + 1):
            yield column, row


def post(unit: Unit, work: SlideWork, store: PredictionStore) -> Seconds:
    """Post-process a unit's region, and write its nuclei as a part of the slide's table. Return the seconds by stage.

    For a cluster of a sample, maps outside of its box count as zero, so its nuclei do not depend on which other
    clusters are predicted.

    `work`: slide of the unit. `store`: store from which the maps of the unit and its neighbours are read.

    UnitsMissing if units that are needed are not predicted yet or not visible here. SlideError if another run has taken
    over the slide's folder, or a shard is corrupted. OSError if a shard cannot be read or the part cannot be written.
    """
    seconds = Seconds()
    settings = work.settings.post
    splitter = splitter_of(work.card, settings.sobel_norm)
    with seconds.measure(Stage.POST):
        layout = MapLayout(len(work.taxonomy.classes))
        read = _checked_read(store, work)
        if work.sample is not None:
            read = _only_in(unit.box, read)
        nuclei = nuclei_of_region(read, work.core(unit), layout, settings, splitter)
        refuse_if_taken_over(work)
        write_part(work.layout.part(unit.column, unit.row), to_arrow(nuclei, work.context))
    return seconds


def _can_be_read(unit: Unit, work: SlideWork, store: PredictionStore) -> bool:
    """Return whether the unit's maps can be read here.

    The shard is checked, too, since a network file system may show the marker before it, and a missing shard reads as
    zeros.
    """
    try:
        marker = json.loads(work.maps.marker(unit.column, unit.row).read_bytes())
    except FileNotFoundError:
        return False
    if work.sample is not None:  # of several shards, some may not be visible
        return bool(marker["shard_sha256"] == store.shard_sha256(unit.box))
    return marker["shard_sha256"] is None or store.has_shard(unit.box)


def _checked_read(store: PredictionStore, work: SlideWork) -> Read:
    """Return a function like `store.read` that merges classes by the class map, and checks the units that it reads.

    It raises UnitsMissing for units that are not predicted yet or not visible here. Each unit is checked once.
    """
    class_map = work.settings.post.class_map
    _, ids = work.card.taxonomy.merged(class_map)
    unchecked = {(unit.column, unit.row): unit for unit in work.units}
    side = work.settings.infer.unit if work.sample is None else work.settings.sample.cluster

    def read(box: Box) -> NDArray[np.uint8]:
        needed = unchecked.keys() & set(box.intersect(store.canvas).cells(side))
        if missing := [cell for cell in needed if not _can_be_read(unchecked[cell], work, store)]:
            raise UnitsMissing(tuple(sorted(missing)))
        for cell in needed:
            del unchecked[cell]
        maps = store.read(box)
        return work.card.layout.merge(maps, ids) if class_map else maps

    return read


def _only_in(window: Box, read: Read) -> Read:
    """Return a function like `read` whose maps are zero outside of `window`.

    So the nuclei of a cluster do not depend on which clusters around it are predicted, too.
    """

    def read_inside(box: Box) -> NDArray[np.uint8]:
        inside = box.intersect(window)
        if inside == box:
            return read(box)
        part = read(inside)
        maps = np.zeros((len(part), *box.shape), np.uint8)
        if not inside.empty:
            _paste(part, inside, maps, box)
        return maps

    return read_inside


def finalize(work: SlideWork, reader: SlideReader | None, seconds: Seconds) -> dict[str, Any]:
    """Merge the parts into nuclei.parquet, and return the content of slide.json, which the caller writes.

    The keys of the content are `nuclei` (number), `nuclei_bytes` and `nuclei_sha256` (of the table), `seam_uncertain`,
    `units`, `tiles`, `mpp` and `inference_mpp` ([x, y] in µm), `warnings`, `quality` (measures by name), `limits` (from
    the card) and `summary` (the slide's row). The files thumbnail.jpg, overlay.jpg, tissue.geojson and timings.json are
    written, too. If `reader` is None, there is no overlay, and the thumbnail and its measures are copied from the run
    that stored the maps.

    `work`: slide whose units are all predicted and post-processed. `reader`: reader of the slide; None if stored maps
    are used. `seconds`: times of all earlier steps of the slide; the time of this step is added in place.

    UnitsMissing if parts, markers or maps that another node wrote are not visible here yet. SlideError if another run
    has taken over the slide's folder, two regions hold the same nucleus, a shard is corrupted, or the slide cannot be
    read. pyarrow.ArrowInvalid if a part is corrupted, OSError if a file cannot be read or written.
    """
    layout, record = work.layout, work.record
    cells = [(unit.column, unit.row) for unit in work.units]
    if unseen := [c for c in cells if not (layout.part(*c).exists() and work.maps.marker(*c).exists())]:
        raise UnitsMissing(tuple(unseen))
    with seconds.measure(Stage.FINALIZE):
        select = work.mask.contains if work.mask.given else None
        parts = [(unit.row, layout.part(unit.column, unit.row)) for unit in work.units]
        refuse_if_taken_over(work)
        with ThreadPoolExecutor(1, "pictures") as pictures:  # reading and drawing mostly release Python's lock
            thumbnail = pictures.submit(draw_thumbnail, work, reader)
            merged = merge_parts(parts, layout.nuclei_parquet, work.context, select)
            overlay = pictures.submit(draw_overlay, work, reader)
            work.mask.write_geojson(layout.tissue_geojson, work.info.bounds)
            quality = {**_measure_nuclei(work), **thumbnail.result()}
            overlay.result()
    write_atomically(layout.timings_json, to_json(seconds.totals))
    return {
        "nuclei": merged.nuclei,
        "nuclei_bytes": layout.nuclei_parquet.stat().st_size,
        "nuclei_sha256": sha256_file(layout.nuclei_parquet),
        "seam_uncertain": merged.seam_uncertain,
        "units": len(work.units),
        "tiles": sum(len(u.tile_cells) for u in work.units),
        "mpp": [work.info.mpp.x, work.info.mpp.y],
        "inference_mpp": [work.grid.mpp.x, work.grid.mpp.y],
        "warnings": [*work.info.warnings, *_smaller_batches(work)],
        "quality": quality,
        "limits": dict(work.card.limits),
        "summary": slide_summary(
            record,
            work.taxonomy,
            status="done",
            nuclei=layout.nuclei_parquet,
            tissue_mm2=work.mask.area_mm2(work.info.mpp),
            seconds=seconds.totals,
            error=work.count_error,
        ),
    }


def _smaller_batches(work: SlideWork) -> list[str]:
    """Return a warning if units were predicted in smaller batches because a device ran out of memory."""
    markers = [json.loads(work.maps.marker(unit.column, unit.row).read_bytes()) for unit in work.units]
    if halved := [marker["batch"] for marker in markers if "batch" in marker]:
        return [
            f"{len(halved)} of {len(markers)} units were predicted in batches of {min(halved)}, because the device "
            "ran out of memory; another run may differ in the last bits, unless you give a smaller --batch"
        ]
    return []


def _measure_nuclei(work: SlideWork) -> dict[str, Any]:
    """Measure the quality of what the table and the stored maps hold."""
    layout = MapLayout(len(work.taxonomy.classes))
    fields = sampled_fields(work.layout.nuclei_parquet, work.grid)
    read = _checked_read(open_store(work), work)
    return {**mean_measures(work.layout.nuclei_parquet), "sharpness": field_sharpness(fields, read, layout)}


def discard_sample(layout: SlideLayout) -> None:
    """Remove the files of an estimate of the slide (--stop-at): its working files and the table of its nuclei.

    Call this only once slide.json exists. `layout`: paths of the slide.

    OSError if the table, sampled_nuclei.parquet, cannot be removed. Errors while removing the working files are
    ignored.
    """
    shutil.rmtree(layout.sample.working, ignore_errors=True)
    layout.sampled_nuclei_parquet.unlink(missing_ok=True)


def discard_predictions(layout: SlideLayout) -> None:
    """Remove the slide's prediction store, if there is one. Errors are ignored.

    Call this only once slide.json exists, since the table is made from the store. `layout`: paths of the slide.
    """
    shutil.rmtree(layout.predictions_zarr, ignore_errors=True)
