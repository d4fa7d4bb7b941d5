"""Slides that are added, made again and added again; and what is on disk wherever a writer is killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_runs import MadeRun, check, held, same
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hover_batch.dataset.opened import Dataset
from hover_batch.dataset.slides import read_entries, read_slides_table
from hover_batch.dataset.update import add_run
from hover_batch.geometry import Size

pytestmark = pytest.mark.usefixtures("small_files")

SLIDES = "abcdef"
change = st.tuples(
    st.sampled_from("xy"),  # run
    st.sampled_from(SLIDES),
    st.sampled_from([0, 1, 40, 90, 150, 299, 300, 450]),  # nuclei
    st.integers(0, 1),
)
Steps = list[tuple[list[tuple[str, str, int, int]], bool]]
"""In each step, slides that are made (run, slide, nuclei, seed), and whether only one of each run is added."""
steps = st.lists(st.tuples(st.lists(change, max_size=5), st.booleans()), min_size=1, max_size=5)


def silent(line: str) -> None:
    pass


def searched(examples: int) -> settings:
    return settings(max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.faults
@searched(50)
@given(steps=steps)
def test_any_sequence_leaves_the_tables_of_the_runs(nuclei: tuple[Any, Size], steps: Steps) -> None:
    follow(nuclei, steps)


@searched(1)
@given(steps=steps)
# A slide in a full file becomes larger.
@example(steps=[([("x", s, 90, 0) for s in "abc"] + [("x", "d", 299, 0)], False), ([("x", "a", 299, 0)], False)])
# Two runs; slides that become empty, large, small and large again; only one of several slides is added.
@example(
    steps=[
        ([("x", "a", 450, 0), ("x", "b", 40, 0), ("y", "a", 90, 0), ("x", "c", 0, 0)], False),
        ([("x", "a", 0, 0), ("x", "b", 300, 1), ("x", "c", 1, 0), ("y", "b", 150, 0)], True),
        ([("x", "a", 40, 1), ("y", "a", 450, 1)], False),
    ]
)
def test_some_sequences_leave_the_tables_of_the_runs(nuclei: tuple[Any, Size], steps: Steps) -> None:
    follow(nuclei, steps)


def follow(nuclei: tuple[Any, Size], steps: Steps) -> None:
    """Change and add slides step by step, and check the data set after each of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {key: MadeRun(folder / key, *nuclei, model_sha256=key * 64) for key in "xy"}
        wanted: dict[tuple[str, str], pa.Table] = {}
        for changes, only_one in steps:
            for key, slide_id, rows, seed in changes:
                runs[key].put(slide_id, rows, seed)
            for run in runs.values():
                listed = list(run.patients)
                chosen = listed[:1] if only_one else listed
                if not chosen:
                    continue
                # A run without a table of slides has nothing to be added.
                added = add_run(run.layout.root, folder / "dataset", chosen if only_one else (), silent)
                assert sorted(added.added + added.unchanged) == sorted(chosen) and not added.skipped
                tables = {(slide_id, run.model): run.table(slide_id) for slide_id in chosen}
                changed = {key[0] for key, table in tables.items() if key not in wanted or wanted[key] != table}
                assert set(added.added) == changed
                wanted |= tables
                check(folder / "dataset", wanted)
        if wanted:
            for name, sizes in sizes_of(folder / "dataset").items():
                assert len(sizes) == 1 or sum(sizes) < 600, name


def sizes_of(dataset: Path) -> dict[str, list[int]]:
    """Numbers of nuclei of the slides in each file."""
    sizes: dict[str, list[int]] = {}
    for entry in read_entries(dataset):
        for name in entry.nuclei_files:
            sizes.setdefault(name, []).append(entry.nuclei_rows)
    return sizes


