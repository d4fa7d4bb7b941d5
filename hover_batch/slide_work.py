"""Prepare one slide: its run key, its grid, tissue and units, and its store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.cohort.run_key import run_key
from hover_batch.config import PostSettings, Settings
from hover_batch.errors import SlideError
from hover_batch.files import sha256_file
from hover_batch.geometry import Box, Grid, cell_box
from hover_batch.model.card import Card
from hover_batch.model.package import Package
from hover_batch.nuclei.table import SCHEMA_VERSION, TableContext
from hover_batch.plan import PlannedSlide, StoredMaps
from hover_batch.quality.flags import flag_slides
from hover_batch.sampling.estimate import Sample
from hover_batch.slide.doubts import doubts_of_levels, share_on_tissue
from hover_batch.slide.given_mask import check_mask
from hover_batch.slide.reader import SlideInfo, SlideReader, open_slide, peek
from hover_batch.slide.staging import Copies
from hover_batch.slide.survey import read_info, read_tissue, write_survey
from hover_batch.slide.tiles import Unit, plan_units
from hover_batch.slide.tissue import TissueMask, tissue_mask
from hover_batch.store import HV_MASKED, PredictionStore
from hover_batch.taxonomy import Taxonomy
from hover_batch.uncertainty import CountError, Uncertainty
from hover_batch.version import __version__

COARSEST = 1.25
"""Pixel size of a slide, relative to the model's, up to which the errors measured at the model's hold."""


@dataclass(frozen=True)
class SlideWork:
    """Slide that is ready to be processed."""

    record: SlideRecord
    """Row of the cohort."""
    info: SlideInfo
    """Header of the slide."""
    grid: Grid
    """Inference grid."""
    mask: TissueMask
    """Tissue to search."""
    units: tuple[Unit, ...]
    """Units with tissue, in the order of processing."""
    package: Package
    """Package of the model."""
    settings: Settings
    """Settings in effect."""
    layout: SlideLayout
    """Paths of the slide's results."""
    key_content: bytes
    """Content of the slide's key.json when the work began; see `refuse_if_taken_over`."""
    stored: StoredMaps | None = None
    """Maps that another run stored, from which new tables are made; None if this run predicts the slide."""
    mask_on_tissue: float | None = None
    """Fraction of the given mask that lies on detected tissue; None without a given mask, or if the maps are stored."""
    sample: Sample | None = None
    """Sample whose clusters are the `units`, if the density is estimated from them; None for the whole slide."""

    def core(self, unit: Unit) -> Box:
        """Return the region whose nuclei belong to `unit`, in inference pixels.

        It is the unit itself or, for an estimate (--stop-at), the unit's cluster.
        """
        side = self.settings.sample.cluster
        return unit.box if self.sample is None else cell_box(unit.column, unit.row, side)

    @property
    def card(self) -> Card:
        """Card of the model."""
        return self.package.card

    @property
    def maps(self) -> SlideLayout:
        """Paths of the prediction store and the markers, in this run or in the run that stored the maps.

        Files of the other run must not be changed.
        """
        return self.layout if self.stored is None else self.stored.layout

    @property
    def taxonomy(self) -> Taxonomy:
        """Classes of the tables: the model's classes, merged by the class map if there is one."""
        return self.card.taxonomy.merged(self.settings.post.class_map)[0]

    @property
    def has_usual_nuclei(self) -> bool:
        """True if `sobel_norm` and `min_area_px` have their defaults, with which the errors of models are measured."""
        post = self.settings.post
        return (post.sobel_norm, post.min_area_px) == (PostSettings.sobel_norm, PostSettings.min_area_px)

    @property
    def count_error(self) -> CountError | None:
        """Error of the number of nuclei; None if it was not measured for slides and settings like these.

        It is also None if the slide's pixels are larger than the model's by a factor of more than COARSEST, or if
        `has_usual_nuclei` is False.
        """
        is_as_sharp = max(self.info.mpp.x, self.info.mpp.y) <= self.card.mpp * COARSEST
        return Uncertainty.from_json(self.card.uncertainty).count if is_as_sharp and self.has_usual_nuclei else None

    @property
    def context(self) -> TableContext:
        """Properties of the slide and the model that the table of nuclei records in its metadata.

        With a class map, type_prob is not calibrated, since merged classes are easier to tell apart.
        """
        scalings = dict(Uncertainty.from_json(self.card.uncertainty).probabilities)
        if self.settings.post.class_map:
            scalings.pop("type_prob", None)
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
            scalings=scalings,
        )


