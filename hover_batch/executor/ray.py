"""Executor on Ray: several slides are open at once, so that networks never wait for post-processing.

The driver holds a few numbers for each unit and makes all decisions; pixels and maps never pass through it. It submits
tasks, waits for them, and routes their results to `SlideState`. Ray itself retries nothing.

The way of a failed call: `_route` → `faults.cause_of` (`NetworkPool.handle_failure` calls it for a dead network, and
removes the network) → `_failed` → `faults.verdict_on` → `OpenSlides.apply`, which queues the task again or ends its
slide.
"""

from __future__ import annotations

import functools
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from hover_batch.cohort.record import Stage, Url
from hover_batch.executor.disk_space import is_disk_full
from hover_batch.executor.faults import cause_of, verdict_on
from hover_batch.executor.interrupts import on_interrupt
from hover_batch.executor.network_pool import Network, NetworkPool, is_actor_failure
from hover_batch.executor.nodes import ClusterNodes
from hover_batch.executor.protocol import Executor, LoadNetwork, RunContext
from hover_batch.executor.resources import EnginePlan
from hover_batch.executor.slide_state import OpenSlides, SlideState, Task
from hover_batch.executor.workers import finalize_slide, post_region, survey_slide
from hover_batch.model.predict import load_predictor
from hover_batch.pipeline import NetworkFailed
from hover_batch.plan import PlannedSlide

PATIENCE_S = 120.0
"""Seconds after which the user is told that no network has loaded yet."""
_POLL_S = 0.25
"""Longest wait in seconds for tasks to end, before nodes and retries are checked again."""


@dataclass(frozen=True, eq=False)
class _Call:
    """Submitted task of a slide.

    `network`: the network that predicts it, if the task is a unit. `halvings`: those of the plan when it was submitted;
    one death interrupts several calls, and halves the plan once.
    """

    slide: SlideState
    task: Task
    halvings: int
    network: Network | None = None


