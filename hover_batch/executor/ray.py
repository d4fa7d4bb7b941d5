"""The cohort on Ray: several slides open at once, so that networks never wait for post-processing.

The driver holds a few numbers for each unit and decides everything; pixels and maps never pass through it. Ray itself
retries nothing: where a process dies, what it had begun gets a strike and is tried once more, a unit alone in its
actor; a second strike is the slide's end, and the cohort goes on.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import OutOfDiskError, RayActorError, RayError, RayTaskError, UnserializableException

from hover_batch.errors import HoverBatchError, PackageError, SlideError, SlideQuarantined
from hover_batch.executor.actors import (
    InferActor,
    ReaderDied,
    finalize_slide,
    post_region,
    survey_slide,
)
from hover_batch.executor.books import CohortBooks, Load
from hover_batch.executor.interrupts import on_ctrl_c
from hover_batch.executor.resources import MAX_STRIKES, EnginePlan
from hover_batch.executor.underway import FINALIZE, INFER, POST, START, SURVEY, SlideUnderWay
from hover_batch.model.predict import load_predictor
from hover_batch.pipeline import NetworkFailed, UnitsMissing
from hover_batch.plan import PlannedSlide

MAX_FAILED_STARTS = 3
"""Times that networks may die while they load, one after the other, before the run gives up."""
MAX_RETRIES = 120
"""Times that a region is tried whose units are done, by the driver's books, and whose markers are not seen: network
file systems show new files late, a minute as a rule."""
PATIENCE_S = 120.0
"""Before the user is told that no network has loaded yet."""
_POLL_S = 0.25


@dataclass(eq=False)
class _Actor:
    """One network. `load`: units under way in it; `alone`: the one under way must have no company; `killed`: by us."""

    handle: Any
    started: bool = False
    dead: bool = False
    killed: bool = False
    load: int = 0
    alone: bool = False


@dataclass(frozen=True, eq=False)
class _Call:
    """One submitted call: of which stage, for which slide and unit, in which actor."""

    stage: str
    slide: SlideUnderWay | None = None
    index: int = 0
    actor: _Actor | None = None


class RayExecutor:
    """Runs a cohort on the Ray cluster that this process is connected to."""

    def __init__(self, books: CohortBooks, plan: EnginePlan, load: Load = load_predictor) -> None:
        self.books = books
        self.books.networks = plan.actors
        self.plan = plan
        self.load = load
        self._waiting: deque[PlannedSlide] = deque()
        self._open: list[SlideUnderWay] = []
        """Oldest first."""
        self._actors: list[_Actor] = []
        self._running: dict[Any, _Call] = {}
        self._failed_starts = 0
        self._draining = False
        self._said: set[str] = set()

    def run(self, slides: Sequence[PlannedSlide]) -> None:
        """Every slide to its end, into the ledger. One that fails costs itself only.

        Raises HoverBatchError where the disk is full or the model's process cannot be kept alive, PackageError where
        the model cannot be loaded: these stop the cohort and blame no slide. KeyboardInterrupt after a Ctrl-C, when
        what was under way has ended; at once after a second one.
        """
        self._waiting = deque(slides)
        patience = time.monotonic() + PATIENCE_S
        try:
            with on_ctrl_c(self._drain):
                for _ in range(self.plan.actors):
                    self._start_actor()
                while True:
                    if self._draining:
                        self._say_once(
                            f"Finishing what is under way ({len(self._running)}); Ctrl-C again stops at once."
                        )
                    else:
                        self._submit()
                    if self._actors and time.monotonic() > patience and not any(a.started for a in self._actors):
                        self._say_once("Still waiting for the first network: are its cores or GPUs held by others?")
                    if not self._under_way():
                        break
                    self._settle()
        finally:
            for actor in self._actors:
                ray.kill(actor.handle)
        if self._draining:
            raise KeyboardInterrupt

    def _drain(self) -> None:
        if self._draining:
            raise KeyboardInterrupt
        self._draining = True  # said by the loop: a handler must not print in the middle of a print

    def _say_once(self, line: str) -> None:
        topic = line.split()[0]
        if topic not in self._said:
            self._said.add(topic)
            self.books.progress.say(line)

    def _under_way(self) -> bool:
        """Whether anything may still come back that matters: networks that load for nobody do not."""
        pending = not self._draining and (self._open or self._waiting)
        return bool(pending or any(call.stage != START for call in self._running.values()))

    # What to do next.

    def _submit(self) -> None:
        self._open_slides()
        self._feed_actors()
        self._feed_slots()

    def _open_slides(self) -> None:
        """Open slides ahead by what the networks can eat, and no further than post-processing follows. Without networks
        post-processing alone decides."""
        appetite = len(self._actors) * self.plan.units_at_once
        ahead = 2 * (appetite or self.plan.posts)
        most = 2 * (appetite + self.plan.posts)
        ready = sum(len(s.to_infer) for s in self._open)
        surveys = sum(not s.surveyed for s in self._open)
        while self._waiting and ready + surveys < ahead and len(self._open) < most:
            planned = self._waiting.popleft()
            try:
                layout = self.books.begin(planned)
            except Exception as error:
                self.books.fail(planned, "open", error)
                continue
            self._open.append(SlideUnderWay(planned, layout))
            surveys += 1

    def _feed_actors(self) -> None:
        """The freest actor first; the oldest slide's units first; a unit with a strike alone."""
        for slide in self._open:
            while slide.suspects:
                idle = [a for a in self._actors if a.started and a.load == 0]
                if not idle:
                    break
                self._infer(slide, slide.suspects.popleft(), idle[0], alone=True)
        # An actor is left to run empty where somebody waits to be alone in one.
        lonely = any(slide.suspects for slide in self._open)
        spared = min((a for a in self._actors if a.started), key=lambda a: a.load, default=None) if lonely else None
        for slide in self._open:
            while slide.to_infer:
                free = [
                    a
                    for a in self._actors
                    if a.started and not a.alone and a is not spared and a.load < self.plan.units_at_once
                ]
                if not free:
                    return
                self._infer(slide, slide.to_infer.popleft(), min(free, key=lambda a: a.load))

    def _infer(self, slide: SlideUnderWay, index: int, actor: _Actor, alone: bool = False) -> None:
        actor.load += 1
        actor.alone = alone
        self._running[actor.handle.infer.remote(slide.work, index)] = _Call(INFER, slide, index, actor)

    def _feed_slots(self) -> None:
        """Tables first, for they end a slide; then regions, the oldest slide's first. Tissue is found beside them."""
        running = Counter(call.stage for call in self._running.values())
        at_once = len(self._actors) or self.plan.posts
        surveys, posts = running[SURVEY], running[POST] + running[FINALIZE]
        for slide in self._open:
            if slide.next_task == SURVEY and surveys < at_once:
                surveys += 1
                slide.next_task = None
                task = survey_slide.options(num_returns=2)
                references: Any = task.remote(slide.planned, self.books.package, self.books.settings, slide.layout)
                found, slide.work = references
                self._running[found] = _Call(SURVEY, slide)
            elif slide.next_task == FINALIZE and posts < self.plan.posts:
                posts += 1
                slide.next_task = None
                self._running[finalize_slide.remote(slide.work, slide.seconds)] = _Call(FINALIZE, slide)
        for slide in self._open:
            slide.due_again()
            while slide.to_post and posts < self.plan.posts:
                posts += 1
                index = slide.to_post.popleft()
                self._running[post_region.remote(slide.work, index)] = _Call(POST, slide, index)

    def _start_actor(self) -> None:
        plan = self.plan
        options = InferActor.options(  # type: ignore[attr-defined]  # what ray.remote makes of a class
            num_cpus=plan.actor_cpus,
            num_gpus=plan.actor_gpus,
            max_concurrency=plan.units_at_once,
            scheduling_strategy="SPREAD",
        )
        # Said to torch, since an OMP_NUM_THREADS of the user's would hold instead of what is reserved.
        settings = replace(self.books.settings.infer, threads=plan.threads)
        actor = _Actor(options.remote(self.books.package, settings, self.load))
        self._actors.append(actor)
        self._running[actor.handle.start.remote()] = _Call(START, actor=actor)

    # What has come back.

    def _settle(self) -> None:
        running = list(self._running)
        if not running:
            if not any(slide.retry_at for slide in self._open):
                raise RuntimeError(f"nothing is under way, yet {len(self._open) + len(self._waiting)} slides are left")
            time.sleep(_POLL_S)
            return
        ready, _ = ray.wait(running, num_returns=1, timeout=_POLL_S)
        if ready and len(running) > 1:
            ready, _ = ray.wait(running, num_returns=len(running), timeout=0)
        for reference in ready:
            call = self._running.pop(reference)
            if call.stage == INFER and call.actor:
                call.actor.load -= 1
                call.actor.alone = False
            try:
                self._ended(call, ray.get(reference))
            except RayTaskError as error:
                self._raised(call, error.cause, str(error))
            except UnserializableException as error:
                self._raised(call, RuntimeError(str(error).splitlines()[-1]), str(error))
            except OutOfDiskError as error:
                raise HoverBatchError(
                    "no space left on disk for Ray's objects; free some and run the same command again"
                ) from error
            except RayError as error:
                self._died(call, error)

    def _ended(self, call: _Call, result: Any) -> None:
        if call.stage == START and call.actor:
            call.actor.started = True
            self._failed_starts = 0
            return
        slide = call.slide
        if call.stage == INFER:
            self.books.model_worked(result)
        if slide is None or slide.ended:
            return
        if call.stage == SURVEY:
            slide.survey_done(result)
            done = [slide.units[i] for i in result.inferred]
            self.books.surveyed(slide.slide_id, slide.units, done, len(result.posted))
        elif call.stage == INFER:
            slide.seconds.add(result)
            slide.unit_inferred(call.index)
            self.books.progress.tiles(len(slide.units[call.index].cells))
            self.books.unit_done(slide.slide_id, slide.units[call.index], result)
        elif call.stage == POST and isinstance(result, UnitsMissing):
            if not slide.region_needs(call.index, result.cells):
                self._count_retry(slide, call.index, result)
        elif call.stage == POST:
            slide.seconds.add(result)
            slide.region_posted()
            self.books.region_done(slide.slide_id, slide.units[call.index], result)
        else:
            try:
                self.books.end(slide.slide_id, result)
            except OSError as error:
                self._fail(slide, FINALIZE, error)
            else:
                self._close(slide)

    def _count_retry(self, slide: SlideUnderWay, index: int, missing: UnitsMissing) -> None:
        slide.strikes["markers", index] += 1
        if slide.strikes["markers", index] == MAX_RETRIES:
            error = SlideError(f"{POST}: the markers of units {missing.cells} are gone; run the same command again")
            self._fail(slide, POST, error)

    def _raised(self, call: _Call, cause: Exception, trace: str) -> None:
        """The call ran and raised. What raises once raises again, so the slide ends; but a reader's death is a strike,
        and so is a network that fails: another takes its place, for its device may be broken."""
        if call.stage == START:
            if isinstance(cause, PackageError):
                raise cause
            raise HoverBatchError(f"the model cannot be loaded: {cause}\n{trace}") from cause
        if isinstance(cause, ReaderDied):
            self._strike(call, f"its reader died ({cause})")
        elif isinstance(cause, NetworkFailed):
            if call.actor and not call.actor.dead:
                call.actor.killed = True
                ray.kill(call.actor.handle)
                self._replace(call.actor)
            self._strike(call, f"its network failed ({cause})")
        elif call.slide and not call.slide.ended:
            self._fail(call.slide, call.stage, cause, trace)

    def _died(self, call: _Call, error: RayError) -> None:
        """The process of the call died, or its machine."""
        kind = type(error).__name__
        if call.stage == START and not isinstance(error, RayActorError):
            raise HoverBatchError(f"no process for the model can be had ({kind}: {error})") from error
        if call.actor and not call.actor.dead and isinstance(error, RayActorError):
            if call.stage == START:
                self._failed_starts += 1
                if self._failed_starts == MAX_FAILED_STARTS:
                    raise HoverBatchError(
                        f"the model's process dies while it loads ({kind}): too little memory? Try fewer --cpus or "
                        "--gpus"
                    )
            self._replace(call.actor)
        if call.actor and call.actor.killed and call.slide:
            call.slide.to_infer.appendleft(call.index)
        elif call.stage != START:
            self._strike(call, f"its process died ({kind})")

    def _replace(self, actor: _Actor) -> None:
        actor.dead = True
        self._actors.remove(actor)
        if not self._draining:
            self._start_actor()

    def _strike(self, call: _Call, reason: str) -> None:
        """One more for the unit or the stage; at MAX_STRIKES the slide fails, else it is tried again."""
        slide = call.slide
        if slide is None or slide.ended:
            return
        slide.strikes[call.stage, call.index] += 1
        strikes = slide.strikes[call.stage, call.index]
        self.books.ledger.events.append(
            "strike", slide_id=slide.slide_id, stage=call.stage, index=call.index, strikes=strikes, reason=reason
        )
        if strikes >= MAX_STRIKES:
            alone = ", the last time alone" if call.stage == INFER else ""
            where = f" of unit {slide.units[call.index].unit_id}" if call.stage in (INFER, POST) else ""
            self._fail(
                slide,
                call.stage,
                SlideQuarantined(
                    f"{call.stage}{where}: {reason}, {strikes} times{alone}; the file may be damaged, or memory too "
                    "small"
                ),
            )
        elif call.stage == INFER:
            slide.suspects.append(call.index)
        elif call.stage == POST:
            slide.to_post.appendleft(call.index)
        else:
            slide.next_task = call.stage
            if call.stage == SURVEY:
                slide.work = None

    def _fail(self, slide: SlideUnderWay, stage: str, error: Exception, trace: str | None = None) -> None:
        self._close(slide)
        self.books.fail(slide.planned, stage, error, trace)

    def _close(self, slide: SlideUnderWay) -> None:
        slide.ended = True
        self._open.remove(slide)