def result_key(slide: PlannedSlide, package: Package, settings: Settings) -> str:
    """Return the slide's run key: the hex SHA-256 of everything that its results depend on, including its mask file.

    For stored maps, the key is computed from the run key of these maps instead of the slide and its mask.

    `package`: package of the model. `settings`: settings in effect. OSError if the mask file cannot be read.
    """
    mask_path = slide.record.mask_path
    if slide.stored is not None:
        source = slide.stored.run_key
    else:
        source = slide.info.fingerprint + ("" if mask_path is None else sha256_file(mask_path))
    return run_key(package.sha256, settings.results_key(), source, SCHEMA_VERSION)


@contextmanager
def opened(slide: PlannedSlide | SlideWork, copies: Copies) -> Iterator[SlideReader | None]:
    """Yield a reader of the slide, which is closed when the block ends; None if stored maps are used instead of pixels.

    A slide in cloud storage is copied to this machine first. `copies`: the run's copies on this machine.

    InputError if the slide's pixel size is unknown, a DICOM folder holds several slides, the slide does not exist in
    the storage, or access is denied. SlideError if it cannot be copied or opened, or if its file was replaced after the
    run began. ScratchFull if there is no space for the copy.
    """
    if slide.stored is not None:
        yield None
        return
    with copies.staged(slide.record, slide.info.fingerprint) as record, open_slide(record) as reader:
        # `staged` compares copies itself.
        if record is slide.record and reader.info.fingerprint != slide.info.fingerprint:
            raise _replaced(slide)
        yield reader


def refuse_if_replaced(work: SlideWork) -> None:
    """Raise SlideError if the slide's file was replaced or changed while it was read, so that tiles are of two files.

    Call this when the slide's pixels have been read. A file that was removed does not count, since open files stay
    readable, nor does a slide in cloud storage, of which a copy is read. SlideError, too, if it cannot be read.
    """
    record = work.record
    is_there = work.stored is None and isinstance(record.path, Path) and record.path.exists()
    if is_there and peek(record).fingerprint != work.info.fingerprint:
        raise _replaced(work)


def _replaced(slide: PlannedSlide | SlideWork) -> SlideError:
    """Return the error of a slide whose file is another one than planned. The next start discards its predictions."""
    if isinstance(slide, SlideWork):
        slide.layout.key_json.unlink(missing_ok=True)
    return SlideError(f"{slide.record.path}: was replaced or changed after the run began; repeat the segment command")


def survey(
    reader: SlideReader | None, slide: PlannedSlide, package: Package, settings: Settings, layout: SlideLayout
) -> SlideWork:
    """Find the slide's tissue, cut it into units and write survey.json. Return the slide ready to be processed.

    `reader`: reader of the slide; None for stored maps, whose header and tissue are read from the survey.json of their
    run. `slide`: slide as planned. `package`: package of the model. `settings`: settings in effect. `layout`: paths of
    the slide's results, opened by `Ledger.open_slide`.

    SlideError if the slide or, for stored maps, the survey.json of their run cannot be read, or if the mask in the
    cohort cannot be used or was replaced after the run began. OSError if survey.json cannot be written, or key.json,
    the mask or a survey.json cannot be read.
    """
    key_content = layout.key_json.read_bytes()
    on_tissue: float | None = None
    if slide.stored is not None:
        path = slide.stored.layout.survey_json
        info, mask = read_info(path), read_tissue(path)
    else:
        assert reader is not None
        info, mask = reader.info, tissue_mask(reader, slide.record, settings.tissue)
        if (mask_path := slide.record.mask_path) is not None:
            # For slides in other storage, the plan could not compare the mask with the slide.
            info = replace(info, warnings=(*info.warnings, *check_mask(mask_path, info.level0, info.bounds)))
            # The file is hashed after it was read, so that a change before or during the reading is noticed.
            if json.loads(key_content).get("run_key") != result_key(slide, package, settings):
                raise SlideError(
                    f"{mask_path}: the mask was replaced or changed after the run began; repeat the segment command"
                )
            on_tissue = share_on_tissue(reader, mask, settings.tissue)
            # A warning, too, since slides that are only estimated have no flags.
            flags = flag_slides({"": {"quality": {"mask_on_tissue": on_tissue}}})[""]
            info = replace(info, warnings=(*info.warnings, *(flag.sentence for flag in flags)))
        info = replace(info, warnings=(*info.warnings, *mask.warnings, *doubts_of_levels(reader)))
    write_survey(layout.survey_json, info, mask)
    grid = Grid.over(info.level0, info.mpp, package.card.mpp)
    units = plan_units(grid, mask, settings.infer.unit, package.card.tile_out)
    return SlideWork(
        slide.record, info, grid, mask, units, package, settings, layout, key_content, slide.stored, on_tissue
    )


