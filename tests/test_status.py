"""Status of a run from its folder: finished, killed, failed, held by another process, and no run at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from hover_batch.cli import app

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def status(out: Path) -> dict[str, Any]:
    """What --json says; the plain lines are printed too, and must come without an error."""
    before = files(out)
    assert run("status", out).exit_code == 0
    result = run("status", out, "--json")
    assert result.exit_code == 0, result.output
    assert files(out) == before, "status wrote something"
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def lines(out: Path) -> list[str]:
    result = run("status", out)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two small white tiles, of which nothing is predicted, and of a broken file."""
    folder = tmp_path_factory.mktemp("status")
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((200, 300, 3), 245, np.uint8)).save(folder / name)
    (folder / "broken.svs").write_bytes(b"no slide")
    (folder / "cohort.csv").write_text("path,slide_id,mpp\na.png,a,0.25\nb.png,b.i-2,0.25\nbroken.svs,c,0.25\n")
    assert run("segment", folder / "cohort.csv", "-o", folder / "out").exit_code == 3
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy, to be harmed."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def made(out: Path, slides: list[str], events: list[tuple[float, str, dict[str, Any]]]) -> Path:
    """A run's folder without any slide's results; `events` with their seconds since START."""
    (out / "logs").mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"format": "hover-batch run", "model_id": "m"}))
    rows = [f"{name}.svs,{name},{row},pending" for row, name in enumerate(slides, start=2)]
    (out / "slides.csv").write_text("\n".join(["path,slide_id,row,status", *rows]) + "\n")
    log = [
        json.dumps(
            {"time": (START + timedelta(seconds=at)).isoformat(timespec="milliseconds"), "event": name, **values}
        )
        for at, name, values in events
    ]
    (out / "logs" / "events.jsonl").write_text("".join(line + "\n" for line in log))
    return out


def opened(out: Path, slide_id: str, *, markers: int = 0, parts: int = 0) -> None:
    folder = out / "slides" / slide_id
    for kind, suffix, count in (("markers", "json", markers), ("parts", "parquet", parts)):
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            (folder / kind / f"{number}_0.{suffix}").touch()
        (folder / kind / f".{count}_0.{suffix}.0a1b.partial").touch()
    (folder / "key.json").write_text("{}")


def done(out: Path, slide_id: str, nuclei: int) -> None:
    (out / "slides" / slide_id).mkdir(parents=True, exist_ok=True)
    (out / "slides" / slide_id / "slide.json").write_text(json.dumps({"nuclei": nuclei}))


def test_a_finished_run_with_a_failed_slide(finished: Path) -> None:
    told = status(finished)
    assert told["going_on"] is False and told["finished"] is not None
    assert told["slides"] == {"total": 3, "done": 2, "failed": 1, "under_way": 0, "pending": 0, "left_out": 0}
    assert told["nuclei"] == 0 and told["seconds_left"] is None
    (failure,) = told["failures"]
    assert (failure["slide_id"], failure["stage"]) == ("c", "open") and "broken.svs" in failure["reason"]
    text = lines(finished)
    assert text[1].startswith("running: no, it ended")
    assert "slides: 2 done, 1 failed, 0 begun, 0 pending, of 3" in text
    assert any(line.startswith("  c (open): ") for line in text)


def test_what_a_kill_leaves(out: Path) -> None:
    log = out / "logs" / "events.jsonl"
    events = log.read_text().splitlines(keepends=True)
    log.write_text(
        "".join(line for line in events if "run_finished" not in line and '"c"' not in line) + '{"time": "20'
    )
    slide = out / "slides" / "b.i-2"
    (slide / "slide.json").unlink()
    shutil.rmtree(slide / "parts")
    shutil.rmtree(out / "slides" / "c", ignore_errors=True)
    (slide / "markers" / ".1_0.json.00.partial").touch()
    told = status(out)
    assert told["going_on"] is False and told["finished"] is None
    assert told["slides"] == {"total": 3, "done": 1, "failed": 0, "under_way": 1, "pending": 1, "left_out": 0}
    assert (told["under_way"][0]["slide_id"], told["under_way"][0]["regions_posted"]) == ("b.i-2", 0)
    assert "stopped before its end" in lines(out)[1]


