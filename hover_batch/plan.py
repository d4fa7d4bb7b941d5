"""Plan a run: check rows and headers, and estimate tiles, disk space and time. Needs neither torch nor weights.

`plan` and `segment` both start with this, so that the dry run and the run reject the same input.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.manifest import Cohort, RowFault, raise_if_faulty
from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.config import SampleSettings, Settings
from hover_batch.errors import InputError, SlideError, exit_code
from hover_batch.formatting import counted, duration
from hover_batch.geometry import Grid
from hover_batch.model.card import Card
from hover_batch.slide.given_mask import check_mask
from hover_batch.slide.headers import SlideInfo, peek
from hover_batch.slide.pixel_size import check_mpp, warnings_of
from hover_batch.slide.remote import RemoteInfo, remote_info
from hover_batch.slide.tiles import tiles_near
from hover_batch.slide.tissue import TissueMask, read_given_mask
from hover_batch.taxonomy import Taxonomy

STORE_BYTES_PER_PIXEL = 4.0
"""Compressed size of all planes per predicted pixel of dense tissue (3.8 on the example)."""
MPX_PER_CORE_SECOND = 0.5
"""Inference megapixels that one core processes in a second with the starter, for the estimate only."""
ASKED_AT_ONCE = 16
"""Number of slides in cloud storage that are checked at the same time; each takes a few requests and 3 MiB."""


@dataclass(frozen=True)
class StoredMaps:
    """Prediction maps that another run stored."""

    layout: SlideLayout
    """Paths of the slide in that run's folder."""
    run_key: str
    """Run key of the results there."""
    hv_masked: bool
    """Whether h and v are zero away from the foreground, so that windows cannot be scaled by their extremes."""


@dataclass(frozen=True)
class PlannedSlide:
    """Slide that can be run.

    A slide in cloud storage is copied during the run, and its header is read only then.
    """

    record: SlideRecord
    """Slide's row of the cohort."""
    info: SlideInfo | RemoteInfo
    """Properties of the slide; in cloud storage, only its size in bytes and its fingerprint."""
    grid: Grid | None
    """Inference grid; None for a slide in cloud storage."""
    tiles: int
    """Number of tiles that cover the canvas, or the given mask: the upper bound of what is predicted. 0 for a slide in
    cloud storage."""
    stored: StoredMaps | None = None
    """Maps from which a new table is made; nothing is predicted, and the slide is not opened. None for a normal run."""

    @property
    def pixels(self) -> int:
        """Number of inference pixels of the whole canvas; 0 for a slide in cloud storage, whose size is not known."""
        return self.grid.size.pixels if self.grid else 0