class RayExecutor(Executor):
    """Executor that runs a cohort on the Ray cluster to which this process is connected. Call `run` once.

    `context`: what all slides share. `plan`: distribution of the cluster's resources. `load`: function that loads a
    network. `nodes`: nodes of a cluster that was joined; None for one that this process started.
    """

    def __init__(
        self,
        context: RunContext,
        plan: EnginePlan,
        load: LoadNetwork = load_predictor,
        nodes: ClusterNodes | None = None,
    ) -> None:
        self._context = context
        self._recorder = context.recorder
        self._progress = context.recorder.progress
        self._plan = plan
        self._nodes = nodes
        self._pool = NetworkPool(context.package, context.settings.infer, load, nodes, self._progress.warn)
        self._recorder.networks = plan.networks
        self._waiting: deque[PlannedSlide] = deque()
        self._slides = OpenSlides(context.recorder.log_event, context.disk.report_full, self._use_less)
        self._running: dict[Any, _Call] = {}
        """By Ray's reference."""
        self._stopping = False
        self._shown: set[str] = set()

    def run(self, slides: Sequence[PlannedSlide]) -> None:
        """Run the slides, several at once, until each is done or has failed. All networks are stopped at the end.

        A failed slide is recorded, and does not stop the others. While the disk is full, nothing new is started. After
        the first Ctrl-C or other signal of `interrupts.SIGNALS`, wait for the tasks in progress and then raise
        KeyboardInterrupt; after a second one, raise it at once. Call it from the main thread, which receives signals.

        PackageError if the model's package cannot be loaded, HoverBatchError if loading its network raises another
        error, or its process dies repeatedly. TooManyFailures if more slides failed than the settings allow, InputError
        if a node cannot be used, and OSError if the run's records cannot be written.
        """
        self._waiting = deque(slides)
        patience_ends = time.monotonic() + PATIENCE_S
        try:
            with on_interrupt(self._stop_after_tasks):
                while True:
                    self._follow_nodes()
                    if self._stopping:
                        self._say_once("Finishing what is under way; press Ctrl-C again to stop at once.")
                    else:
                        while len(self._pool) < self._plan.networks:
                            self._pool.start(self._plan)
                        if self._context.disk.available():
                            self._open_slides()
                            self._submit_units()
                            self._submit_tasks()
                    if len(self._pool) and not self._pool.ready and time.monotonic() > patience_ends:
                        self._say_once("Still waiting for the first network: are its cores or GPUs held by others?")
                    if not self._unfinished():
                        break
                    self._wait()
        finally:
            self._pool.close()
        if self._stopping:
            raise KeyboardInterrupt

    def _stop_after_tasks(self) -> None:
        if self._stopping:
            raise KeyboardInterrupt
        self._stopping = True  # the loop says so: a signal handler must not print in the middle of a print

    def _say_once(self, line: str) -> None:
        if line not in self._shown:
            self._shown.add(line)
            self._progress.say(line)

    def _unfinished(self) -> bool:
        """Return whether anything is left to do or to wait for; networks that are still loading do not count."""
        return bool(self._running or (not self._stopping and (self._slides or self._waiting)))

    def _follow_nodes(self) -> None:
        """Adapt the plan and the networks to nodes that joined or left the cluster."""
        if self._nodes and (plan := self._nodes.replan(self._plan, self._context)):
            self._plan = plan
            self._recorder.networks = max(self._recorder.networks, plan.networks)
            self._pool.adapt(plan.networks)

    # Submit.

    def _open_slides(self) -> None:
        """Open slides until twice as many units are ready as the networks process at once.

        A slide whose units are not known yet counts as one unit. The number of open slides is limited so that
        post-processing keeps up. Without networks, slides are opened for post-processing alone.
        """
        at_once = len(self._pool) * self._plan.units_at_once
        ahead = 2 * (at_once or self._plan.regions_at_once)
        most = 2 * (at_once + self._plan.regions_at_once)
        ready = sum(len(slide.to_infer) if slide.surveyed else 1 for slide in self._slides)
        while self._waiting and ready < ahead and len(self._slides) < most and not self._slides.any_on_hold:
            planned = self._waiting.popleft()
            try:
                layout = self._recorder.begin(planned)
            except Exception as error:
                if is_disk_full(error):
                    self._waiting.appendleft(planned)
                    self._context.disk.report_full(planned.record.slide_id)
                    return
                self._recorder.fail(planned, Stage.OPEN, error)
                continue
            self._slides.add(SlideState(planned, layout))
            ready += 1

    def _submit_units(self) -> None:
        """Submit units, those of the oldest slide first, to the least loaded network; units with a strike alone."""
        slides = [slide for slide in self._slides if not slide.on_hold]
        for slide in slides:
            while slide.suspects and (network := self._pool.free_network(below_units=1)):
                self._infer(slide, slide.suspects.popleft(), network, alone=True)
        # One network gets no more units, so that a suspect that still waits can soon run alone in it.
        reserved = self._pool.least_loaded() if any(slide.suspects for slide in slides) else None
        for slide in slides:
            while slide.to_infer:
                network = self._pool.free_network(self._plan.units_at_once, reserved)
                if network is None:
                    return
                self._infer(slide, slide.to_infer.popleft(), network)

    def _infer(self, slide: SlideState, index: int, network: Network, alone: bool = False) -> None:
        network.units += 1
        network.alone = alone
        call = _Call(slide, Task(Stage.INFER, index), self._plan.halvings, network)
        self._running[network.handle.infer.remote(slide.work_ref, index)] = call

    def _submit_tasks(self) -> None:
        context, running = self._context, Counter(call.task.stage for call in self._running.values())
        max_surveys = len(self._pool) or self._plan.regions_at_once
        for slide, task in self._slides.take_tasks(running, max_surveys, self._plan.regions_at_once, time.monotonic()):
            match task.stage:
                case Stage.SURVEY:
                    call: Any = survey_slide.remote(slide.planned, context.package, context.settings, slide.layout)
                case Stage.POST:
                    call = post_region.remote(slide.work_ref, task.index)
                case _:
                    call = finalize_slide.remote(slide.work_ref, slide.seconds)
            self._running[call] = _Call(slide, task, self._plan.halvings)

    # Wait.

    def _wait(self) -> None:
        """Wait a moment for calls to end, and route those that have."""
        any_dead = self._pool.settle_unreachable()
        running = [*self._running, *self._pool.starting]
        if not running:
            retries_later = any(slide.retry_at for slide in self._slides)
            if not (any_dead or self._pool.any_unreachable or self._context.disk.full or retries_later):
                left = len(self._slides) + len(self._waiting)
                raise RuntimeError(f"nothing is under way, yet {left} slides are left")
            time.sleep(_POLL_S)
            return
        ended, _ = ray.wait(running, num_returns=1, timeout=_POLL_S)
        if ended and len(running) > 1:
            ended, _ = ray.wait(running, num_returns=len(running), timeout=0)
        for reference in ended:
            if reference in self._pool.starting:
                self._pool.continue_start(reference)
            else:
                self._route(self._running.pop(reference), reference)

    # Route.

    def _route(self, call: _Call, reference: Any) -> None:
        if call.network:
            call.network.units -= 1
            call.network.alone = False
        try:
            result = ray.get(reference)
        except RayError as error:
            if call.network and is_actor_failure(error):
                self._pool.handle_failure(call.network, error, functools.partial(self._failed, call))
            else:
                self._failed(call, cause_of(error), trace=str(error))
        else:
            self._succeeded(call, result)

    def _succeeded(self, call: _Call, result: Any) -> None:
        slide, recorder = call.slide, self._recorder
        match call.task.stage:
            case Stage.INFER if slide.ended:
                recorder.add_network_time(result)
            case _ if slide.ended:
                pass
            case Stage.SURVEY:
                slide.work_ref = ray.put(result.work)
                slide.add_survey(result)
                inferred = [slide.units[i] for i in result.inferred]
                recorder.record_survey(slide.slide_id, slide.units, inferred, len(result.post_processed))
            case Stage.INFER:
                unit = slide.units[call.task.index]
                slide.seconds.add(result)
                slide.mark_inferred(call.task.index)
                self._progress.add_tiles(len(unit.tile_cells))
                recorder.record_unit(slide.slide_id, unit, result)
            case Stage.POST:
                slide.seconds.add(result)
                slide.count_region()
                recorder.record_region(slide.slide_id, slide.units[call.task.index], result)
            case Stage.FINALIZE if result is None:
                slide.look_again()
            case Stage.FINALIZE:
                try:
                    recorder.finish_slide(slide.slide_id, result)
                except OSError as error:
                    self._failed(call, error)
                else:
                    self._slides.close(slide)
                    self._release_copies(slide)

    def _failed(self, call: _Call, error: Exception, trace: str | None = None) -> None:
        """Apply the fault policy to a call that failed."""
        slide, task = call.slide, call.task
        if isinstance(error, NetworkFailed) and call.network:  # its device may be broken
            self._pool.stop(call.network)
        reduced = call.halvings < self._plan.halvings
        if failure := self._slides.apply(verdict_on(error), slide, task, error, time.monotonic(), reduced=reduced):
            self._release_copies(slide)
            self._recorder.fail(slide.planned, task.stage, failure, trace)

    def _use_less(self, stage: Stage, slide_id: str) -> bool:
        """Halve the number of tasks that run in parallel, since memory ran out. Return whether this was possible."""
        smaller = self._plan.halved()
        if smaller is None:
            return False
        self._plan = smaller
        self._progress.warn(
            f"memory ran out in stage {stage} of {slide_id}: from now on at most {smaller.regions_at_once} regions are "
            f"post-processed at once, and {smaller.units_at_once} units are under way in a network"
        )
        return True

    def _release_copies(self, slide: SlideState) -> None:
        """Remove the copies of a slide that lies in other storage, on all nodes."""
        if not isinstance(slide.planned.record.path, Url):
            return
        release = functools.partial(self._context.copies.release, slide.slide_id)
        if self._nodes:
            self._nodes.on_each(release)
        else:
            release()