def refuse_if_taken_over(work: SlideWork) -> None:
    """Raise SlideError if a run with another run key has taken over the slide's folder, or it was removed or moved.

    Call this before each write, so that a process on a node that was considered lost does not mix its results into
    those of the other run. OSError if key.json cannot be read.
    """
    try:
        unchanged = work.layout.key_json.read_bytes() == work.key_content
    except FileNotFoundError:
        raise SlideError(
            f"{work.layout.folder}: was removed or moved during the run; nothing was written; repeat the command"
        ) from None
    if not unchanged:
        raise SlideError(f"{work.layout.folder}: another run has taken over; nothing was written")


def open_store(work: SlideWork) -> PredictionStore:
    """Open the slide's prediction store, or create it. The store of another run is opened read-only.

    An estimate (--stop-at) has a store of its own, with one shard per tile. Its h and v are not masked, so that units
    of the whole slide can reuse the tiles.

    `work`: slide of the store.

    For the store of another run, SlideError if it does not match the settings and survey.json of that run, and
    FileNotFoundError if it is missing. OSError if the store cannot be created; errors of zarr, mostly ValueError, if it
    is corrupted.
    """
    if work.stored is not None:
        store = PredictionStore.open(work.maps.predictions_zarr, read_only=True)
        planes, unit = work.card.layout.planes, work.settings.infer.unit
        if store.canvas != work.grid.size.box or store.array.shards != (planes, unit, unit):
            raise SlideError(
                f"{store.path}: its shape does not match the settings and survey.json of its run; run the slide again"
            )
        return store
    card = work.card
    return PredictionStore.create(
        work.layout.predictions_zarr,
        work.grid.size,
        card.layout.planes,
        work.settings.infer.unit if work.sample is None else card.tile_out,
        {
            "mpp": [work.grid.mpp.x, work.grid.mpp.y],
            "level0_per_pixel": [work.grid.scale_x, work.grid.scale_y],
            "level0_size": [work.grid.level0.width, work.grid.level0.height],
            "planes": card.layout.names(tuple(c.name for c in card.taxonomy.classes), card.system),
            "od_scale": card.layout.OD_SCALE,
            HV_MASKED: work.settings.post.sobel_norm == "fixed" and work.sample is None,
            "model": card.to_json(),
            "model_sha256": work.package.sha256,
        },
    )


def open_sampled_tiles(work: SlideWork) -> PredictionStore | None:
    """Open the store of the tiles that were predicted for estimates of the slide (--stop-at); None if there is none.

    The store can also be written to. `work`: slide, or the work on an estimate of it. Errors of zarr, mostly
    ValueError, if the store is corrupted.
    """
    path = work.layout.sample.predictions_zarr
    return PredictionStore.open(path) if (path / "zarr.json").exists() else None


def open_swept_store(work: SlideWork) -> PredictionStore:
    """Open the slide's store as `open_store` does, and remove leftovers of killed writes from it.

    The store of another run is not changed. Call this only while nothing writes to the slide.

    For the store of another run, SlideError if it does not match its run, and FileNotFoundError if it is missing.
    OSError if the store cannot be created, or a leftover cannot be removed; errors of zarr, mostly ValueError, if the
    store is corrupted.
    """
    store = open_store(work)
    if work.stored is None:
        store.sweep()
    return store
