"""A slide under way, as the driver of the cohort knows it: what can be submitted of it now, and what waits for what.

A region is post-processed when its unit and the units around it are predicted; tables are made when no unit and no
region is left. Nothing here knows of Ray.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hover_batch.cohort.layout import SlideLayout
from hover_batch.pipeline import Seconds, neighbours
from hover_batch.plan import PlannedSlide
from hover_batch.slide.tiles import Unit
from hover_batch.slide_work import SlideWork

SURVEY, INFER, POST, FINALIZE, START = "tissue", "inference", "post-processing", "tables", "start"
"""Stages of a slide, as failures name them; START is a network's."""
RETRY_S = 1.0
"""Before a region is tried again whose units are done but not seen, or the tables."""
TABLES = -1
"""Stands for a slide's tables among the indices of its regions."""


@dataclass(frozen=True)
class Surveyed:
    """What the driver needs to know of a slide: its units, and which of them an earlier run predicted (`inferred`)
    and post-processed (`posted`), as indices into `units`. `work`: what all its calls are given."""

    work: SlideWork
    inferred: tuple[int, ...]
    posted: tuple[int, ...]
    seconds: Seconds

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.work.units


@dataclass(eq=False)
class SlideUnderWay:
    """One slide. Units, and the regions of their cores, go by their index."""

    planned: PlannedSlide
    layout: SlideLayout
    seconds: Seconds = field(default_factory=Seconds)
    work: Any = None
    """Reference to its SlideWork in Ray's object store: in the driver's own, whatever other machines are lost."""
    units: tuple[Unit, ...] = ()
    to_infer: deque[int] = field(default_factory=deque)
    suspects: deque[int] = field(default_factory=deque)
    """Units that were under way when a process died, to be tried alone."""
    needs: dict[int, set[int]] = field(default_factory=dict)
    """Region → the units it waits for; none once it is submitted."""
    to_post: deque[int] = field(default_factory=deque)
    inferred: set[int] = field(default_factory=set)
    retry_at: dict[int, float] = field(default_factory=dict)
    """Region, or TABLES → when (monotonic) to try again, because results of units that are done were not seen yet."""
    regions_left: int = 0
    strikes: Counter[tuple[str, int]] = field(default_factory=Counter)
    losses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Machines that were lost while a unit or stage was under way on them."""
    held: bool = False
    """There was no room for a copy of it beside those of other slides: it waits until one of them ends."""
    surveyed: bool = False
    next_task: str | None = SURVEY
    """SURVEY or FINALIZE, when it can be submitted."""
    ended: bool = False
    """Done or failed: what still comes back of it is of no interest."""

    @property
    def slide_id(self) -> str:
        return self.planned.record.slide_id

    def survey_done(self, found: Surveyed) -> None:
        self.surveyed = True
        self.units = found.units
        self.seconds.add(found.seconds)
        self.inferred = set(found.inferred)
        self.to_infer = deque(i for i in range(len(self.units)) if i not in self.inferred)
        index = {(unit.column, unit.row): i for i, unit in enumerate(self.units)}
        left = set(range(len(self.units))) - set(found.posted)
        self.regions_left = len(left)
        for i in sorted(left):
            around = {index[cell] for cell in neighbours(self.units[i]) if cell in index}
            self._wait(i, around)
        self._maybe_finalize()

    def unit_inferred(self, i: int) -> None:
        self.inferred.add(i)
        for region, needed in list(self.needs.items()):
            needed.discard(i)
            if not needed:
                del self.needs[region]
                self.to_post.append(region)
        self._maybe_finalize()

    def region_needs(self, i: int, cells: Sequence[tuple[int, int]]) -> bool:
        """A region could not be done, for want of the units in these cells. False where all of them are done: their
        markers are on a file system that does not show them yet."""
        index = {(unit.column, unit.row): k for k, unit in enumerate(self.units)}
        needed = {index[cell] for cell in cells}
        if needed <= self.inferred:
            self.retry_at[i] = time.monotonic() + RETRY_S
            return False
        self._wait(i, needed)
        return True

    def tables_need(self) -> None:
        """Tables could not be made: results are on a file system that does not show them yet."""
        self.retry_at[TABLES] = time.monotonic() + RETRY_S

    def due_again(self) -> None:
        """Let what was not seen be submitted again, where its time has come."""
        now = time.monotonic()
        for i in [i for i, at in self.retry_at.items() if at <= now]:
            del self.retry_at[i]
            if i == TABLES:
                self.next_task = FINALIZE
            else:
                self.to_post.append(i)

    def region_posted(self) -> None:
        self.regions_left -= 1
        self._maybe_finalize()

    def _wait(self, region: int, units: set[int]) -> None:
        if needed := units - self.inferred:
            self.needs[region] = needed
        else:
            self.to_post.append(region)

    def _maybe_finalize(self) -> None:
        # Also where an earlier run had all regions done: a harmed unit is predicted again.
        if self.regions_left == 0 and len(self.inferred) == len(self.units):
            self.next_task = FINALIZE
