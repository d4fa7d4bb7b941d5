"""The fault policy without Ray: in any order of faults, no work is lost and every slide ends once."""

from __future__ import annotations

import errno
import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

from hypothesis import given
from hypothesis import strategies as st
from test_slide_state import slide, surveyed, unit

from hover_batch.cohort.record import Stage
from hover_batch.config import Settings
from hover_batch.errors import ScratchFull, SlideError, SlideQuarantined
from hover_batch.executor.cluster import prepare_own_cluster
from hover_batch.executor.slide_state import (
    FAILS_AT,
    OpenSlides,
    SlideState,
    Surveyed,
    Task,
    Verdict,
)
from hover_batch.model.card import Card
from hover_batch.pipeline import NetworkFailed, UnitsMissing
from hover_batch.seconds import Seconds

BLAMELESS = (Verdict.RETRY, Verdict.SHORT_OF_MEMORY, Verdict.DISK_FULL)
CELLS = ((0, 0), (1, 0), (0, 1), (5, 5))
FAULT = RuntimeError("its process died")


class Cohort:
    """Slides of four units, and a driver that submits and ends their tasks as it is told."""

    def __init__(self, slides: int) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.pauses: list[str] = []
        self.open = OpenSlides(
            lambda event, **values: self.events.append((event, values)),
            lambda slide_id, error: self.pauses.append(slide_id),
            lambda stage, slide_id: self.can_use_less,
        )
        self.can_use_less = True
        self.slides = [slide() for _ in range(slides)]
        for state in self.slides:
            self.open.add(state)
        self.running: list[tuple[SlideState, Task]] = []
        self.done: list[tuple[SlideState, Task]] = []
        self.failed: list[tuple[SlideState, Exception]] = []
        self.now = 0.0

    def submit(self) -> None:
        """Submit what can be: two posts and two surveys at once, any number of units, one suspect at a time."""
        for state in self.open:
            if not state.on_hold:
                self.running += [(state, Task(Stage.INFER, i)) for i in (*state.suspects, *state.to_infer)]
                state.suspects.clear()
                state.to_infer.clear()
        running = Counter(task.stage for _, task in self.running)
        self.running += list(self.open.take_tasks(running, 2, 2, self.now))

    def succeed(self, state: SlideState, task: Task) -> None:
        self.running.remove((state, task))
        if state.ended:
            return
        self.done.append((state, task))
        if task.stage is Stage.SURVEY:
            work: Any = SimpleNamespace(units=tuple(unit(*cell) for cell in CELLS))
            state.add_survey(Surveyed(work, (), (), Seconds()))
        elif task.stage is Stage.INFER:
            state.mark_inferred(task.index)
        elif task.stage is Stage.POST:
            state.count_region()
        else:
            self.open.close(state)

    def fail(self, state: SlideState, task: Task, verdict: Verdict, error: Exception = FAULT) -> None:
        self.running.remove((state, task))
        if failure := self.open.apply(verdict, state, task, error, self.now):
            self.failed.append((state, failure))


@given(data=st.data(), slides=st.integers(1, 3))
def test_every_slide_ends_once_and_no_work_is_lost(data: st.DataObject, slides: int) -> None:
    cohort, faults = Cohort(slides), data.draw(st.integers(0, 25))
    strikes, losses = Counter[tuple[SlideState, Task]](), Counter[tuple[SlideState, Task]]()
    while len(cohort.open):
        cohort.submit()
        assert len(set(cohort.running)) == len(cohort.running), "a task is under way twice"
        assert cohort.running, "slides are left, and nothing can be submitted"
        state, task = data.draw(st.sampled_from(cohort.running))
        ended, verdict = state.ended, data.draw(st.sampled_from(Verdict)) if faults else None
        if verdict is None:
            cohort.succeed(state, task)
            continue
        faults -= 1
        full = ScratchFull() if data.draw(st.booleans()) else OSError()
        cohort.fail(state, task, verdict, full if verdict is Verdict.DISK_FULL else FAULT)
        if not ended:
            strikes[state, task] += verdict is Verdict.STRIKE
            losses[state, task] += verdict is Verdict.NODE_LOST
            out = (
                verdict is Verdict.FAIL
                or strikes[state, task] == FAILS_AT[Verdict.STRIKE]
                or losses[state, task] == FAILS_AT[Verdict.NODE_LOST]
            )
            assert state.ended == out
    for state, task in list(cohort.running):  # results that come too late
        cohort.fail(state, task, data.draw(st.sampled_from(Verdict)))
    assert all(state.ended for state in cohort.slides)
    failed = [state for state, _ in cohort.failed]
    assert len(set(failed)) == len(failed)
    every = {Task(Stage.SURVEY), Task(Stage.FINALIZE)}
    every |= {Task(stage, i) for stage in (Stage.INFER, Stage.POST) for i in range(len(CELLS))}
    for state in cohort.slides:
        done = Counter(task for other, task in cohort.done if other is state)
        assert max(done.values(), default=0) <= 1, "a task was done twice"
        assert (set(done) == every) != (state in failed)


