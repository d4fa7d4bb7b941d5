"""State of the slides under way: what can be submitted, what waits for what, and what a fault changes.

A region is post-processed once its unit and the units around it are predicted; the slide is finalized once all its
units and regions are done. Plain data: no Ray and no clock. `now` is a time in seconds, from any clock that only moves
forward.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.record import Stage
from hover_batch.errors import ScratchFull, SlideError, SlideQuarantined
from hover_batch.pipeline import UnitsMissing, neighbours
from hover_batch.plan import PlannedSlide
from hover_batch.seconds import Seconds
from hover_batch.slide.tiles import Unit
from hover_batch.slide_work import SlideWork

RETRY_S = 1.0
"""Seconds before a task is retried because its inputs are not visible."""


class Verdict(Enum):
    """Consequence of a fault for the task that it interrupted; values are descriptions."""

    RETRY = "retry, the task is not to blame"
    STRIKE = "retry, but blame the task"
    NODE_LOST = "retry elsewhere"
    SHORT_OF_MEMORY = "retry with fewer tasks in parallel"
    DISK_FULL = "retry when there is space"
    FAIL = "fail the slide"


FAILS_AT = {Verdict.STRIKE: 2, Verdict.NODE_LOST: 5, Verdict.RETRY: 120}
"""Number of times that a task gets a verdict at which its slide fails; 2 means one retry.

A unit with a strike is retried alone, to find out whether it caused the crash. Repeated node losses during one task may
be caused by it. RETRY covers stopped networks, and network file systems, which may show new files a minute late; but no
task is retried for ever.
"""


@dataclass(frozen=True)
class Task:
    """One task of a slide."""

    stage: Stage
    """SURVEY, INFER, POST or FINALIZE."""
    index: int = 0
    """Index of the unit (INFER) or region (POST) in the slide's units; 0 for other stages."""


@dataclass(frozen=True)
class Surveyed:
    """Result of the survey of a slide."""

    work: SlideWork
    """Surveyed slide, which all later tasks need."""
    inferred: tuple[int, ...]
    """Indices of the units that are predicted already, by an earlier start or by the run of --from."""
    post_processed: tuple[int, ...]
    """Indices of the regions that an earlier start post-processed."""
    seconds: Seconds
    """Seconds of the survey by stage."""


