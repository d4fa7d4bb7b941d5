"""kill -9 of each kind of process, at chosen moments and at random ones: the same tables, byte for byte."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from accelerators import LoadDeadly, LoadQuick
from cohort_runs import Run, note, runner
from test_contract import events

pytestmark = pytest.mark.faults

Fields = Callable[..., Path]
DONE = {"infer": "unit_done", "post": "region_done", "finalize": "slide_done"}
"""Event of a stage's success."""


def at(event: dict[str, object]) -> float:
    return datetime.fromisoformat(str(event["time"])).timestamp()


def recovery(out: Path, fault: str) -> float:
    """Seconds from the first event `fault` to that slide's next success in the same stage, or further on."""
    first = events(out, fault)[0]
    later = [e for name in DONE.values() for e in events(out, name)]
    return min(at(e) for e in later if e["slide_id"] == first["slide_id"] and at(e) > at(first)) - at(first)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Run:
    """In this process, in which no fault is planted."""
    return runner("local", monkeypatch)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("sigsegv-once", "infer"),
        ("torn-shard-once", "infer"),
        ("torn-marker-once", "infer"),
        ("torn-part-once", "post"),
        ("torn-table-once", "finalize"),
    ],
)
def test_a_process_dies_in_the_middle_of_a_write(
    fields: Fields,
    run_on_ray: Run,
    ray_cluster: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stage: str,
) -> None:
    """It has written a shard, a marker, a part or a table without renaming it; or it is reading a block."""
    named = f"{name}-9"  # the cluster is shared, and each name crashes once
    out, cohort = tmp_path / "out", fields("a", named)
    assert run_on_ray(cohort, out, LoadQuick()).exit_code == 0
    hit = (ray_cluster / f"{name.removesuffix('-once')}-{named}").exists()
    assert hit, "nothing was killed"
    strikes_seen = events(out, "strike")
    assert strikes_seen and {(e["slide_id"], e["stage"]) for e in strikes_seen} <= {(named, stage), ("a", stage)}
    runner("local", monkeypatch)(cohort, tmp_path / "reference", LoadQuick())
    strikes = max(int(str(e["strikes"])) for e in strikes_seen)
    note(f"kill -9 at {name.removesuffix('-once')}", out, tmp_path / "reference", 1 + strikes, recovery(out, "strike"))


def test_a_network_is_killed_between_two_batches(
    fields: Fields, run_on_ray: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cohort = tmp_path / "out", fields("a", "b")
    assert run_on_ray(cohort, out, LoadDeadly(tmp_path)).exit_code == 0
    assert (tmp_path / "death-0").exists()
    assert {e["stage"] for e in events(out, "strike")} == {"infer"}
    runner("local", monkeypatch)(cohort, tmp_path / "reference", LoadQuick())
    note("kill -9 of a network in its batch", out, tmp_path / "reference", 2, recovery(out, "strike"))


class Killer(threading.Thread):
    """Kills one of this process's descendants named `title`, at random moments, until the run has recorded a strike.
    `at`: when each was killed."""

    def __init__(self, title: str, seed: int, out: Path) -> None:
        super().__init__()
        self.title, self.out = title, out
        self.random = random.Random(seed)
        self.at: list[float] = []
        self.over = threading.Event()

    def run(self) -> None:
        delay = self.random.uniform(0.2, 2.0)
        while not self.over.is_set() and not events(self.out, "strike"):
            if self.over.wait(0.02 if self.at or not self._there() else delay):
                return
            found = self._there()
            if found and (not self.at or time.time() - self.at[-1] > 5.0):
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.random.choice(found).kill()
                    self.at.append(time.time())

    def _there(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(self.title):
                    found.append(process)
        return found


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("title", "stage"),
    [
        ("ray::InferActor.infer", "infer"),
        ("ray::read_blocks", "infer"),
        ("ray::post_region", "post"),
        ("ray::finalize_slide", "finalize"),
    ],
)
def test_a_process_is_killed_at_a_random_moment(
    fields: Fields, run_on_ray: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: str, stage: str, seed: int
) -> None:
    out, cohort = tmp_path / "out", fields("slow-a", "slow-b")
    killer = Killer(title, seed, out)
    killer.start()
    try:
        outcome = run_on_ray(cohort, out, LoadQuick(0.2))
    finally:
        killer.over.set()
        killer.join()
    assert outcome.exit_code == 0
    strikes_seen = events(out, "strike")
    assert killer.at and {e["stage"] for e in strikes_seen} == {stage}
    runner("local", monkeypatch)(cohort, tmp_path / "reference", LoadQuick())
    note(
        f"kill -9 of {title} at random, seed {seed}",
        out,
        tmp_path / "reference",
        1 + max(int(str(e["strikes"])) for e in strikes_seen),
        recovery(out, "strike"),
    )


def test_memory_runs_out_in_post_processing(
    fields: Fields, run_on_ray: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocation fails: the run does less at once, and nothing gets a strike."""
    out, cohort = tmp_path / "out", fields("a", "memory-once")
    assert run_on_ray(cohort, out, LoadQuick()).exit_code == 0
    assert [e["slide_id"] for e in events(out, "memory_short")] == ["memory-once"] and not events(out, "strike")
    runner("local", monkeypatch)(cohort, tmp_path / "reference", LoadQuick())
    note("MemoryError in post-processing", out, tmp_path / "reference", 2, recovery(out, "memory_short"))