def unit_with(verdicts: list[Verdict]) -> tuple[Cohort, SlideState]:
    """A surveyed slide, one of whose units gets these verdicts one after the other."""
    cohort = Cohort(1)
    (state,) = cohort.slides
    cohort.submit()
    cohort.succeed(state, Task(Stage.SURVEY))
    for verdict in verdicts:
        cohort.submit()
        cohort.fail(state, Task(Stage.INFER, 1), verdict)
    return cohort, state


def test_a_unit_that_fails_again_alone_is_quarantined() -> None:
    cohort, state = unit_with([Verdict.STRIKE])
    assert list(state.suspects) == [1] and not cohort.failed
    cohort.submit()
    cohort.fail(state, Task(Stage.INFER, 1), Verdict.STRIKE)
    ((_, failure),) = cohort.failed
    assert isinstance(failure, SlideQuarantined)
    assert "unit r00000_c00001: its process died, 2 times, the last time alone" in str(failure)
    assert [(name, values["strikes"]) for name, values in cohort.events] == [("strike", 1), ("strike", 2)]


@given(st.lists(st.sampled_from(BLAMELESS), max_size=20))
def test_faults_without_blame_neither_clear_a_suspect_nor_quarantine_it(verdicts: list[Verdict]) -> None:
    cohort, state = unit_with([Verdict.STRIKE, *verdicts])
    assert list(state.suspects) == [1] and not cohort.failed
    assert not cohort.failed and sum(name == "strike" for name, _ in cohort.events) == 1


def test_a_lost_node_costs_no_strike_but_five_losses_quarantine() -> None:
    cohort, state = unit_with([Verdict.NODE_LOST] * (FAILS_AT[Verdict.NODE_LOST] - 1))
    assert not state.verdicts[Verdict.STRIKE, Task(Stage.INFER, 1)] and not cohort.failed and state.to_infer[0] == 1
    cohort, state = unit_with([Verdict.NODE_LOST] * FAILS_AT[Verdict.NODE_LOST])
    ((_, failure),) = cohort.failed
    assert isinstance(failure, SlideQuarantined) and "its node was lost, 5 times;" in str(failure)
    assert {name for name, _ in cohort.events} == {"lost"}


def test_a_full_disk_pauses_the_run_and_blames_nothing() -> None:
    cohort, state = unit_with([Verdict.DISK_FULL] * 100)
    assert cohort.pauses == ["s"] * 100 and not cohort.events and not cohort.failed and state.to_infer[0] == 1


def test_a_slide_without_space_for_its_copy_waits_for_another_to_end() -> None:
    cohort = Cohort(2)
    first, second = cohort.slides
    cohort.submit()
    cohort.fail(second, Task(Stage.SURVEY), Verdict.DISK_FULL, ScratchFull())
    assert second.on_hold and not cohort.pauses
    cohort.submit()
    assert cohort.running == [(first, Task(Stage.SURVEY))]
    cohort.fail(first, Task(Stage.SURVEY), Verdict.DISK_FULL, ScratchFull())
    assert not first.on_hold and cohort.pauses, "nothing would ever end that could free its space"
    cohort.open.close(first)
    cohort.submit()
    assert cohort.running == [(second, Task(Stage.SURVEY))]