@dataclass(eq=False)
class SlideState:
    """State of a slide in progress. Units, and the regions around them, are identified by their index."""

    planned: PlannedSlide
    """The slide as planned."""
    layout: SlideLayout
    """Paths of its results."""
    seconds: Seconds = field(default_factory=Seconds)
    """Seconds of its tasks by stage, so far."""
    work_ref: Any = None
    """Reference to its SlideWork in the driver's object store, which survives the loss of other nodes."""
    units: tuple[Unit, ...] = ()
    """Its units; empty before the survey is done."""
    surveyed: bool = False
    """Whether the survey is done."""
    next_stage: Stage | None = Stage.SURVEY
    """SURVEY or FINALIZE while it can be submitted; else None."""
    to_infer: deque[int] = field(default_factory=deque)
    """Units to predict, in order."""
    suspects: deque[int] = field(default_factory=deque)
    """Units with a strike, to be predicted while nothing else runs in their network."""
    to_post: deque[int] = field(default_factory=deque)
    """Regions that can be post-processed, in order."""
    inferred: set[int] = field(default_factory=set)
    """Units that are predicted."""
    needs: dict[int, set[int]] = field(default_factory=dict)
    """Units that a region waits for, by region. Once they are predicted, the region moves to `to_post`."""
    regions_left: int = 0
    """Number of regions that are not post-processed yet."""
    verdicts: Counter[tuple[Verdict, Task]] = field(default_factory=Counter)
    """How often each task got each of the verdicts in FAILS_AT."""
    retry_at: dict[Task, float] = field(default_factory=dict)
    """Tasks whose inputs are done but not visible, and when to retry them."""
    on_hold: bool = False
    """Whether it waits for another slide to end, because there is no disk space for its copy."""
    ended: bool = False
    """Whether it is done or has failed; results that still arrive are ignored."""

    @property
    def slide_id(self) -> str:
        """Id of the slide in the cohort."""
        return self.planned.record.slide_id

    def add_survey(self, surveyed: Surveyed) -> None:
        """Store the result of the survey, and queue the units that are not predicted yet.

        A region that is not done is queued if all the units that it needs are predicted; otherwise it waits for them
        (see `mark_inferred`). If all regions are done, the slide can be finalized at once.
        """
        self.surveyed = True
        self.units = surveyed.work.units
        self.seconds.add(surveyed.seconds)
        self.inferred = set(surveyed.inferred)
        self.to_infer = deque(i for i in range(len(self.units)) if i not in self.inferred)
        regions = sorted(set(range(len(self.units))) - set(surveyed.post_processed))
        self.regions_left = len(regions)
        for region in regions:
            self._queue_region(region, self._indices(neighbours(self.units[region])))
        self._finalize_if_complete()

    def look_again(self) -> None:
        """Send the slide back to the survey stage, which draws more clusters because the present ones do not suffice.

        The counts of the verdicts on its tasks are reset.
        """
        self.surveyed = False
        self.next_stage = Stage.SURVEY
        self.verdicts.clear()

    def mark_inferred(self, index: int) -> None:
        """Mark the unit with the index `index` as predicted, and queue the regions that waited only for it.

        If all units and regions are now done, the slide can be finalized.
        """
        self.inferred.add(index)
        for region, needed in list(self.needs.items()):
            needed.discard(index)
            if not needed:
                del self.needs[region]
                self.to_post.append(region)
        self._finalize_if_complete()

    def count_region(self) -> None:
        """Count one more region as post-processed.

        If all units and regions are now done, the slide can be finalized.
        """
        self.regions_left -= 1
        self._finalize_if_complete()

    def retry(self, task: Task) -> None:
        """Queue `task` again, before others of its kind; a unit that has a strike is queued to run alone."""
        if task.stage is Stage.INFER:
            queue = self.suspects if self.verdicts[Verdict.STRIKE, task] else self.to_infer
            queue.appendleft(task.index)
        elif task.stage is Stage.POST:
            self.to_post.appendleft(task.index)
        else:
            self.next_stage = task.stage

    def queue_due_retries(self, now: float) -> None:
        """Queue the tasks of `retry_at` that are due. `now`: seconds on the clock of `retry_at`."""
        due = [task for task, at in self.retry_at.items() if at <= now]
        for task in due:
            del self.retry_at[task]
            self.retry(task)

    def retry_or_quarantine(self, verdict: Verdict, task: Task, reason: str) -> SlideQuarantined | None:
        """Count the verdict on a task, queue the task again and return None.

        If the task has now got the verdict FAILS_AT[verdict] times, do not queue it. Instead, return the error with
        which the caller must quarantine the slide.

        `verdict`: a key of FAILS_AT. `task`: the task that was interrupted. `reason`: cause of the fault, for the
        message.
        """
        if self._count(verdict, task) < FAILS_AT[verdict]:
            self.retry(task)
            return None
        where = f" of unit {self.units[task.index].unit_id}" if task.stage in (Stage.INFER, Stage.POST) else ""
        alone = ", the last time alone" if task.stage is Stage.INFER and verdict is Verdict.STRIKE else ""
        return SlideQuarantined(
            f"{task.stage}{where}: {reason}, {FAILS_AT[verdict]} times{alone}; the file may be damaged or memory too "
            "small: check both, then use --retry-failed"
        )

    def retry_later(self, task: Task, unit_cells: tuple[tuple[int, int], ...], now: float) -> SlideError | None:
        """Schedule a retry of a task that did not find the results of some units, and return None.

        If some of the units are not predicted yet, a region waits for them. In other cases, the results should exist,
        but the file system may not show them yet: the task is retried RETRY_S seconds after `now`. At the
        FAILS_AT[Verdict.RETRY]th time, return the error with which the slide must fail.

        `task`: the task. `unit_cells`: (column, row) in the unit grid of each unit whose results are missing. `now`:
        time in seconds.
        """
        missing = self._indices(unit_cells)
        if task.stage is Stage.POST and not missing <= self.inferred:
            self._queue_region(task.index, missing)
        elif self._count(Verdict.RETRY, task) >= FAILS_AT[Verdict.RETRY]:
            return SlideError(
                f"{task.stage}: results of the units {list(unit_cells)} (column, row) are gone from "
                f"{self.layout.folder}; run the same command again to recreate them"
            )
        else:
            self.retry_at[task] = now + RETRY_S
        return None

    def _count(self, verdict: Verdict, task: Task) -> int:
        """Count the verdict. Return how often the task has got it."""
        self.verdicts[verdict, task] += 1
        return self.verdicts[verdict, task]

    def _indices(self, unit_cells: Iterable[tuple[int, int]]) -> set[int]:
        """Return the indices of the slide's units in these cells (column, row) of the unit grid."""
        index = {(unit.column, unit.row): i for i, unit in enumerate(self.units)}
        return {index[cell] for cell in unit_cells if cell in index}

    def _queue_region(self, region: int, units: set[int]) -> None:
        """Queue a region, or make it wait for those of the `units` that are not predicted yet."""
        if needed := units - self.inferred:
            self.needs[region] = needed
        else:
            self.to_post.append(region)

    def _finalize_if_complete(self) -> None:
        # Units count too: where an earlier start did all regions, a corrupted unit is predicted again.
        if self.regions_left == 0 and len(self.inferred) == len(self.units):
            self.next_stage = Stage.FINALIZE


