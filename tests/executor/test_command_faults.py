"""The command as a process: driver killed, disk full, memory short, slides truncated."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
from accelerators import LoadQuick
from cohort_runs import HERE, SETTINGS, Run, file_system, note, runner
from command import UNITS, assert_all_gone, count, start
from test_contract import events, tables
from test_kill_9 import at, recovery
from test_several_nodes import on_nodes

pytestmark = pytest.mark.faults

Fields = Callable[..., Path]
PLANTED = os.pathsep.join([str(HERE / "planted"), str(HERE), str(HERE.parents[1])])


def kill_driver(process: subprocess.Popen[str], when: Callable[[], bool]) -> float:
    deadline = time.monotonic() + 300
    while not when():
        assert process.poll() is None, f"ended before it could be interrupted: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    return time.time()


@pytest.mark.parametrize("seed", [1, 2])
def test_the_driver_is_killed_at_a_random_moment(cohort: Path, whole: Path, tmp_path: Path, seed: int) -> None:
    out = tmp_path / "out"
    slide, moments = out / "slides" / "field", random.Random(seed)
    process, stage = start(cohort, out), moments.choice(["markers", "parts"])
    reached = moments.randrange(1, UNITS - 2)
    kill_driver(process, lambda: count(slide / stage) >= reached and time.sleep(moments.uniform(0, 0.5)) is None)
    assert_all_gone(process.pid)
    assert not (slide / "slide.json").exists(), "it was not interrupted in the middle of its work"
    killed, before = time.time(), len(events(out, "unit_done"))
    again = start(cohort, out)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    later = [at(e) for name in ("unit_done", "region_done", "slide_done") for e in events(out, name) if at(e) > killed]
    note(f"kill -9 of the driver at random, seed {seed}", out, whole, 2, min(later) - killed)
    assert len(events(out, "unit_done")) - before <= UNITS - before + 3


def test_the_driver_is_killed_as_it_declares_a_slide_done(
    cohort: Path,
    whole: Path,
    tmp_path: Path,
) -> None:
    """slide.json is written and has no name yet."""
    named = cohort.with_name("named.csv")
    named.write_text("path,slide_id,mpp\nfield.png,torn-done-once,0.25\n")
    out, folder = tmp_path / "out", tmp_path / "planted"
    folder.mkdir()
    more = {"PLANTED": str(folder), "PYTHONPATH": PLANTED}
    process = start(named, out, more=more)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL and (folder / "torn-done-torn-done-once").exists(), printed
    slide = out / "slides" / "torn-done-once"
    assert (slide / "nuclei.parquet").exists() and not (slide / "slide.json").exists()
    assert_all_gone(process.pid)
    killed = time.time()
    again = start(named, out, more=more)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    reference = start(named, tmp_path / "reference", "--backend", "local")
    printed, _ = reference.communicate(timeout=300)
    assert reference.returncode == 0, printed
    recovered = min(at(e) for e in events(out, "slide_done")) - killed
    note("kill -9 of the driver at slide.json", out, tmp_path / "reference", 2, recovered)
    assert len(events(out, "unit_done")) == UNITS, "a unit was done again"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 MB, more than the space that a run waits for."""
    with file_system(tmp_path / "disk", "160m") as folder:
        yield folder


def test_the_command_waits_for_disk_space(cohort: Path, whole: Path, disk: Path) -> None:
    """It fills up when three units are done, and has space again once the command has said that it waits."""
    out, ballast = disk / "out", disk / "ballast"
    slide = out / "slides" / "field"
    process = start(cohort, out)
    deadline = time.monotonic() + 300
    while count(slide / "markers") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    with ballast.open("wb", buffering=0) as file:
        while file.write(bytes(65536)) == 65536:
            if os.statvfs(disk).f_bavail == 0:
                break
    assert process.stdout
    said = ""
    while "no space left on disk" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    reached = count(slide / "markers")
    assert reached < UNITS
    ballast.unlink()
    freed = time.time()
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said + printed
    assert "there is space on disk again" in printed
    assert not events(out, "strike")
    later = [at(e) for name in ("unit_done", "region_done", "slide_done") for e in events(out, name) if at(e) > freed]
    note("disk full (ENOSPC)", out, whole, 2, min(later) - freed)


@pytest.mark.parametrize("fault", ["hog", "gorge"])
def test_the_machine_runs_out_of_memory(
    fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Ray's monitor kills what takes more than is left: done again, less at once, and no slide is blamed."""
    memory = psutil.virtual_memory()
    if memory.available < 6 << 30:
        pytest.skip("less than 6 GiB of memory are free")
    threshold = 1 - (memory.available - (3 << 30)) / memory.total
    name = f"{fault}-once"
    cohort, out, folder = fields("a", name), tmp_path / "out", tmp_path / "planted"
    folder.mkdir()
    more = {
        "PLANTED": str(folder),
        "PYTHONPATH": PLANTED,
        "RAY_memory_usage_threshold": f"{threshold:.4f}",
        "RAY_memory_monitor_refresh_ms": "100",
    }
    found = on_nodes(
        tmp_path, cohort=cohort, out=out, gpus=1, cpus=2, nodes=1, seconds=0.2, unit=256, events=[], environment=more
    )
    assert found["exit_code"] == 0 and (folder / f"{fault}-{name}").exists()
    assert {e["slide_id"] for e in events(out, "memory_short")} == {name} and not events(out, "strike")
    runner("local", monkeypatch)(cohort, tmp_path / "reference", LoadQuick())
    note(
        f"the machine's memory runs out in {'inference' if fault == 'gorge' else 'post-processing'}",
        out,
        tmp_path / "reference",
        2,
        recovery(out, "memory_short"),
    )


def test_slides_that_are_cut_short_cost_themselves_only(
    data: Path, run_on_ray: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real slide between real ones: cut at three places, and with a hole in the middle of its pixels."""
    intact = (data / "slides" / "CMU-1-Small-Region.svs").read_bytes()
    folder = tmp_path / "cohort"
    folder.mkdir()
    for share in (30, 60, 95):
        (folder / f"cut{share}.svs").write_bytes(intact[: len(intact) * share // 100])
    middle = len(intact) // 2
    (folder / "hole.svs").write_bytes(intact[:middle] + bytes(100_000) + intact[middle + 100_000 :])
    (folder / "a.svs").write_bytes(intact)
    (folder / "b.svs").write_bytes(intact)
    names = ["a", "cut30", "cut60", "hole", "cut95", "b"]
    # Said to be finer than it is, so that it is read at a fifth: what is dark is then no network over the whole slide.
    (folder / "cohort.csv").write_text("path,mpp\n" + "".join(f"{name}.svs,0.05\n" for name in names))
    settings = replace(SETTINGS, infer=replace(SETTINGS.infer, unit=256, batch=8))
    out = tmp_path / "out"
    assert run_on_ray(folder / "cohort.csv", out, LoadQuick(), settings=settings).exit_code == 3
    failures = pd.read_csv(out / "failures.csv").set_index("slide_id").reason
    assert set(failures.index) == {"cut30", "cut60", "cut95", "hole"}
    assert all(f"{name}.svs" in reason for name, reason in failures.items()), list(failures)
    (folder / "cohort.csv").write_text("path,mpp\na.svs,0.05\nb.svs,0.05\n")
    runner("local", monkeypatch)(folder / "cohort.csv", tmp_path / "reference", LoadQuick(), settings=settings)
    assert set(tables(out)) == {"a", "b"}
    note("slides cut short: their neighbours", out, tmp_path / "reference", 1, 0.0)