def test_a_unit_that_is_short_of_memory_with_the_least_at_once_is_to_blame() -> None:
    cohort, state = unit_with([])
    cohort.can_use_less = False
    for _ in range(FAILS_AT[Verdict.STRIKE]):
        cohort.submit()
        cohort.fail(state, Task(Stage.INFER, 1), Verdict.SHORT_OF_MEMORY)
    ((_, failure),) = cohort.failed
    assert isinstance(failure, SlideQuarantined) and "memory ran out, 2 times" in str(failure)


def test_the_death_of_a_network_halves_the_work_at_once_however_many_units_it_held() -> None:
    prepare_own_cluster()  # before Ray is imported, for the tests after this one
    from hover_batch.executor.faults import WorkerDied
    from hover_batch.executor.ray import RayExecutor, _Call
    from hover_batch.executor.resources import Node, Resources, engine_plan

    state, card = surveyed(list(CELLS), set(), set()), SimpleNamespace(layout=SimpleNamespace(planes=8))
    context: Any = MagicMock()
    plan = engine_plan(Resources((Node(2, 1, 64 << 30),)), Settings(), cast(Card, card))
    executor = RayExecutor(context, plan)
    executor._slides.add(state)
    for deaths in (1, 2):
        units = [Task(Stage.INFER, state.to_infer.popleft()) for _ in range(executor._plan.units_at_once)]
        assert len(units) > 1
        for call in [_Call(state, task, executor._plan.halvings) for task in units]:
            executor._failed(call, WorkerDied(Verdict.SHORT_OF_MEMORY, "its process died (OutOfMemoryError)"))
        assert executor._plan.halvings == deaths == context.recorder.progress.warn.call_count
    assert sorted(state.to_infer) == list(range(len(CELLS))) and not state.suspects, "a unit was blamed"


def test_no_task_is_retried_for_ever() -> None:
    cohort, _ = unit_with([Verdict.RETRY] * FAILS_AT[Verdict.RETRY])
    ((_, failure),) = cohort.failed
    assert isinstance(failure, SlideQuarantined) and f"{FAILS_AT[Verdict.RETRY]} times" in str(failure)


def test_results_that_stay_invisible_end_the_slide() -> None:
    state, cohort = surveyed([(0, 0)], {0}, {0}), Cohort(0)
    cohort.open.add(state)
    for attempt in range(FAILS_AT[Verdict.RETRY]):
        assert not cohort.failed, attempt
        cohort.submit()
        cohort.fail(state, Task(Stage.FINALIZE), Verdict.RETRY, UnitsMissing(((0, 0),)))
        cohort.now += 10
    ((_, failure),) = cohort.failed
    assert isinstance(failure, SlideError) and "run the same command again" in str(failure)


def test_each_exception_has_its_verdict() -> None:
    prepare_own_cluster()  # before Ray is imported, for the tests after this one
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

    from hover_batch.executor.faults import NetworkStopped, WorkerDied, cause_of, verdict_on

    raised = [
        (NetworkFailed("x"), Verdict.STRIKE),
        (MemoryError(), Verdict.SHORT_OF_MEMORY),
        (OSError(errno.EDQUOT, "quota"), Verdict.DISK_FULL),
        (ScratchFull(errno.ENOSPC, "full", "/scratch"), Verdict.DISK_FULL),
        (UnitsMissing(((0, 0),)), Verdict.RETRY),
        (SlideError("x"), Verdict.FAIL),
        (OSError(errno.EIO, "broken"), Verdict.FAIL),
    ]
    for error, verdict in raised:
        cause = cause_of(RayTaskError("function", "trace", error, ip="127.0.0.1"))
        assert cause is error and verdict_on(cause) is verdict
    assert verdict_on(NetworkStopped()) is Verdict.RETRY
    died = [
        (WorkerCrashedError(), Verdict.STRIKE),
        (NodeDiedError("x"), Verdict.NODE_LOST),
        (OutOfMemoryError("x"), Verdict.SHORT_OF_MEMORY),
    ]
    for ray_error, verdict in died:
        cause = pickle.loads(pickle.dumps(cause_of(ray_error, "its reader")))
        assert isinstance(cause, WorkerDied) and verdict_on(cause) is verdict
        assert str(cause) == f"its reader died ({type(ray_error).__name__})"
