"""The cohort on Ray: several slides open at once, so that networks never wait for post-processing.

The driver holds a few numbers for each unit and decides everything; pixels and maps never pass through it. Ray itself
retries nothing: where a process dies, what it had begun gets a strike and is tried once more, a unit alone in its
actor; a second strike is the slide's end, and the cohort goes on. What is no slide's fault is done again without one: a
machine that is lost, a disk that is full, too much at once for the memory.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    UnserializableException,
)

from hover_batch.errors import HoverBatchError, InputError, PackageError, ScratchFull, SlideError, SlideQuarantined
from hover_batch.executor.disk_space import is_disk_full
from hover_batch.executor.interrupts import on_ctrl_c
from hover_batch.executor.network_pool import Network, NetworkPool
from hover_batch.executor.nodes import NOTICED_S, Machines
from hover_batch.executor.resources import MAX_STRIKES, EnginePlan, engine_plan
from hover_batch.executor.run_recorder import CohortBooks, Load
from hover_batch.executor.slide_state import FINALIZE, INFER, POST, START, SURVEY, SlideUnderWay
from hover_batch.executor.workers import MachineLost, ReaderDied, finalize_slide, post_region, survey_slide
from hover_batch.model.predict import load_predictor
from hover_batch.pipeline import NetworkFailed, UnitsMissing
from hover_batch.plan import PlannedSlide

MAX_FAILED_STARTS = 3
"""Times that networks may die while they load, one after the other, before the run gives up."""
MAX_LOSSES = 5
"""Machines that may be lost while one and the same piece of work is under way on them, before it is suspected."""
MAX_RETRIES = 120
"""Times that a region is tried, or a slide's tables, for which all is done, by the driver's books, and not seen:
network file systems show new files late, a minute as a rule."""
PATIENCE_S = 120.0
"""Before the user is told that no network has loaded yet."""
_POLL_S = 0.25


@dataclass(frozen=True, eq=False)
class _Call:
    """One submitted call: of which stage, for which slide and unit, in which network."""

    stage: str
    slide: SlideUnderWay | None = None
    index: int = 0
    network: Network | None = None


class RayExecutor:
    """Runs a cohort on the Ray cluster that this process is connected to; `machines`: where that is not its own."""

    def __init__(
        self, books: CohortBooks, plan: EnginePlan, load: Load = load_predictor, machines: Machines | None = None
    ) -> None:
        self.books = books
        self.books.networks = plan.actors
        self.plan = plan
        self.machines = machines
        self._pool = NetworkPool(books, load)
        self._waiting: deque[PlannedSlide] = deque()
        self._open: list[SlideUnderWay] = []
        """Oldest first."""
        self._running: dict[Any, _Call] = {}
        self._doubts: list[tuple[float, _Call]] = []
        """Calls whose network does not answer, and when (monotonic) to take it for dead, on a machine that is up."""
        self._failed_starts = 0
        self._draining = False
        self._said: set[str] = set()

    def run(self, slides: Sequence[PlannedSlide]) -> None:
        """Every slide to its end, into the ledger. One that fails costs itself only.

        Raises HoverBatchError where the model's process cannot be kept alive, PackageError where the model cannot be
        loaded: these stop the cohort and blame no slide. KeyboardInterrupt after a Ctrl-C, when what was under way has
        ended; at once after a second one.
        """
        self._waiting = deque(slides)
        patience = time.monotonic() + PATIENCE_S
        try:
            with on_ctrl_c(self._drain):
                self._start_networks()
                while True:
                    self._follow_machines()
                    if self._draining:
                        self._say_once(
                            f"Finishing what is under way ({len(self._running)}); Ctrl-C again stops at once."
                        )
                    elif self.books.room.there():
                        self._submit()
                    if len(self._pool) and time.monotonic() > patience and not self._pool.started:
                        self._say_once("Still waiting for the first network: are its cores or GPUs held by others?")
                    if not self._under_way():
                        break
                    self._settle()
        finally:
            self._pool.close()
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
        self._feed_networks()
        self._feed_slots()

    def _open_slides(self) -> None:
        """Open slides ahead by what the networks can eat, and no further than post-processing follows. Without networks
        post-processing alone decides."""
        appetite = len(self._pool) * self.plan.units_at_once
        ahead = 2 * (appetite or self.plan.posts)
        most = 2 * (appetite + self.plan.posts)
        ready = sum(len(s.to_infer) for s in self._open)
        surveys = sum(not s.surveyed for s in self._open)
        while self._waiting and ready + surveys < ahead and len(self._open) < most and not self._held():
            planned = self._waiting.popleft()
            try:
                layout = self.books.begin(planned)
            except Exception as error:
                if is_disk_full(error):
                    self._waiting.appendleft(planned)
                    self.books.room.ran_out(planned.record.slide_id)
                    return
                self.books.fail(planned, "open", error)
                continue
            self._open.append(SlideUnderWay(planned, layout))
            surveys += 1

    def _held(self) -> bool:
        return any(slide.held for slide in self._open)

    def _feed_networks(self) -> None:
        """The freest network first; the oldest slide's units first; a unit with a strike alone."""
        fed = [slide for slide in self._open if not slide.held]
        for slide in fed:
            while slide.suspects and (network := self._pool.idle()):
                self._infer(slide, slide.suspects.popleft(), network, alone=True)
        # One is left to run empty where somebody waits to be alone in one.
        spared = self._pool.least_loaded() if any(slide.suspects for slide in fed) else None
        for slide in fed:
            while slide.to_infer:
                network = self._pool.freest(self.plan.units_at_once, spared)
                if network is None:
                    return
                self._infer(slide, slide.to_infer.popleft(), network)

    def _infer(self, slide: SlideUnderWay, index: int, network: Network, alone: bool = False) -> None:
        network.load += 1
        network.alone = alone
        self._running[network.handle.infer.remote(slide.work, index)] = _Call(INFER, slide, index, network)

    def _feed_slots(self) -> None:
        """Tables first, for they end a slide; then regions, the oldest slide's first. Tissue is found beside them."""
        running = Counter(call.stage for call in self._running.values())
        at_once = len(self._pool) or self.plan.posts
        surveys, posts = running[SURVEY], running[POST] + running[FINALIZE]
        for slide in self._open:
            slide.due_again()
            if slide.held:
                continue
            if slide.next_task == SURVEY and surveys < at_once:
                surveys += 1
                slide.next_task = None
                task = survey_slide.remote(slide.planned, self.books.package, self.books.settings, slide.layout)
                self._running[task] = _Call(SURVEY, slide)
            elif slide.next_task == FINALIZE and posts < self.plan.posts:
                posts += 1
                slide.next_task = None
                self._running[finalize_slide.remote(slide.work, slide.seconds)] = _Call(FINALIZE, slide)
        for slide in self._open:
            while slide.to_post and posts < self.plan.posts:
                posts += 1
                index = slide.to_post.popleft()
                self._running[post_region.remote(slide.work, index)] = _Call(POST, slide, index)

    def _start_networks(self) -> None:
        while len(self._pool) < self.plan.actors and not self._draining:
            network = self._pool.start(self.plan, self.machines.lost if self.machines else 0)
            self._running[network.handle.where.remote()] = _Call(START, network=network)

    def _follow_machines(self) -> None:
        """Where machines of the cluster came or went: as many networks and as much post-processing as now fit."""
        if self.machines is None:
            return
        books, before, root = self.books, self.plan, self.books.ledger.layout.root
        changed = self.machines.changed()
        try:
            self.machines.refuse_unshared(root)
        except OSError as error:
            if not is_disk_full(error):
                raise
            books.room.ran_out(str(root))
        if not changed:
            return
        try:
            there = self.machines.resources.at_most(books.settings)
        except InputError:
            self.books.progress.warn("No machine of the cluster is left to work on: waiting for one")
            return
        predicts = before.actors > 0
        self.plan = engine_plan(there, books.settings, books.package.card, predicts=predicts, begun=before)
        books.networks = max(books.networks, self.plan.actors)
        books.ledger.events.append("machines_changed", machines=len(there.nodes), networks=self.plan.actors)
        for line in ("the machines of the cluster changed:", *self.plan.lines()):
            books.progress.say(line)
        for network in [n for n in self._pool.networks if not self._machine_up(n)]:
            self._pool.lost(network)  # its units come back by themselves
        self._pool.shrink(self.plan.actors)
        self._start_networks()

    # What has come back.

    def _settle(self) -> None:
        settled = self._settle_doubts()
        running = list(self._running)
        if not running:
            if not (settled or self._doubts or any(slide.retry_at for slide in self._open) or self.books.room.full):
                raise RuntimeError(f"nothing is under way, yet {len(self._open) + len(self._waiting)} slides are left")
            time.sleep(_POLL_S)
            return
        ready, _ = ray.wait(running, num_returns=1, timeout=_POLL_S)
        if ready and len(running) > 1:
            ready, _ = ray.wait(running, num_returns=len(running), timeout=0)
        for reference in ready:
            call = self._running.pop(reference)
            if call.stage == INFER and call.network:
                call.network.load -= 1
                call.network.alone = False
            try:
                self._ended(call, ray.get(reference))
            except RayTaskError as error:
                self._raised(call, error.cause, str(error))
            except UnserializableException as error:
                self._raised(call, RuntimeError(str(error).splitlines()[-1]), str(error))
            except RayError as error:
                self._died(call, error)

    def _ended(self, call: _Call, result: Any) -> None:
        if call.stage == START and call.network:
            if not call.network.node:
                call.network.node = result
                self._running[call.network.handle.start.remote()] = call
                return
            call.network.started = True
            self._failed_starts = 0
            return
        slide = call.slide
        if slide is None or slide.ended:
            if call.stage == INFER:
                self.books.model_worked(result)
            return
        if call.stage == SURVEY:
            slide.work = ray.put(result.work)
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
                self._count_retry(call, slide, result)
        elif call.stage == POST:
            slide.seconds.add(result)
            slide.region_posted()
            self.books.region_done(slide.slide_id, slide.units[call.index], result)
        elif isinstance(result, UnitsMissing):
            slide.tables_need()
            self._count_retry(call, slide, result)
        else:
            try:
                self.books.end(slide.slide_id, result)
            except OSError as error:
                if is_disk_full(error):
                    self._disk_full(call)
                else:
                    self._fail(slide, FINALIZE, error)
            else:
                self._close(slide)

    def _count_retry(self, call: _Call, slide: SlideUnderWay, missing: UnitsMissing) -> None:
        slide.strikes["unseen " + call.stage, call.index] += 1
        if slide.strikes["unseen " + call.stage, call.index] == MAX_RETRIES:
            error = SlideError(f"{call.stage}: results of units {missing.cells} are gone; run the same command again")
            self._fail(slide, call.stage, error)

    def _raised(self, call: _Call, cause: Exception, trace: str) -> None:
        """The call ran and raised. What raises once raises again, so the slide ends; but a reader's death is a strike,
        and so is a network that fails: another takes its place, for its device may be broken."""
        if call.stage == START:
            if isinstance(cause, PackageError):
                raise cause
            raise HoverBatchError(f"the model cannot be loaded: {cause}\n{trace}") from cause
        if isinstance(cause, ReaderDied):
            self._strike(call, f"its reader died ({cause})")
        elif isinstance(cause, MachineLost):
            self._lost(call)
        elif isinstance(cause, MemoryError):
            self._short_of_memory(call)
        elif is_disk_full(cause):
            self._disk_full(call, cause)
        elif isinstance(cause, NetworkFailed):
            if call.network and not call.network.gone:
                self._pool.stop(call.network)
                self._start_networks()
            self._strike(call, f"its network failed ({cause})")
        elif call.slide and not call.slide.ended:
            self._fail(call.slide, call.stage, cause, trace)

    def _died(self, call: _Call, error: RayError) -> None:
        """The process of the call died, or its machine."""
        kind = type(error).__name__
        # Of a network that was killed for want of memory Ray says so, and it is dead all the same.
        network_gone = isinstance(error, RayActorError | OutOfMemoryError)
        if call.stage == START and not network_gone:
            raise HoverBatchError(f"no process for the model can be had ({kind}: {error})") from error
        if call.network and network_gone:
            if not call.network.gone:
                self._pool.lost(call.network)
            if call.network.let_go:
                self._again(call)
            elif isinstance(error, OutOfMemoryError) and call.stage == INFER:
                self._start_networks()
                self._short_of_memory(call)
            elif isinstance(error, ActorUnavailableError) and self.machines:
                self._doubts.append((time.monotonic() + NOTICED_S, call))
            else:
                ray.kill(call.network.handle)  # should it live after all
                if self.machines:
                    self.machines.look()
                self._network_died(call, kind)
        elif isinstance(error, NodeDiedError | ObjectLostError):
            self._lost(call)
        elif isinstance(error, OutOfMemoryError):
            self._short_of_memory(call)
        elif isinstance(error, OutOfDiskError):
            self._disk_full(call)
        else:
            self._strike(call, f"its process died ({kind})")

    def _settle_doubts(self) -> bool:
        """A network that does not answer has died, or its machine has: the cluster takes a while to tell. Whether that
        was found of one, so that there is work to submit again."""
        doubts, self._doubts = self._doubts, []
        for until, call in doubts:
            if time.monotonic() < until and self._machine_up(call.network):
                self._doubts.append((until, call))
            else:
                if call.network:
                    ray.kill(call.network.handle)  # should it live after all
                self._network_died(call, ActorUnavailableError.__name__)
        return len(self._doubts) < len(doubts)

    def _machine_up(self, network: Network | None) -> bool:
        if not (self.machines and network):
            return True
        if not network.node:  # it has not told yet: any that went since may have been its own
            return self.machines.lost == network.lost_before
        return self.machines.up(network.node)

    def _network_died(self, call: _Call, kind: str) -> None:
        up = self._machine_up(call.network)
        if call.stage == START and up:
            self._failed_starts += 1
            if self._failed_starts == MAX_FAILED_STARTS:
                raise HoverBatchError(
                    f"the model's process dies while it loads ({kind}): too little memory? Try fewer --cpus or --gpus"
                )
        self._start_networks()
        if call.stage == START:
            return
        if up:
            self._strike(call, f"its process died ({kind})")
        else:
            self._lost(call)

    def _again(self, call: _Call) -> None:
        """Have it done again, before other work."""
        slide = call.slide
        if slide is None or slide.ended:
            return
        if call.stage == INFER:  # a suspect remains one
            (slide.suspects if slide.strikes[INFER, call.index] else slide.to_infer).appendleft(call.index)
        elif call.stage == POST:
            slide.to_post.appendleft(call.index)
        else:
            slide.next_task = call.stage

    def _lost(self, call: _Call) -> None:
        """Its machine is gone. That is no fault of the work, unless one machine after the other goes."""
        slide = call.slide
        if slide is None or slide.ended:
            return
        slide.losses[call.stage, call.index] += 1
        self.books.ledger.events.append("lost", slide_id=slide.slide_id, stage=call.stage, index=call.index)
        if slide.losses[call.stage, call.index] >= MAX_LOSSES:
            reason = f"{call.stage}: {MAX_LOSSES} machines were lost while this was under way on them"
            self._fail(slide, call.stage, SlideQuarantined(reason))
        else:
            self._again(call)

    def _disk_full(self, call: _Call, error: Exception | None = None) -> None:
        slide = call.slide
        if slide is None or slide.ended:
            return
        if isinstance(error, ScratchFull) and any(not s.held for s in self._open if s is not slide):
            slide.held = True
        else:
            self.books.room.ran_out(slide.slide_id, error)
        self._again(call)

    def _short_of_memory(self, call: _Call) -> None:
        """Less at once from now on; where it is one thing at a time already, it is a strike."""
        plan, slide = self.plan, call.slide
        if slide is None or slide.ended:
            return
        if plan.posts == plan.units_at_once == 1:
            self._strike(call, "memory ran out")
            return
        self.plan = replace(plan, posts=-(-plan.posts // 2), units_at_once=-(-plan.units_at_once // 2))
        self.books.ledger.events.append("memory_short", slide_id=slide.slide_id, stage=call.stage, index=call.index)
        self.books.progress.warn(
            f"memory ran out in {call.stage} of {slide.slide_id}: from now on regions post-processed at once: "
            f"{self.plan.posts}, units under way in a network: {self.plan.units_at_once}"
        )
        self._again(call)

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
        else:
            self._again(call)

    def _fail(self, slide: SlideUnderWay, stage: str, error: Exception, trace: str | None = None) -> None:
        self._close(slide)
        self.books.fail(slide.planned, stage, error, trace)

    def _close(self, slide: SlideUnderWay) -> None:
        slide.ended = True
        self._open.remove(slide)
        for other in self._open:
            other.held = False
