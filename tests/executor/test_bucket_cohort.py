"""A cohort with one slide in a bucket gives the same tables as from disk, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import bucket
import pandas as pd
import pytest
from accelerators import LoadQuick
from cohort_runs import SETTINGS, file_system, on_loopback, runner

from hover_batch.config import Settings
from hover_batch.errors import InputError
from hover_batch.executor import disk_space
from hover_batch.executor.local import LocalExecutor
from hover_batch.slide import staging
from hover_batch.stored_run import StoredRun

Fields = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setattr(staging, "FIRST_WAIT_S", 0.01)
    (tmp_path / "scratch").mkdir()
    with bucket.s3_server(monkeypatch, tmp_path) as address:
        yield address


def settings_with(scratch: Path) -> Settings:
    return replace(SETTINGS, engine=replace(SETTINGS.engine, scratch=str(scratch)))


def in_a_bucket(cohort: Path, *names: str) -> Path:
    """The same cohort, with these slides in a bucket and not on disk."""
    bucket.put("slides", {f"{name}.png": (cohort.parent / f"{name}.png").read_bytes() for name in names})
    text = cohort.read_text()
    for name in names:
        text = text.replace(f"\n{name}.png", f"\ns3://slides/{name}.png")
        (cohort.parent / f"{name}.png").unlink()
    cohort.write_text(text)
    return cohort


def tables(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in (out / "slides").glob("*/nuclei.parquet")}


def assert_nothing_secret_and_nothing_left(out: Path, scratch: Path) -> None:
    files = [path for path in out.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert bucket.SECRET.encode() not in content and bucket.KEY_ID.encode() not in content, path
    assert [path for path in scratch.rglob("*") if path.is_file()] == []


def test_a_bucket_gives_the_tables_that_the_disk_does(
    fields: Fields, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the slides move into the bucket altogether, and the finished run has nothing to do."""
    run, scratch = runner("local", monkeypatch), tmp_path / "scratch"
    settings = settings_with(scratch)
    cohort = fields("a", "b")
    assert run(cohort, tmp_path / "disk", LoadQuick(), settings=settings).exit_code == 0
    outcome = run(in_a_bucket(cohort, "a"), tmp_path / "out", LoadQuick(), settings=settings)
    assert outcome.exit_code == 0 and tables(tmp_path / "out") == tables(tmp_path / "disk")
    assert_nothing_secret_and_nothing_left(tmp_path / "out", scratch)
    slides = pd.read_csv(tmp_path / "out" / "slides.csv").set_index("slide_id")
    assert slides.path["a"] == "s3://slides/a.png" and (slides.status == "done").all()

    def no_work(executor: LocalExecutor, slide: object) -> None:
        raise AssertionError("the slide is done")

    monkeypatch.setattr(LocalExecutor, "_process", no_work)
    assert run(in_a_bucket(cohort, "b"), tmp_path / "disk", LoadQuick(), settings=settings).exit_code == 0


