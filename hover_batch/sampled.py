"""Choose what to process next of a slide, and finish it: the whole slide or, with --stop-at, some of its clusters.

A look is processed like a slide whose units are the clusters that are drawn up to it. If its interval is too wide, the
next look adds clusters; after the last look, the whole slide is processed. Tiles are not predicted twice.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hover_batch.cohort.record import Stage
from hover_batch.config import SampleSettings
from hover_batch.export.summary import slide_summary
from hover_batch.files import read_json, to_json, write_atomically
from hover_batch.formatting import counted
from hover_batch.nuclei.table import merge_parts
from hover_batch.pipeline import UnitsMissing, finalize, verify_unit
from hover_batch.sampling.clusters import area_sums, clusters_of
from hover_batch.sampling.draw import Draw, draw
from hover_batch.sampling.estimate import ERROR, Density, Sample
from hover_batch.seconds import Seconds
from hover_batch.slide.reader import SlideReader
from hover_batch.slide.tiles import Unit
from hover_batch.slide_pictures import draw_thumbnail
from hover_batch.slide_work import SlideWork, open_sampled_tiles, refuse_if_replaced, refuse_if_taken_over

PICTURE_SIDE = 2048
"""Longer side in pixels of the picture on which the stain of the clusters is measured."""
_RED = 0
"""Channel that hematoxylin absorbs and eosin hardly absorbs."""


def next_work(work: SlideWork, reader: SlideReader | None) -> SlideWork:
    """Return what to process next: a sample of the slide's clusters for an estimate (--stop-at), or the whole slide.

    The clusters are squares of the slide. They are drawn and stored in clusters.json on the first call. A sample that
    was evaluated already, and whose estimate is not precise enough, is followed by a larger one, and the last sample by
    the whole slide. The result depends only on the slide and these evaluations, so a resumed run continues with the
    same clusters. If the slide has too few clusters for an estimate, the result is the whole slide, with a warning.

    Working files of clusters of another size are removed. Before the whole slide is processed, corrupted tiles of
    clusters are removed. Call this only while nothing writes to the slide's results.

    `work`: the surveyed slide. `reader`: reader of the slide; None for stored maps, which are not sampled.

    SlideError if the slide cannot be read, OSError if a file cannot be read, written or removed; errors of zarr, mostly
    ValueError, if the store of the clusters' tiles is corrupted.
    """
    if reader is None:
        return work
    settings, layout = work.settings.sample, work.layout.sample
    if settings.stop_at:
        clusters = clusters_of(work.units, work.grid.size, settings.cluster)
        tissue_mm2, drawn = _drawn(work, clusters, reader)
        for look in range(len(drawn.looks)):
            if not _is_too_wide(read_json(layout.look_json(look)), settings):
                layout.markers.mkdir(exist_ok=True)
                layout.parts.mkdir(exist_ok=True)
                return _at_look(look, work, clusters, tissue_mm2, drawn)
        if not drawn.looks:
            work = _with_warning(
                work,
                f"--stop-at: {counted(len(clusters), 'cluster')} with tissue, too few for an estimate, so the whole "
                "slide is processed",
            )
    _remove_corrupted(work)
    return work


def _with_warning(work: SlideWork, warning: str) -> SlideWork:
    return replace(work, info=replace(work.info, warnings=(*work.info.warnings, warning)))


def _remove_corrupted(work: SlideWork) -> None:
    """Remove corrupted tiles of clusters, because units of the whole slide will use the tiles."""
    layout = work.layout.sample
    if (store := open_sampled_tiles(work)) is None:
        return
    if (stored := read_json(layout.clusters_json)) is None:
        shutil.rmtree(layout.working)
        return
    store.sweep()
    of_clusters = replace(work, layout=layout)
    for unit in clusters_of(work.units, work.grid.size, stored["side"]):
        if layout.marker(unit.column, unit.row).exists():
            verify_unit(unit, of_clusters, store)


def _is_too_wide(look: Mapping[str, Any] | None, settings: SampleSettings) -> bool:
    """Return whether the interval of a look was too wide. `look`: content of its file; None if there is none."""
    density = (look or {}).get("densities", {}).get(settings.of)
    return density is not None and not Density(**density).is_within(settings.stop_at)


def _at_look(
    look: int, work: SlideWork, clusters: tuple[Unit, ...], tissue_mm2: NDArray[np.float64], drawn: Draw
) -> SlideWork:
    """Return the work on the clusters that are drawn up to a look: they are its units."""
    chosen = drawn.sample(look)
    sample = Sample(
        look=look,
        looks=len(drawn.looks),
        tissue_mm2=tissue_mm2[chosen],
        stratum=drawn.stratum[chosen],
        clusters=np.bincount(drawn.stratum),
        tiles=sum(len(unit.tile_cells) for unit in work.units),
    )
    return replace(work, units=tuple(clusters[i] for i in chosen), layout=work.layout.sample, sample=sample)


def _drawn(work: SlideWork, clusters: tuple[Unit, ...], reader: SlideReader) -> tuple[NDArray[np.float64], Draw]:
    """Return the tissue area in mm² of each cluster, (n,), and the draw; read them, or make and store them."""
    layout, side = work.layout.sample, work.settings.sample.cluster
    stored = read_json(layout.clusters_json)
    if stored is None or stored["side"] != side:
        shutil.rmtree(layout.working, ignore_errors=True)
        layout.working.mkdir()
        stored = _draw(work, clusters, reader)
        write_atomically(layout.clusters_json, to_json(stored))
    columns = {name: np.array([row[name] for row in stored["clusters"]]) for name in ("tissue_mm2", "stratum", "rank")}
    return columns["tissue_mm2"], Draw(columns["stratum"], columns["rank"])


def _draw(work: SlideWork, clusters: tuple[Unit, ...], reader: SlideReader) -> dict[str, Any]:
    """Draw the clusters, and return the content of clusters.json."""
    side, mpp, canvas = work.settings.sample.cluster, work.info.mpp, work.grid.level0
    tissue = area_sums(work.mask.array, work.mask.level0_per_pixel, clusters, work.grid, side)
    picture = reader.thumbnail(PICTURE_SIDE)[:, :, _RED]
    absorbed = -np.log10((picture.astype(np.float64) + 1) / 256)
    scale = canvas.width / picture.shape[1], canvas.height / picture.shape[0]
    stain = area_sums(absorbed, scale, clusters, work.grid, side) / np.maximum(tissue, 1)
    # The seed depends on the slide only, so that other models draw the same clusters and can be compared.
    seed = int(hashlib.sha256(work.info.fingerprint.encode()).hexdigest()[:8], 16)
    drawn = draw(tissue, stain, seed)
    rows = [
        {
            "column": unit.column,
            "row": unit.row,
            "tissue_mm2": float(tissue[i] * (mpp.x * mpp.y / 1e6)),
            "stain": float(stain[i]),
            "stratum": int(drawn.stratum[i]),
            "rank": int(drawn.rank[i]),
        }
        for i, unit in enumerate(clusters)
    ]
    return {"seed": seed, "side": side, "clusters": rows}


def finish(work: SlideWork, reader: SlideReader | None, seconds: Seconds) -> dict[str, Any] | None:
    """Finalize a whole slide, or estimate its density from the clusters of a sample (--stop-at).

    Return the content of slide.json or estimate.json, which the caller writes. None if the estimate is not precise
    enough; then call `next_work` again. All other files are written here. For a whole slide, these are the files of
    `finalize`; for an estimate, its evaluation, the table of the clusters' nuclei, tissue.geojson, the thumbnail and
    timings.json.

    `work`: result of `next_work`, whose units are all predicted and post-processed. `reader`: reader of the slide; None
    for stored maps. `seconds`: times of all earlier steps of the slide; the time of this step is added in place.

    UnitsMissing if results that another node wrote are not visible here yet. SlideError if another run has taken over
    the slide's folder, the slide's file was replaced or changed meanwhile, two regions hold the same nucleus, a shard
    is corrupted, or the slide cannot be read. pyarrow.ArrowInvalid if a part is corrupted, OSError if a file cannot be
    read or written.
    """
    if work.sample is None or reader is None:
        result: dict[str, Any] | None = finalize(work, reader, seconds)
    else:
        result = _finish_look(work, work.sample, reader, seconds)
    refuse_if_replaced(work)
    return result


def _finish_look(work: SlideWork, sample: Sample, reader: SlideReader, seconds: Seconds) -> dict[str, Any] | None:
    """Estimate the densities, and return the content of estimate.json; None if the density `of` is not precise enough.

    In the first case, also write the table of the clusters' nuclei, tissue.geojson, the thumbnail and timings.json.
    """
    layout = work.layout.sample
    parts = [(unit.row, layout.part(unit.column, unit.row)) for unit in work.units]
    if unseen := [(unit.column, unit.row) for unit in work.units if not layout.part(unit.column, unit.row).exists()]:
        raise UnitsMissing(tuple(unseen))
    with seconds.measure(Stage.FINALIZE):
        densities = _densities(work, sample)
        estimate = {
            "of": work.settings.sample.of,
            "stop_at": work.settings.sample.stop_at,
            "clusters": len(work.units),
            "of_clusters": int(sample.clusters.sum()),
            "tiles": len({cell for unit in work.units for cell in unit.tile_cells}),
            "of_tiles": sample.tiles,
            "error": ERROR,
            "densities": {name: density.to_json() for name, density in densities.items()},
        }
        refuse_if_taken_over(work)
        write_atomically(layout.look_json(sample.look), to_json(estimate))
        if not densities[work.settings.sample.of].is_within(work.settings.sample.stop_at):
            return None
        select = work.mask.contains if work.mask.given else None
        merge_parts(parts, layout.sampled_nuclei_parquet, replace(work.context, estimate=estimate), select)
        work.mask.write_geojson(layout.tissue_geojson, work.info.bounds)
        draw_thumbnail(work, reader)
    write_atomically(layout.timings_json, to_json(seconds.totals))
    summary = slide_summary(
        work.record,
        work.taxonomy,
        status="estimated",
        nuclei=None,
        tissue_mm2=work.mask.area_mm2(work.info.mpp),
        seconds=seconds.totals,
        error=work.count_error,
        estimate=estimate,
    )
    return {"estimate": estimate, "warnings": list(work.info.warnings), "summary": summary}


def _densities(work: SlideWork, sample: Sample) -> dict[str, Density]:
    """Return the estimated densities by name: `nuclei`, and each class."""
    classes = work.taxonomy.classes
    by_class = np.zeros((len(work.units), len(classes)), np.int64)
    for counts, unit in zip(by_class, work.units, strict=True):
        with pq.ParquetFile(work.layout.part(unit.column, unit.row)) as part:
            nuclei = part.read(["type_id", "centroid_x", "centroid_y"])
        types = nuclei["type_id"].to_numpy()
        if work.mask.given:
            types = types[work.mask.contains(nuclei["centroid_x"].to_numpy(), nuclei["centroid_y"].to_numpy())]
        counts += np.bincount(types, minlength=len(classes))
    counted = {"nuclei": by_class.sum(axis=1)} | {kind.name: by_class[:, kind.id] for kind in work.taxonomy.nuclei}
    return {name: sample.density(counts) for name, counts in counted.items()}