def test_a_run_that_another_process_holds(out: Path) -> None:
    script = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, out / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        told = status(out)
        text = lines(out)
        holder.communicate(b"\n")
    assert told["going_on"] is True
    assert told["holder"] == f"process {os.getpid()} on {socket.gethostname()}"
    assert text[1].startswith(f"running: yes, {told['holder']}; started 20")
    assert status(out)["going_on"] is False


def test_the_lock_is_asked_and_not_kept(out: Path) -> None:
    status(out)
    with open(out / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_no_locks_here(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    assert status(out)["going_on"] is None
    assert lines(out)[1].startswith("running: not known, this file system does not show locks; the last start ended")


def test_a_lock_of_another_machine_may_not_be_seen(tmp_path: Path) -> None:
    out = made(tmp_path / "out", ["a"], [(0, "run_started", {})])
    (out / ".lock").write_text("process 7 on far-away\n")
    assert status(out)["going_on"] is None
    assert "not known, a lock held by far-away" in lines(out)[1]


@pytest.mark.parametrize("kind", ["absent", "file", "empty", "foreign"])
def test_no_runs_folder(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "out"
    if kind == "file":
        folder.write_text("")
    elif kind != "absent":
        folder.mkdir()
    if kind == "foreign":
        (folder / "run.json").write_text('{"format": "other"}')
    result = run("status", folder)
    assert result.exit_code == 2 and not result.stdout
    absent = "holds no run; give the --output folder of `segment`"
    foreign = "its run.json was written by another program"
    assert result.stderr.startswith(f"Error: {folder}: {foreign if kind == 'foreign' else absent}")


def test_an_empty_list_of_slides_is_not_a_run_without_slides(tmp_path: Path) -> None:
    folder = made(tmp_path / "out", ["a"], [])
    (folder / "slides.csv").write_text("")
    for command in (["status", folder], ["report", folder], ["export", folder, "--to", "csv"]):
        result = run(*command)
        assert result.exit_code == 2 and not result.stdout
        assert f"{folder}/slides.csv: is corrupted or was edited (no column slide_id); repeat" in result.stderr


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "hover-batch run"'])
def test_a_corrupted_run_json_is_named(tmp_path: Path, content: str) -> None:
    """It is not taken for a folder without a run: that would send the user elsewhere."""
    run_json = made(tmp_path / "out", ["a"], []) / "run.json"
    run_json.write_text(content)
    for command in (
        ["status", run_json.parent],
        ["report", run_json.parent],
        ["view", run_json.parent],
        ["export", run_json.parent, "--to", "csv"],
        ["segment", "--from", run_json.parent, "-o", tmp_path / "new"],
        ["segment", "--example", "-o", run_json.parent],
    ):
        result = run(*command)
        assert result.exit_code == 2 and not result.stdout
        assert f"{run_json.parent}: its run.json is corrupted; restore it from a backup" in result.stderr


def test_units_of_open_slides_with_their_totals_where_the_log_has_them(tmp_path: Path) -> None:
    surveyed = {"slide_id": "a", "tiles": 900, "units": 30}
    out = made(tmp_path / "out", ["a", "b", "c"], [(0, "run_started", {}), (5, "slide_surveyed", surveyed)])
    opened(out, "a", markers=12, parts=3)
    opened(out, "b", markers=2)
    assert [(s["units_predicted"], s["regions_posted"], s["units"]) for s in status(out)["under_way"]] == [
        (12, 3, 30),
        (2, 0, None),
    ]
    text = lines(out)
    assert "  a: 12 of 30 units predicted, 3 of 30 regions post-processed" in text
    assert "  b: 2 units predicted, 0 regions post-processed" in text


def test_a_slide_that_failed_and_got_its_slide_json_is_done(tmp_path: Path) -> None:
    failed = [
        (1.0, "slide_failed", {"slide_id": n, "row": r, "stage": "s", "reason": "r"}) for r, n in ((2, "a"), (3, "b"))
    ]
    out = made(tmp_path / "out", ["a", "b"], [(0, "run_started", {}), *failed])
    done(out, "a", 70)
    done(out, "b", 5)
    os.utime(out / "slides" / "b" / "slide.json", (START.timestamp() - 60,) * 2)  # of a start before
    told = status(out)
    assert (told["slides"]["done"], told["slides"]["failed"], told["nuclei"]) == (1, 1, 70)
    assert [failure["slide_id"] for failure in told["failures"]] == ["b"]


def test_failures_are_those_of_the_last_start_and_ten_are_named(tmp_path: Path) -> None:
    names = [f"s{n}" for n in range(12)]
    failures = [
        (20.0 + row, "slide_failed", {"slide_id": name, "row": row, "stage": "open", "reason": "two\n  lines"})
        for row, name in enumerate(names, start=2)
    ]
    left_out = (11.0, "slide_failed", {"slide_id": "s0", "row": 99, "stage": "check", "reason": "no file"})
    old = (1.0, "slide_failed", {"slide_id": "ok", "row": 14, "stage": "open", "reason": "old"})
    out = made(
        tmp_path / "out",
        [*names, "ok"],
        [
            (0, "run_started", {}),
            old,
            (2, "run_finished", {"model_busy": 0.5}),
            (10, "run_resumed", {}),
            left_out,
            *failures,
        ],
    )
    told = status(out)
    assert told["slides"] == {"total": 13, "done": 0, "failed": 12, "under_way": 0, "pending": 1, "left_out": 1}
    assert len(told["failures"]) == 13 and told["model_busy"] == 0.5
    text = lines(out)
    assert text[-1] == f"  … and 3 more in {out / 'logs' / 'events.jsonl'}"
    assert text[-2] == "  s8 (open): two lines"
    assert "networks busy: 50% of the time, in an earlier start" in text


def held(out: Path) -> Any:
    """Lock `out` as a run does, in this process."""
    file = open(out / ".lock", "w+")  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def test_the_rate_looks_ten_minutes_back_over_whole_units(tmp_path: Path) -> None:
    units = [(float(at), "unit_done", {"slide_id": "a", "tiles": 60}) for at in (10, 20, 1000, 1300, 1600, 1900)]
    out = made(
        tmp_path / "out",
        ["a"],
        [(0, "run_started", {}), (1, "slide_surveyed", {"slide_id": "a", "tiles": 600, "units": 10}), *units],
    )
    opened(out, "a", markers=6)
    told = status(out)
    assert told["tiles_per_s"] == pytest.approx(120 / 600) and told["seconds_left"] is None  # nothing goes on
    assert any(
        line.startswith("rate: about 0.2 tiles/s in the 10 min up to 2026-03-01 12:31:40") for line in lines(out)
    )
    with held(out):
        assert status(out)["seconds_left"] == pytest.approx(240 / 0.2)


def test_where_nothing_is_predicted_the_rate_is_of_regions(tmp_path: Path) -> None:
    """As in a run of --from, which has no unit_done."""
    regions = [(float(at), "region_done", {"slide_id": "a"}) for at in (10, 20, 30, 40)]
    out = made(
        tmp_path / "out",
        ["a"],
        [(0, "run_started", {}), (1, "slide_surveyed", {"slide_id": "a", "tiles": 600, "units": 10}), *regions],
    )
    opened(out, "a", parts=4)
    assert "rate: about 0.1 regions/s in the 40 s up to 2026-03-01 12:00:40 UTC" in lines(out)
    with held(out):
        told = status(out)
        assert told["tiles_per_s"] is None and told["regions_per_s"] == pytest.approx(0.1)
        assert told["seconds_left"] == pytest.approx(60)
        assert "time left: about 60 s to post-process the rest of the slides in progress" in lines(out)


def test_a_full_disk_and_what_was_tried_again_are_told(tmp_path: Path) -> None:
    before = [(1.0, "strike", {}), (2.0, "lost", {}), (3.0, "disk_full", {"slide_id": "a"}), (9.0, "run_resumed", {})]
    since = [(11.0, "strike", {}), (12.0, "strike", {}), (13.0, "memory_short", {})]
    changed = (14.0, "nodes_changed", {"nodes": 3, "networks": 5})
    full = (15.0, "disk_full", {"slide_id": "a"})
    units = [(float(at), "unit_done", {"slide_id": "a", "tiles": 60}) for at in (10, 12)]
    surveyed = (9.5, "slide_surveyed", {"slide_id": "a", "tiles": 600, "units": 10})
    so_far = [(0.0, "run_started", {}), *before, surveyed, *units, *since, changed, full]
    out = made(tmp_path / "out", ["a"], so_far)
    opened(out, "a", markers=2)
    with held(out):
        told, text = status(out), lines(out)
        assert told["disk_full_since"] == "2026-03-01T12:00:15.000+00:00" and told["seconds_left"] is None
        assert told["tried_again"] == {"strike": 2, "lost": 0, "memory_short": 1} and told["nodes"] == 3
        when = "2026-03-01 12:00:15 UTC"
        paused = f"paused: the disk has been full since {when}; free some space, and the run continues by itself"
        assert paused in text
        assert "cluster: now 3 nodes and 5 networks, after nodes joined or left" in text
        assert "retries since the start: a process crashed or failed: 2, memory ran out: 1" in text
    assert not any(line.startswith("paused") for line in lines(out))  # nobody waits any more
    room = made(tmp_path / "room", ["a"], [*so_far, (20.0, "disk_has_room", {})])
    opened(room, "a", markers=2)
    with held(room):
        assert status(room)["disk_full_since"] is None and status(room)["seconds_left"] is not None


def test_time_left_by_the_slides_finished_since_the_start(tmp_path: Path) -> None:
    events = [
        (0.0, "run_resumed", {}),
        (100.0, "slide_done", {"slide_id": "a"}),
        (300.0, "slide_done", {"slide_id": "b"}),
    ]
    out = made(tmp_path / "out", list("abcdef"), events)
    done(out, "a", 1)
    done(out, "b", 1)
    opened(out, "c")
    with held(out):
        assert status(out)["seconds_left"] == pytest.approx(4 * 150)
        assert "time left: about 10 min if the 4 slides left go as fast as the 2 finished since the start" in lines(out)


def test_an_old_or_empty_log_gives_no_rate_and_no_estimate(tmp_path: Path) -> None:
    out = made(tmp_path / "out", ["a"], [(0, "run_started", {}), (9, "unit_done", {"slide_id": "a"})])
    opened(out, "a", markers=1)
    with held(out):
        for _ in range(2):
            told = status(out)
            assert told["tiles_per_s"] is None and told["seconds_left"] is None
            assert told["under_way"][0]["units_predicted"] == 1
            (out / "logs" / "events.jsonl").unlink(missing_ok=True)


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"nuclei": null}', b"\0\0"])
def test_a_slide_json_that_vanishes_or_is_harmed_is_not_done(tmp_path: Path, content: bytes | None) -> None:
    out = made(tmp_path / "out", ["a"], [(0, "run_started", {})])
    (out / "slides" / "a").mkdir(parents=True)
    if content is not None:
        (out / "slides" / "a" / "slide.json").write_bytes(content)
    assert status(out)["slides"]["pending"] == 1


def test_lines_of_a_log_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    out = made(tmp_path / "out", ["a"], [(0, "run_started", {})])
    with open(out / "logs" / "events.jsonl", "ab") as file:
        file.write(
            b'\0\0\0\n[]\n{"event": "slide_done"}\n{"time": 3, "event": "x"}\n{"time": "2026-03-01T12:00:09+00:00"}\n'
        )
    assert status(out)["last_event"] == "2026-03-01T12:00:09.000+00:00"


def test_before_the_slides_are_listed(tmp_path: Path) -> None:
    out = made(tmp_path / "out", [], [])
    (out / "slides.csv").unlink()
    assert status(out)["slides"] is None
    assert "slides: not known, since slides.csv is not written yet" in lines(out)


def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path: Path) -> None:
    out = made(tmp_path / "out", ["a"], [(0, "run_started", {})])
    for path in (out / "slides" / "a" / "slide.json", out / "slides.csv", out / "run.json"):
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)
        for command in (["status"], ["report"], ["view", "--slide", "a"], ["export", "--to", "csv"]):
            result = run(*command, out)
            assert result.exit_code == 2
            assert result.stderr == f"Error: {path}: Is a directory; a file belongs there: move or remove the folder\n"
