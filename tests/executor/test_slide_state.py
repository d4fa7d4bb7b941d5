"""In any order of results: no region before its units, no table before all units and regions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.record import SlideRecord, Stage
from hover_batch.executor.slide_state import RETRY_S, SlideState, Surveyed, Task
from hover_batch.geometry import Grid, Mpp, Size, cell_box
from hover_batch.pipeline import neighbours
from hover_batch.plan import PlannedSlide
from hover_batch.seconds import Seconds
from hover_batch.slide.headers import SlideInfo
from hover_batch.slide.tiles import Unit

SIDE = 256


def unit(column: int, row: int) -> Unit:
    return Unit(column, row, cell_box(column, row, SIDE), SIDE, ((column, row),))


def slide() -> SlideState:
    record = SlideRecord("s", Path("s.png"), row=2)
    size, mpp = Size(2048, 2048), Mpp(0.25, 0.25)
    info = SlideInfo(size, mpp, "file", None, (1.0,), "picture", None, "", ())
    return SlideState(PlannedSlide(record, info, Grid.over(size, mpp, 0.25), 1), SlideLayout(Path("out"), "s"))


def surveyed(cells: list[tuple[int, int]], inferred: set[int], post_processed: set[int]) -> SlideState:
    found = slide()
    work: Any = SimpleNamespace(units=tuple(unit(*cell) for cell in cells))
    found.add_survey(Surveyed(work, tuple(sorted(inferred)), tuple(sorted(post_processed)), Seconds()))
    return found


@given(data=st.data())
def test_every_region_is_done_once_and_after_its_units(data: st.DataObject) -> None:
    grid = [(column, row) for row in range(5) for column in range(5)]
    cells = sorted(data.draw(st.sets(st.sampled_from(grid), min_size=1)), key=lambda cell: cell[::-1])
    numbers = st.sets(st.integers(0, len(cells) - 1))
    inferred, posted = data.draw(numbers), data.draw(numbers)
    work = surveyed(cells, inferred, posted)
    done, regions = set(inferred), []
    predicting, posting = [], []
    while True:
        predicting += [work.to_infer.popleft() for _ in range(len(work.to_infer))]
        while work.to_post:
            region = work.to_post.popleft()
            around = {i for i, cell in enumerate(cells) if cell in set(neighbours(unit(*cells[region])))}
            assert around <= done
            posting.append(region)
        under_way = [("infer", i) for i in predicting] + [("post", i) for i in posting]
        if not under_way:
            break
        assert work.next_stage != Stage.FINALIZE
        what, i = data.draw(st.sampled_from(under_way))
        if what == "infer":
            predicting.remove(i)
            done.add(i)
            work.mark_inferred(i)
        else:
            posting.remove(i)
            regions.append(i)
            work.count_region()
    assert work.next_stage == Stage.FINALIZE
    assert done == set(range(len(cells)))
    assert sorted(regions) == sorted(set(range(len(cells))) - posted)


def test_a_corrupted_unit_is_predicted_before_the_slide_is_finalized() -> None:
    """An earlier run did all regions, but one unit's shard was found corrupted."""
    work = surveyed([(0, 0), (1, 0)], inferred={0}, post_processed={0, 1})
    assert work.next_stage != Stage.FINALIZE and list(work.to_infer) == [1]
    work.mark_inferred(1)
    assert work.next_stage == Stage.FINALIZE


def test_a_region_waits_for_further_units_that_it_needs() -> None:
    work = surveyed([(0, 0), (3, 0)], inferred={0}, post_processed=set())
    assert work.to_post.popleft() == 0
    assert work.retry_later(Task(Stage.POST, 0), ((3, 0),), now=0) is None
    work.queue_due_retries(1e12)
    assert not work.to_post
    work.mark_inferred(1)
    assert sorted(work.to_post) == [0, 1]


def test_a_region_is_retried_until_markers_are_visible() -> None:
    work = surveyed([(0, 0)], inferred={0}, post_processed=set())
    work.to_post.clear()
    assert work.retry_later(Task(Stage.POST, 0), ((0, 0),), now=5) is None
    work.queue_due_retries(5)
    assert not work.to_post
    work.queue_due_retries(5 + RETRY_S)
    assert list(work.to_post) == [0]


def test_finalization_is_retried_until_parts_are_visible() -> None:
    work = surveyed([(0, 0)], inferred={0}, post_processed={0})
    work.next_stage = None  # submitted
    assert work.retry_later(Task(Stage.FINALIZE), ((0, 0),), now=5) is None
    work.queue_due_retries(5)
    assert work.next_stage is None
    work.queue_due_retries(5 + RETRY_S)
    assert work.next_stage == Stage.FINALIZE and not work.to_post


def test_a_slide_without_units_is_finalized_at_once() -> None:
    assert surveyed([], set(), set()).next_stage == Stage.FINALIZE
