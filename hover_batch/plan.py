"""Plan a run: check rows and headers, and estimate tiles, disk and time. Needs neither torch nor weights.

`plan` and `segment` both begin here, so that the dry run and the run reject the same input.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.manifest import Cohort, RowFault
from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.config import Settings
from hover_batch.errors import InputError, SlideError
from hover_batch.formatting import counted, duration
from hover_batch.geometry import Grid
from hover_batch.model.package import Card
from hover_batch.slide.headers import PLAUSIBLE_MPP, SlideInfo, peek
from hover_batch.slide.remote import RemoteInfo, ask, require_packages
from hover_batch.slide.tissue import check_mask

STORE_BYTES_PER_PIXEL = 4.0
"""Compressed size of all planes per predicted pixel of dense tissue (3.8 on the example)."""
MPX_PER_CORE_SECOND = 0.5
"""Inference megapixels that one core processes in a second, for the estimate only."""
ASKED_AT_ONCE = 16
"""Number of slides in buckets that are asked for at once; each takes a few requests and 3 MiB."""


@dataclass(frozen=True)
class StoredMaps:
    """Maps that another run stored: the slide's `layout` there, and the `run_key` of its results."""

    layout: SlideLayout
    run_key: str


@dataclass(frozen=True)
class PlannedSlide:
    """A slide whose header could be read: the whole canvas is the upper bound of what will be predicted.

    The header of one in other storage is read once it is copied, when its turn comes: `info` is then what the storage
    tells, and `grid` and `tiles` are not known.
    """

    record: SlideRecord
    info: SlideInfo | RemoteInfo
    grid: Grid | None
    tiles: int
    kept: StoredMaps | None = None
    """Set where new tables are made from these maps: nothing is predicted, and the slide is not opened."""

    @property
    def pixels(self) -> int:
        return self.grid.size.pixels if self.grid else 0


@dataclass(frozen=True)
class Plan:
    """`cohort` is the one that was read, with the faults of headers and masks added and their records taken out.

    `unreadable`: records (still in the cohort) whose file cannot be opened, with the reason. They are no fault of the
    CSV, and become failures of the run.
    """

    cohort: Cohort
    slides: tuple[PlannedSlide, ...]
    unreadable: tuple[tuple[SlideRecord, str], ...]

    @property
    def exit_code(self) -> int:
        """As the run's would be: 3 with unreadable or faulty slides, 4 with no other."""
        if not self.unreadable and not self.cohort.faults:
            return 0
        return 3 if self.slides else 4

    def lines(self, settings: Settings, card: Card) -> list[str]:
        """The plan in words. Tissue is found in the run, so that all figures are upper bounds: the whole canvas."""
        lines = [f"{self.cohort.source}: {counted(len(self.slides), 'slide')} to run with model {card.name}"]
        lines += [f"  warning: {w}" for w in self.cohort.warnings]
        for slide in self.slides:
            if isinstance(slide.info, RemoteInfo):
                lines.append(
                    f"  {slide.record.slide_id}: {slide.info.size / 1e6:,.1f} MB at {slide.record.path}; its header is "
                    "read when it is copied, and what it takes is not counted below"
                )
                continue
            assert slide.grid is not None
            size, grid = slide.info.level0, slide.grid
            lines.append(
                f"  {slide.record.slide_id}: {size.width} × {size.height} px at {slide.info.mpp.x:g} µm "
                f"→ {grid.size.width} × {grid.size.height} at {grid.mpp.x:g} µm, ≤ {slide.tiles:,} tiles"
            )
            lines += [f"    warning: {w}" for w in slide.info.warnings]
        lines += [f"  {record.slide_id}: will fail: {reason}" for record, reason in self.unreadable]
        lines += [f"  row {fault.row}: left out: {fault.message}" for fault in self.cohort.faults]
        pixels = sum(slide.pixels for slide in self.slides)
        cores = settings.infer.threads or os.cpu_count() or 1
        seconds = pixels / 1e6 / MPX_PER_CORE_SECOND / cores
        store = 0.0 if settings.output.discard_predictions else pixels * STORE_BYTES_PER_PIXEL
        lines.append(
            f"at most: {sum(slide.tiles for slide in self.slides):,} tiles, {pixels / 1e6:,.0f} Mpx, "
            f"{store / 1e9:.1f} GB of prediction stores, about {duration(seconds)} on {cores} idle cores"
        )
        return lines


def _check_mpp(record: SlideRecord) -> None:
    low, high = PLAUSIBLE_MPP
    if record.mpp is not None and not low <= record.mpp.x <= high:
        raise InputError(f"mpp {record.mpp.x:g}: no slide has pixels of that many µm; {low:g} to {high:g} are possible")


def plan_cohort(cohort: Cohort, card: Card) -> Plan:
    """Read every header and mask; of slides in other storage, ask whether they are there and what their bytes are.

    InputError where the package that reaches a storage is missing.
    """
    remote = [record for record in cohort.records if isinstance(record.path, Url)]
    require_packages(record.path for record in remote if isinstance(record.path, Url))
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        asked = {r.row: pool.submit(ask, r.path, r.mpp) for r in remote if isinstance(r.path, Url)}
        return _plan(cohort, card, asked)


def _plan(cohort: Cohort, card: Card, asked: dict[int, Future[RemoteInfo]]) -> Plan:
    """`asked`: what the storage tells, by row."""
    slides: list[PlannedSlide] = []
    unreadable: list[tuple[SlideRecord, str]] = []
    faults = list(cohort.faults)
    for record in cohort.records:
        try:
            if record.mask_path is not None:
                check_mask(record.mask_path)
            _check_mpp(record)
            if record.row in asked:
                slides.append(PlannedSlide(record, asked[record.row].result(), None, 0))
                continue
            info = peek(record)
        except InputError as error:
            faults.append(RowFault(record.row, record.slide_id, str(error)))
            continue
        except SlideError as error:
            unreadable.append((record, str(error)))
            continue
        grid = Grid.over(info.level0, info.mpp, card.mpp)
        tiles = sum(1 for _ in grid.size.box.cells(card.tile_out))
        slides.append(PlannedSlide(record, info, grid, tiles))
    faulty = {fault.row for fault in faults}
    checked = replace(
        cohort,
        records=tuple(r for r in cohort.records if r.row not in faulty),
        faults=tuple(sorted(faults, key=lambda fault: fault.row)),
    )
    return Plan(checked, tuple(slides), tuple(unreadable))