def test_slides_that_come_one_by_one_share_files(nuclei: tuple[Any, Size], tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", *nuclei)
    wanted = {}
    for number in range(12):
        run.put(f"s{number}", 70, seed=number)
        add_run(run.layout.root, tmp_path / "dataset", (), silent)
        wanted[f"s{number}", run.model] = run.table(f"s{number}")
    check(tmp_path / "dataset", wanted)
    assert sorted(map(len, sizes_of(tmp_path / "dataset").values())) == [2, 5, 5]


def test_the_same_command_again_reads_no_table_and_writes_nothing(
    nuclei: tuple[Any, Size], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, dataset = MadeRun(tmp_path / "run", *nuclei), tmp_path / "dataset"
    for slide_id in "ab":
        run.put(slide_id, 200)
    add_run(run.layout.root, dataset, (), silent)
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*.parquet")}
    lines: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr("hover_batch.dataset.source.NucleiTable.open", None)
        added = add_run(run.layout.root, dataset, (), lines.append)
    assert added.unchanged == ["a", "b"] and lines == ["2 slides already in the data set"]
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*.parquet")} == before


def test_a_corrected_row_changes_the_table_of_slides_only(nuclei: tuple[Any, Size], tmp_path: Path) -> None:
    run, dataset = MadeRun(tmp_path / "run", *nuclei), tmp_path / "dataset"
    for slide_id in "ab":
        run.put(slide_id, 200)
    add_run(run.layout.root, dataset, (), silent)
    before = {path: path.stat().st_ino for path in dataset.rglob("nuclei/**/*.parquet")}
    run.list("b", patient="P2", site="north")
    lines: list[str] = []
    assert add_run(run.layout.root, dataset, (), lines.append).added == []
    replaced = "replaced by the cohort's value for 1 slide already in the data set"
    assert lines[1:] == [f"patient_id: {replaced} (b: P1 → P2)"]
    run.list("b", patient="P2", site="")
    add_run(run.layout.root, dataset, (), lines.append)
    assert lines[3:] == [f"site: {replaced} (b: north → empty)"]
    run.list("b", patient="P2", site="north")
    add_run(run.layout.root, dataset, (), silent)
    rows = {row["slide_id"]: row for row in read_slides_table(dataset).to_pylist()}
    assert rows["b"]["patient_id"] == "P2" and rows["b"]["site"] == "north" and rows["a"]["patient_id"] == "P1"
    assert {path: path.stat().st_ino for path in dataset.rglob("nuclei/**/*.parquet")} == before


def test_columns_of_two_runs_with_other_classes_and_cells(nuclei: tuple[Any, Size], tmp_path: Path) -> None:
    """A number in one run and a text in the other become two columns, however the runs come."""
    tables = []
    for order in ("xy", "yx"):
        runs = {key: MadeRun(tmp_path / order / key, *nuclei, model_sha256=key * 64) for key in "xy"}
        runs["y"].list("b", seconds_stain="long", ink="much")
        for key, slide_id in (("x", "a"), ("y", "b")):
            runs[key].put(slide_id, 50)
        for key in order * 2:
            add_run(runs[key].layout.root, tmp_path / order / "dataset", (), silent)
        tables.append(read_slides_table(tmp_path / order / "dataset"))
    for table in tables:
        rows = {row["slide_id"]: row for row in table.to_pylist()}
        assert rows["b"]["extra_ink"] == "much" and rows["a"]["extra_ink"] is None
    assert set(tables[0].column_names) == set(tables[1].column_names)


def test_columns_of_two_runs_that_sql_does_not_distinguish_are_one(nuclei: tuple[Any, Size], tmp_path: Path) -> None:
    for key, slide_id, column in (("x", "a", "Age"), ("y", "b", "age")):
        run = MadeRun(tmp_path / key, *nuclei, model_sha256=key * 64)
        run.list(slide_id, **{column: slide_id})
        run.put(slide_id, 50)
        add_run(run.layout.root, tmp_path / "dataset", (), silent)
    with Dataset(tmp_path / "dataset") as dataset:
        assert dataset.sql("SELECT age FROM slides ORDER BY ALL")["Age"].tolist() == ["a", "b"]


def recorded(monkeypatch: pytest.MonkeyPatch, dataset: Path, snapshots: Path) -> Callable[[], list[Path]]:
    """Copy the data set before and after each call that changes the disk: what a kill -9 there would leave."""
    taken: list[Path] = []
    last: list[tuple[Path, int]] = []

    def copy() -> None:
        # The length of a temporary file makes no difference.
        files = [(path, path.stat().st_ino) for path in sorted(dataset.rglob("*"))]
        if files != last:
            last[:] = files
            taken.append(snapshots / f"{len(taken):03d}")
            shutil.copytree(dataset, taken[-1], copy_function=shutil.copyfile)

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        busy: list[bool] = []

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if busy:
                return original(*args, **kwargs)
            busy.append(True)
            try:
                copy()
                result = original(*args, **kwargs)
                copy()
            finally:
                busy.clear()
            return result

        monkeypatch.setattr(owner, name, wrapped)

    watch(os, "replace")
    watch(os, "fsync")
    watch(Path, "unlink")
    watch(pq.ParquetWriter, "write_table")
    return lambda: taken


def test_a_slide_under_two_ids_is_named(nuclei: tuple[Any, Size], tmp_path: Path) -> None:
    lines: list[str] = []
    for slide_id, fingerprint in {"a": "1", "b": "2", "renamed": "1"}.items():
        run = MadeRun(tmp_path / slide_id, *nuclei)
        run.put(slide_id, 40, fingerprint=fingerprint)
        run.list(slide_id)
        add_run(run.layout.root, tmp_path / "dataset", (), lines.append)
    assert [line[:54] for line in lines if "same slide" in line] == [
        "a, renamed: are the same slide, whose nuclei are there"
    ]


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.faults), 10])
def test_wherever_it_is_killed_nothing_is_double_or_lost(
    nuclei: tuple[Any, Size], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """States on disk of an update that appends, and replaces slides in shared files and in one of its own."""
    run, dataset = MadeRun(tmp_path / "run", *nuclei), tmp_path / "dataset"
    (tmp_path / "snapshots").mkdir()
    for slide_id, rows in {"a": 310, "b": 150, "c": 160, "d": 90}.items():
        run.put(slide_id, rows)
    with monkeypatch.context() as patched:
        first = recorded(patched, dataset, tmp_path / "snapshots")
        add_run(run.layout.root, dataset, (), silent)
        empty = len(first())
        old = {slide_id: run.table(slide_id) for slide_id in "abcd"}
        run.put("a", 300, seed=1)
        run.put("b", 350, seed=1)
        run.put("e", 40)
        add_run(run.layout.root, dataset, (), silent)
        states = list(first())
    new = {slide_id: run.table(slide_id) for slide_id in "abcde"}
    final = {(slide_id, run.model): table for slide_id, table in new.items()}
    check(dataset, final)
    assert empty > 10 and len(states) > empty + 10
    seen = set()
    for number, state in list(enumerate(states))[::step]:
        if (state / "slides.parquet").exists():
            found = {slide_id: table for (slide_id, _), table in held(state).items()}
            if number >= empty:
                assert found.keys() >= old.keys()
            for slide_id, table in found.items():
                assert same(table, new[slide_id]) or (slide_id in old and same(table, old[slide_id])), (state, slide_id)
            seen.add(tuple(slide_id for slide_id in found if same(found[slide_id], new[slide_id])))
        add_run(run.layout.root, state, (), silent)
        check(state, final)
    assert len(seen) > (4 if step == 1 else 2)