def test_new_tables_need_no_bucket(
    fields: Fields, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = runner("local", monkeypatch), settings_with(tmp_path / "scratch")
    run(in_a_bucket(fields("a"), "a"), tmp_path / "out", LoadQuick(), settings=settings)
    bucket.use(monkeypatch, "127.0.0.1:9")
    assert run(StoredRun.open(tmp_path / "out"), tmp_path / "new", LoadQuick(), settings=settings).exit_code == 0
    assert tables(tmp_path / "new") == tables(tmp_path / "out")


def test_a_slide_in_a_bucket_that_is_none_costs_itself_only(
    fields: Fields, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is no picture at all; of the other the pixel size is not known."""
    cohort = in_a_bucket(fields("a", "b", "c"), "b", "c")
    bucket.put("slides", {"b.png": b"no picture"})
    cohort.write_text(cohort.read_text().replace("c.png,0.25", "c.png,"))
    run, settings = runner("local", monkeypatch), settings_with(tmp_path / "scratch")
    outcome = run(cohort, tmp_path / "out", LoadQuick(), settings=settings)
    assert outcome.exit_code == 3 and set(tables(tmp_path / "out")) == {"a"}
    reasons = pd.read_csv(tmp_path / "out" / "failures.csv").set_index("slide_id").reason
    assert reasons["b"].startswith("s3://slides/b.png: cannot be read")
    assert reasons["c"].startswith("s3://slides/c.png: the file gives no pixel size")
    assert_nothing_secret_and_nothing_left(tmp_path / "out", tmp_path / "scratch")


def test_a_slide_that_is_not_in_the_bucket_is_a_fault(
    fields: Fields, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = in_a_bucket(fields("a"), "a")
    cohort.write_text(cohort.read_text() + "s3://slides/other.png,0.25\n")
    with pytest.raises(InputError, match="row 3 .*s3://slides/other.png: no such file"):
        runner("local", monkeypatch)(cohort, tmp_path / "out", LoadQuick())
    assert not (tmp_path / "out").exists()


def test_a_full_scratch_disk_is_waited_for(
    fields: Fields,
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(staging, "SPARED_BYTES", shutil.disk_usage(tmp_path).total - (1 << 20))
    monkeypatch.setattr(disk_space, "CHECK_EVERY_S", 0.2)
    report_full = disk_space.DiskSpace.report_full

    def clear(disk: disk_space.DiskSpace, slide_id: str, error: BaseException | None = None) -> None:
        report_full(disk, slide_id, error)
        monkeypatch.setattr(staging, "SPARED_BYTES", 0)

    monkeypatch.setattr(disk_space.DiskSpace, "report_full", clear)
    scratch = tmp_path / "scratch"
    run = runner("local", monkeypatch)
    outcome = run(in_a_bucket(fields("a"), "a"), tmp_path / "out", LoadQuick(), settings=settings_with(scratch))
    assert outcome.exit_code == 0
    assert f"no space left on disk at a: waiting for space in {scratch}" in capfd.readouterr().err


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from hover_batch.cli import app; app()", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_plan_tells_of_it_and_copies_nothing(fields: Fields, server: str, tmp_path: Path) -> None:
    cohort = in_a_bucket(fields("a", "b"), "a")
    ended = command("plan", str(cohort))
    assert ended.returncode == 0, ended.stderr
    assert "at s3://slides/a.png; its header is read when it is copied" in ended.stdout
    assert "  b: 700 × 600 px" in ended.stdout
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_slide_larger_than_the_scratch_disk_fails_alone(
    fields: Fields, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "SPARED_BYTES", 1 << 60)
    settings = settings_with(tmp_path / "scratch")
    outcome = runner("local", monkeypatch)(
        in_a_bucket(fields("a", "b"), "a"), tmp_path / "out", LoadQuick(), settings=settings
    )
    assert outcome.exit_code == 3
    assert [f.slide_id for f in outcome.failures] == ["a"] and "--scratch" in outcome.failures[0].reason


@pytest.mark.faults
def test_slides_take_turns_on_a_scratch_disk_that_holds_one(
    fields: Fields, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the end of the first, and nobody for room."""
    on_loopback()
    cohort, padded = fields("a", "b", "c"), 20 << 20
    for name in ("a", "b", "c"):  # what follows a PNG's end is not looked at
        path = cohort.parent / f"{name}.png"
        path.write_bytes(path.read_bytes().ljust(padded, b"\0"))
    out = tmp_path / "out"
    with file_system(tmp_path / "small", str(staging.SPARED_BYTES + 3 * padded // 2)) as scratch:
        settings = settings_with(scratch)
        assert runner("local", monkeypatch)(cohort, tmp_path / "disk", settings=settings).exit_code == 0
        flags = ["--unit", "256", "--batch", "2", "--precision", "fp32", "--threads", "1", "--tissue", "all"]
        ended = command(
            *("segment", str(in_a_bucket(cohort, "a", "b", "c")), "-o", str(out), "--backend", "ray", "--cpus", "2"),
            *("--device", "cpu", "--gpus", "0", "--scratch", str(scratch), *flags),
        )
    assert ended.returncode == 0, ended.stderr
    assert "no space left" not in ended.stderr
    assert tables(out) == tables(tmp_path / "disk")


@pytest.mark.slow
def test_ray_gives_the_same_tables(
    fields: Fields, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, with a cluster of its own."""
    on_loopback()
    scratch, cohort = tmp_path / "scratch", fields("a", "b")
    settings = settings_with(scratch)
    from hover_batch.model.predict import load_predictor

    assert runner("local", monkeypatch)(cohort, tmp_path / "disk", load_predictor, settings=settings).exit_code == 0
    flags = ["--unit", "256", "--batch", "2", "--precision", "fp32", "--threads", "1", "--tissue", "all"]
    ended = command(
        *("segment", str(in_a_bucket(cohort, "a")), "-o", str(tmp_path / "out"), "--backend", "ray", "--cpus", "2"),
        *("--device", "cpu", "--gpus", "0", "--scratch", str(scratch), *flags),
    )
    assert ended.returncode == 0, ended.stderr
    assert tables(tmp_path / "out") == tables(tmp_path / "disk")
    assert_nothing_secret_and_nothing_left(tmp_path / "out", scratch)