class OpenSlides:
    """Slides in progress, oldest first, and the effect of faults on them.

    `record`: logs an event, given its name and values. `pause`: pauses the run until there is disk space, given the
    slide_id and the error. `use_less`: makes fewer tasks run in parallel, given the stage and the slide_id where memory
    ran out; returns False if that is not possible.
    """

    def __init__(
        self,
        record: Callable[..., None],
        pause: Callable[[str, Exception], None],
        use_less: Callable[[Stage, str], bool],
    ) -> None:
        self._record = record
        self._pause = pause
        self._use_less = use_less
        self._slides: list[SlideState] = []

    def __iter__(self) -> Iterator[SlideState]:
        return iter(self._slides)

    def __len__(self) -> int:
        return len(self._slides)

    def add(self, slide: SlideState) -> None:
        """Add `slide` as the newest of the open slides."""
        self._slides.append(slide)

    def close(self, slide: SlideState) -> None:
        """Mark a slide as ended, because it is done or has failed, and remove it from the open slides.

        Slides on hold can try again, since the caller then removes the copy of this one. ValueError if it is not open.
        """
        slide.ended = True
        self._slides.remove(slide)
        for open_slide in self._slides:
            open_slide.on_hold = False

    @property
    def any_on_hold(self) -> bool:
        """Whether at least one slide waits for disk space for its local copy."""
        return any(slide.on_hold for slide in self._slides)

    def take_tasks(
        self, running: Counter[Stage], max_surveys: int, max_posts: int, now: float
    ) -> Iterator[tuple[SlideState, Task]]:
        """Yield the surveys, regions and finalizations to submit now, and remove them from the queues.

        Tasks whose retry is due are queued first. Surveys and finalizations come before regions, since a finalization
        ends a slide. In both groups, the tasks of the oldest slide come first. The survey and the finalization of a
        slide on hold wait; its regions do not.

        `running`: number of tasks in progress, by stage. `max_surveys`: maximum number of surveys in progress.
        `max_posts`: maximum number of regions and finalizations in progress. `now`: time in seconds.
        """
        surveys = max_surveys - running[Stage.SURVEY]
        posts = max_posts - running[Stage.POST] - running[Stage.FINALIZE]
        for slide in self._slides:
            slide.queue_due_retries(now)
            stage = None if slide.on_hold else slide.next_stage
            if stage is Stage.SURVEY and surveys > 0:
                surveys -= 1
            elif stage is Stage.FINALIZE and posts > 0:
                posts -= 1
            else:
                continue
            slide.next_stage = None
            yield slide, Task(stage)
        for slide in self._slides:
            while slide.to_post and posts > 0:
                posts -= 1
                yield slide, Task(Stage.POST, slide.to_post.popleft())

    def apply(
        self, verdict: Verdict, slide: SlideState, task: Task, error: Exception, now: float, *, reduced: bool = False
    ) -> Exception | None:
        """Apply the verdict on `error`, which interrupted `task` of `slide`.

        Queue the task again, immediately or for later, and return None; or close the slide and return the error with
        which it fails. Do nothing and return None if the slide has ended.

        Strikes, lost nodes and a lack of memory are logged. SHORT_OF_MEMORY reduces the number of tasks that run at the
        same time, unless `reduced` is set; if it cannot be reduced, the verdict counts as a strike. DISK_FULL pauses
        the run. If only the disk for copies is full and another slide can still end and free some space, DISK_FULL puts
        this slide on hold instead.

        `now`: time in seconds. `reduced`: whether the number of tasks was reduced after the task was submitted; memory
        may then suffice now.
        """
        if slide.ended:
            return None
        values = {"slide_id": slide.slide_id, "stage": task.stage, "index": task.index}
        failure: Exception | None = None
        if verdict is Verdict.SHORT_OF_MEMORY and not (reduced or self._use_less(task.stage, slide.slide_id)):
            verdict, error = Verdict.STRIKE, MemoryError("memory ran out")
        match verdict:
            case Verdict.RETRY if isinstance(error, UnitsMissing):
                failure = slide.retry_later(task, error.unit_cells, now)
            case Verdict.RETRY:
                failure = slide.retry_or_quarantine(verdict, task, str(error))
            case Verdict.STRIKE:
                failure = slide.retry_or_quarantine(verdict, task, str(error))
                self._record("strike", **values, strikes=slide.verdicts[verdict, task], reason=str(error))
            case Verdict.NODE_LOST:
                failure = slide.retry_or_quarantine(verdict, task, "its node was lost")
                self._record("lost", **values)
            case Verdict.SHORT_OF_MEMORY:
                slide.retry(task)
                self._record("memory_short", **values)
            case Verdict.DISK_FULL:
                slide.retry(task)
                another_can_end = any(s is not slide and not s.on_hold for s in self._slides)
                if isinstance(error, ScratchFull) and another_can_end:
                    slide.on_hold = True
                else:
                    self._pause(slide.slide_id, error)
            case Verdict.FAIL:
                failure = error
        if failure:
            self.close(slide)
        return failure