@dataclass(frozen=True)
class Plan:
    """Plan of a run: the slides that can be run, and those that cannot."""

    cohort: Cohort
    """Cohort without the records that have a fault, and with the faults of their headers and masks added."""
    slides: tuple[PlannedSlide, ...]
    """Slides that can be run."""
    unreadable: tuple[tuple[SlideRecord, str], ...]
    """(record, reason) of slides that cannot be opened. They do not count as faults of the CSV, but fail in the run."""

    @property
    def exit_code(self) -> int:
        """Exit code of the dry run: 0 all slides can be run, 3 some cannot, 4 none can.

        Slides that cannot be run are those that are unreadable and those whose rows have faults.
        """
        return exit_code(len(self.slides), len(self.unreadable) + len(self.cohort.faults))

    def raise_if_faulty(self) -> None:
        """Raise InputError if the cohort has faults.

        The message also lists the warnings, and the unreadable slides with the reasons.
        """
        warnings = [f"{slide.record.slide_id}: {w}" for slide in self.slides for w in slide.info.warnings]
        warnings += [f"{record.slide_id}: will fail: {reason}" for record, reason in self.unreadable]
        raise_if_faulty(replace(self.cohort, warnings=(*self.cohort.warnings, *warnings)))

    def lines(self, settings: Settings, card: Card) -> list[str]:
        """Return the plan as lines of text for the user.

        The numbers of tiles and pixels are upper bounds, since tissue is found only during the run: they count the
        whole canvas of each slide, or the mask that the cohort gives for it. Disk space and time are estimated from
        them. Slides in cloud storage are listed, but their tiles and pixels are not counted.

        `settings`: settings of the run. `card`: card of the model.
        """
        lines = [f"{self.cohort.source}: {counted(len(self.slides), 'slide')} to run with model {card.name}"]
        lines += [f"  warning: {w}" for w in self.cohort.warnings]
        for slide in self.slides:
            if isinstance(slide.info, RemoteInfo):
                lines.append(
                    f"  {slide.record.slide_id}: {slide.info.size / 1e6:,.1f} MB at {slide.record.path}; its header is "
                    "read when it is copied, and its tiles are not counted below"
                )
                lines += [f"    warning: {w}" for w in slide.info.warnings]
                continue
            assert slide.grid is not None
            size, grid = slide.info.level0, slide.grid
            scaled = "" if grid.size == size else f" → {grid.size.width} × {grid.size.height} at {grid.mpp} µm"
            lines.append(
                f"  {slide.record.slide_id}: {size.width} × {size.height} px at {slide.info.mpp} µm{scaled}, "
                f"≤ {slide.tiles:,} tiles{' in its mask' if slide.record.mask_path else ''}"
            )
            lines += [f"    warning: {w}" for w in slide.info.warnings]
        lines += [f"  {record.slide_id}: will fail: {reason}" for record, reason in self.unreadable]
        lines += [f"  row {fault.row}: left out: {fault.message}" for fault in self.cohort.faults]
        pixels = sum(min(slide.pixels, slide.tiles * card.tile_out**2) for slide in self.slides)
        cores = settings.infer.threads or os.cpu_count() or 1
        seconds = pixels / 1e6 / MPX_PER_CORE_SECOND / cores
        store = 0.0 if settings.output.discard_predictions else pixels * STORE_BYTES_PER_PIXEL
        lines.append(
            f"at most: {sum(slide.tiles for slide in self.slides):,} tiles, {pixels / 1e6:,.0f} Mpx, "
            f"{store / 1e9:.1f} GB of stored predictions, about {duration(seconds)} on {cores} idle cores at "
            "the starter's speed"
        )
        return lines


def check_settings(settings: Settings, card: Card) -> Taxonomy:
    """Check the settings that depend on the model, and return the classes of the tables.

    The result has the model's classes, merged by the class map if there is one. The settings checked are the side of a
    unit, sobel_norm, the class map, the density of --of and, with --stop-at, the side of a cluster. `card`: card of the
    model. InputError if a setting is invalid for this model.
    """
    if settings.infer.unit % card.tile_out:
        raise InputError(
            f"--unit {settings.infer.unit}: must be a multiple of {card.tile_out}, the side of what the model "
            f"{card.name} keeps of a tile"
        )
    card.check_sobel_norm(settings.post.sobel_norm)
    taxonomy, _ = card.taxonomy.merged(settings.post.class_map)
    if settings.sample.stop_at:
        _check_sample(settings, card, taxonomy)
    elif settings.sample.of != SampleSettings.of:
        raise InputError(f"--of {settings.sample.of}: applies to --stop-at; add it, or leave --of out")
    return taxonomy


def _check_sample(settings: Settings, card: Card, taxonomy: Taxonomy) -> None:
    """Check the settings of an estimate. InputError if slides cannot be sampled with them."""
    sample = settings.sample
    if sample.of not in (known := ["nuclei", *(kind.name for kind in taxonomy.nuclei)]):
        raise InputError(f"--of {sample.of}: must be one of {', '.join(known)}, which the model {card.name} counts")
    if settings.post.sobel_norm == "window":
        raise InputError(
            "--stop-at: needs nuclei that do not depend on tile borders, and with --sobel-norm window they do; leave "
            "one of the two out"
        )
    if sample.cluster % card.tile_out:
        raise InputError(
            f"setting sample.cluster = {sample.cluster}: must be a multiple of {card.tile_out}, the side of what the "
            f"model {card.name} keeps of a tile"
        )


def plan_cohort(cohort: Cohort, card: Card) -> Plan:
    """Check the slides of a cohort and return the plan.

    The headers of slides on this machine and all masks are read, and the fingerprints of all slides are computed.
    Slides in cloud storage are checked for existence, and only a part of each file is read. Faults of slides are
    collected in the plan, not raised.

    `card`: card of the model, for the inference grid.
    """
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        remote_infos = {
            record.row: pool.submit(remote_info, record.path, record.mpp)
            for record in cohort.records
            if isinstance(record.path, Url)
        }
        return _plan(cohort, card, remote_infos)


def _plan(cohort: Cohort, card: Card, remote_infos: dict[int, Future[RemoteInfo]]) -> Plan:
    """Return the plan. `remote_infos`: pending results of `remote_info`, by row."""
    slides: list[PlannedSlide] = []
    unreadable: list[tuple[SlideRecord, str]] = []
    faults, warnings = list(cohort.faults), list(cohort.warnings)
    first_with_content: dict[str, SlideRecord] = {}
    for record in cohort.records:
        wrong: list[str] = []
        info: SlideInfo | RemoteInfo | None = None
        mask: TissueMask | None = None
        reason = ""
        with _collected(wrong):
            if record.mpp is not None:
                check_mpp(record.mpp)
        try:
            with _collected(wrong):
                if record.row in remote_infos:
                    info = _remote(record, remote_infos[record.row].result())
                else:
                    info = peek(record)
        except SlideError as error:
            reason = str(error)
        with _collected(wrong):
            if record.mask_path is not None:
                canvas = (info.level0, info.bounds) if isinstance(info, SlideInfo) else ()
                warnings += [f"{record.slide_id}: {w}" for w in check_mask(record.mask_path, *canvas)]
                if isinstance(info, SlideInfo):
                    mask = read_given_mask(record.mask_path, info)
        faults += [RowFault(record.row, record.slide_id, message) for message in wrong]
        if wrong:
            continue
        if info is not None:
            first = first_with_content.setdefault(info.fingerprint, record)
            if first is not record and _place(first.path) != _place(record.path):
                warnings.append(
                    f"row {record.row} ({record.slide_id}) is a copy of the slide in row {first.row} "
                    f"({first.slide_id}), so that its nuclei are counted twice; keep one of them"
                )
        if info is None:
            unreadable.append((record, reason))
        elif isinstance(info, RemoteInfo):
            slides.append(PlannedSlide(record, info, None, 0))
        else:
            grid = Grid.over(info.level0, info.mpp, card.mpp)
            if mask is None:
                tiles = sum(1 for _ in grid.size.box.cells(card.tile_out))
            else:
                tiles = int(tiles_near(grid, mask, card.tile_out).sum())
            slides.append(PlannedSlide(record, info, grid, tiles))
    faulty = {fault.row for fault in faults}
    checked = replace(
        cohort,
        records=tuple(r for r in cohort.records if r.row not in faulty),
        faults=tuple(sorted(faults, key=lambda fault: fault.row)),
        warnings=tuple(warnings),
    )
    return Plan(checked, tuple(slides), tuple(unreadable))


def _place(path: Path | Url) -> str:
    """Return the name of a slide's file without links; `read_cohort` warns of files that are in two rows."""
    return path.text if isinstance(path, Url) else os.path.realpath(path)


@contextmanager
def _collected(messages: list[str]) -> Iterator[None]:
    """Append an InputError to `messages`, so that the row's other faults are found, too."""
    try:
        yield
    except InputError as error:
        messages.append(str(error))


def _remote(record: SlideRecord, info: RemoteInfo) -> RemoteInfo:
    """Add the warnings that the cohort's pixel size and magnification give without the header."""
    if record.mpp is None:
        return info
    return replace(info, warnings=tuple(warnings_of(record.mpp, None, record.magnification)))
