"""A run whose results go to a bucket: the same bytes, each slide as soon as it is done, whatever fails on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import bucket
import pytest
from accelerators import LoadQuick
from bucket import Unreliable
from cohort_runs import SETTINGS, Run, runner
from command import ROOT
from typer.testing import CliRunner

from hover_batch import load_nuclei, segment_slide
from hover_batch.bucket import BucketFolder
from hover_batch.cli import app
from hover_batch.cohort.layout import RunLayout
from hover_batch.errors import InputError, SettingsChanged, TooManyFailures
from hover_batch.executor.upload import RunUpload

Fields = Callable[..., Path]
RESULTS = {"nuclei.parquet", "slide.json", "thumbnail.jpg", "overlay.jpg", "tissue.geojson", "survey.json"}
RUN = {"run.json", "settings.toml", "versions.json", "slides.csv", "failures.csv", "summary.csv", "summary.parquet"}
URL = "s3://bucket/run"

pytestmark = pytest.mark.usefixtures("server")


@pytest.fixture
def fields(fields: Fields) -> Fields:
    """Cohorts of pictures of one unit each: uploads know slides, and not what they are made of."""
    return partial(fields, width=256, height=256)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Nothing is synced to the disk, from which the uploads are read at once."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return runner("local", monkeypatch)


def assert_bucket_holds(work: Path, *slides: str) -> None:
    """What a user keeps of the run and these slides, with the bytes on disk, and nothing else; no secret anywhere."""
    there = {name.removeprefix("run/"): content for name, content in bucket.contents("bucket").items()}
    of_slides = {f"slides/{slide}/{name}" for slide in slides for name in (*RESULTS, "timings.json")}
    assert set(there) == RUN | of_slides
    for name, content in there.items():
        assert content == (work / name).read_bytes(), name
    for content in [*there.values(), *(path.read_bytes() for path in work.rglob("*") if path.is_file())]:
        assert bucket.SECRET.encode() not in content and bucket.KEY_ID.encode() not in content


def test_the_bucket_holds_what_the_folder_does(
    fields: Fields,
    run: Run,
    unreliable: Unreliable,
    tmp_path: Path,
) -> None:
    """A second start sends nothing but the summary, which has another time in it; and what `export` has made since."""
    work, cohort = tmp_path / "work", fields("a", "b")
    outcome = run(cohort, work, LoadQuick(), bucket=URL)
    assert outcome.exit_code == 0 and outcome.closing_lines()[-1] == f"uploaded: 2 slides to {URL}"
    assert_bucket_holds(work, "a", "b")
    for slide in "ab":
        sent = [Path(key).name for key in unreliable.sent if f"/{slide}/" in key]
        assert sent[-1] == "slide.json" and len(sent) == 7
    status = CliRunner().invoke(app, ["status", str(work)])
    assert f"uploaded: 2 slides to {URL}" in status.output

    first = len(unreliable.sent)
    exported = CliRunner().invoke(app, ["export", str(work), "--to", "csv", "--slide", "a"])
    assert exported.exit_code == 0, exported.output
    assert run(cohort, work, LoadQuick(), bucket=URL).exit_code == 0
    assert {key.removeprefix("bucket/run/") for key in unreliable.sent[first:]} == {
        *("slides/a/nuclei.csv", "summary.csv", "summary.parquet"),
    }


def test_uploads_do_not_hold_up_the_work(
    fields: Fields, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload of the first slide waits here until the second is done."""
    second, put = RunLayout(tmp_path / "work").slide("b").slide_json, BucketFolder.put

    def late(folder: BucketFolder, files: dict[str, Path]) -> None:
        deadline = time.monotonic() + 300
        while any("/a/" in name for name in files) and not second.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        put(folder, files)

    monkeypatch.setattr(BucketFolder, "put", late)
    assert run(fields("a", "b"), tmp_path / "work", LoadQuick(), bucket=URL).exit_code == 0
    assert_bucket_holds(tmp_path / "work", "a", "b")


@pytest.mark.faults  # quick: tests/test_bucket_folder.py, where each call fails
def test_a_lost_bucket_fails_no_slide_and_the_same_command_completes_the_uploads(
    fields: Fields,
    run: Run,
    unreliable: Unreliable,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """From the first slide's third file on; the disk already holds a whole run, whose start is quick."""
    work, cohort = tmp_path / "work", fields("a", "b", "c")
    assert run(cohort, work, LoadQuick()).exit_code == 0
    put_calls: list[int] = []

    class FromThirdFile:
        def __contains__(self, call: int) -> bool:
            if not put_calls and len(unreliable.sent) >= 4:  # run.json and three files
                put_calls.append(call)
            return bool(put_calls)

    unreliable.failing = FromThirdFile()
    outcome = run(cohort, work, LoadQuick(), bucket=URL)
    assert outcome.exit_code == 3 and not outcome.failures and len(outcome.slides) == 3
    lines = "\n".join(outcome.closing_lines())
    assert "uploaded: only 0 slides" in lines and "missing: a, b, c, the files of the run" in lines
    assert "connection to" in lines and f"all results are in {work}" in lines
    assert "repeat: hover-batch segment cohort.csv" in lines
    shown = capfd.readouterr().err
    assert "a: not uploaded yet: s3://bucket/run: cannot be written" in shown
    assert bucket.SECRET not in lines + shown
    assert not [name for name in bucket.contents("bucket") if name.endswith("slide.json")]

    unreliable.failing = ()
    before = len(unreliable.sent)
    assert run(cohort, work, LoadQuick(), bucket=URL).exit_code == 0
    assert_bucket_holds(work, "a", "b", "c")
    again = set(unreliable.sent[:before]) & set(unreliable.sent[before:])
    assert not again, "sent twice"


@pytest.mark.faults  # quick: tests/test_bucket_folder.py, where each call fails
def test_a_short_loss_is_not_noticed(
    fields: Fields,
    run: Run,
    unreliable: Unreliable,
    tmp_path: Path,
) -> None:
    unreliable.failing = range(8, 1000, 7)
    assert run(fields("a"), tmp_path / "work", LoadQuick(), bucket=URL).exit_code == 0
    assert_bucket_holds(tmp_path / "work", "a")


def test_an_interrupted_wait_is_resumed(
    fields: Fields, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(upload: RunUpload) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(RunUpload, "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(fields("a"), tmp_path / "work", LoadQuick(), bucket=URL)
    assert not [thread for thread in threading.enumerate() if thread.name == "upload"]
    assert run(tmp_path / "cohort" / "cohort.csv", tmp_path / "work", LoadQuick(), bucket=URL).exit_code == 0
    assert_bucket_holds(tmp_path / "work", "a")


def test_a_corrupted_table_is_not_uploaded(fields: Fields, run: Run, tmp_path: Path) -> None:
    work, cohort = tmp_path / "work", fields("a", "b")
    run(cohort, work, LoadQuick())
    table = RunLayout(work).slide("a").nuclei_parquet
    content = bytearray(table.read_bytes())
    content[100] ^= 1
    table.write_bytes(content)
    outcome = run(cohort, work, LoadQuick(), bucket=URL)
    assert outcome.exit_code == 3 and "checksum mismatch" in "\n".join(outcome.closing_lines())
    there = bucket.contents("bucket")
    assert "run/slides/b/slide.json" in there and "run/slides/a/slide.json" not in there


def test_uploads_are_completed_when_too_many_slides_fail(fields: Fields, run: Run, tmp_path: Path) -> None:
    cohort = fields("a", "b")
    bucket.put("slides", {"b.png": b"no picture"})
    cohort.write_text(cohort.read_text().replace("\nb.png", "\ns3://slides/b.png"))
    settings = replace(SETTINGS, engine=replace(SETTINGS.engine, max_failures=0, scratch=str(tmp_path / "scratch")))
    with pytest.raises(TooManyFailures):
        run(cohort, tmp_path / "work", LoadQuick(), settings=settings, bucket=URL)
    there = bucket.contents("bucket")
    assert "run/slides/a/slide.json" in there and b"no picture" not in there["run/failures.csv"]
    assert "b," in there["run/failures.csv"].decode()


def test_a_folder_in_the_bucket_that_holds_something_else_is_refused(fields: Fields, run: Run, tmp_path: Path) -> None:
    cohort = fields("a")
    bucket.put("bucket", {"run/notes.txt": b"mine"})
    with pytest.raises(InputError, match=f"--output {URL}: holds notes.txt but no run.json"):
        run(cohort, tmp_path / "work", LoadQuick(), bucket=URL)
    bucket.put("bucket", {"run/run.json": b'{"format": "mine"}'})
    with pytest.raises(InputError, match=f"--output {URL}: its run.json was written by another program"):
        run(cohort, tmp_path / "work", LoadQuick(), bucket=URL)
    assert set(bucket.contents("bucket")) == {"run/notes.txt", "run/run.json"}


def test_another_run_in_the_bucket_is_refused_unless_forced(fields: Fields, run: Run, tmp_path: Path) -> None:
    """With other settings, or a slide_id with another picture. What is not of the run stays."""
    assert run(fields("a", "b"), tmp_path / "first", LoadQuick(), bucket=URL).exit_code == 0
    bucket.put("bucket", {"run/notes.txt": b"mine", "run/slides/b/notes.txt": b"mine"})
    before = bucket.contents("bucket")
    other = replace(SETTINGS, post=replace(SETTINGS.post, min_area_px=99))
    cohort = tmp_path / "cohort" / "cohort.csv"
    with pytest.raises(SettingsChanged, match=f"--output {URL}: holds results.*\n.*min_area_px: 64 → 99"):
        run(cohort, tmp_path / "second", LoadQuick(), settings=other, bucket=URL)
    (cohort.parent / "a.png").write_bytes((cohort.parent / "b.png").read_bytes())
    with pytest.raises(SettingsChanged, match=f"--output {URL}: a: finished with another file"):
        run(cohort, tmp_path / "third", LoadQuick(), bucket=URL)
    assert bucket.contents("bucket") == before
    cohort.write_text("".join(cohort.read_text().splitlines(keepends=True)[:2]))
    assert run(cohort, tmp_path / "second", LoadQuick(), settings=other, bucket=URL, force=True).exit_code == 0
    there = bucket.contents("bucket")
    assert there.pop("run/notes.txt") == there.pop("run/slides/b/notes.txt") == b"mine"
    assert {name for name in there if "slides/" in name} == {
        f"run/slides/a/{name}" for name in (*RESULTS, "timings.json")
    }
    assert json.loads(there["run/run.json"])["results_key"]["post"]["min_area_px"] == 99


def test_results_in_a_bucket_are_read_or_the_remedy_is_named(fields: Fields, run: Run, tmp_path: Path) -> None:
    """Python loads a table from there; the commands say what to do, and that works."""
    work, fetched = tmp_path / "work", tmp_path / "fetched"
    run(fields("a", "b"), work, LoadQuick(), bucket=URL)
    local = load_nuclei(work / "slides" / "a")
    for url in (f"{URL}/slides/a", f"{URL}/slides/a/", f"{URL}/slides/a/nuclei.parquet"):
        assert load_nuclei(url).drop(columns="geometry").equals(local.drop(columns="geometry"))
    with pytest.raises(InputError, match=f"{URL}/slides/c/nuclei.parquet: no such file"):
        load_nuclei(f"{URL}/slides/c")
    for words in (["status"], ["export", "--to", "csv"], ["report"], ["view"], ["segment", "-o", "new", "--from"]):
        refused = CliRunner().invoke(app, [*words, URL])
        assert refused.exit_code == 2, words
        assert "--work" in refused.output and f"aws s3 cp --recursive {URL}" in refused.output
    for name, content in bucket.contents("bucket").items():
        path = fetched / Path(name).relative_to("run")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for words in (["status"], ["export", "--to", "csv"], ["report"]):
        done = CliRunner().invoke(app, [*words, str(fetched)])
        assert done.exit_code == 0, done.output
    assert "slides: 2 done" in CliRunner().invoke(app, ["status", str(fetched)]).output


def test_the_command_line(fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cohort = str(fields("a"))

    def said(*words: str) -> str:
        ended = CliRunner().invoke(app, list(words))
        assert ended.exit_code == 2, ended.output
        assert bucket.SECRET not in ended.output
        return ended.output

    assert "add for example --work run-work" in said("segment", cohort, "-o", URL)
    assert "--work w: is only for a URL" in said("segment", cohort, "-o", "out", "--work", "w")
    assert "no such bucket" in said("segment", cohort, "-o", "s3://none/run", "--work", "w")
    secret = f"s3://me:{bucket.SECRET}@bucket/run?token={bucket.SECRET}"
    assert "give credentials in the environment" in said("segment", cohort, "-o", secret, "--work", "w")
    assert "give credentials in the environment" in said("plan", cohort, "-o", secret)
    assert "is a URL" in said("segment", cohort, "-o", URL, "--work", URL)
    assert "is a URL" in said("report", "out", "-o", URL)
    assert "only URLs are checked" in said("plan", cohort, "-o", "out")
    assert "no such bucket" in said("plan", cohort, "-o", "s3://none/run")
    planned = CliRunner().invoke(app, ["plan", cohort, "-o", URL])
    assert planned.exit_code == 0 and f"output: {URL} can be written" in planned.output
    assert bucket.contents("bucket") == {}
    assert not (tmp_path / "s3:").exists() and not (tmp_path / "w").exists() and not (tmp_path / "out").exists()


def test_no_secret_of_a_slide_s_url_is_recorded(
    fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=f"output {URL}: is a URL"):
        segment_slide("a.png", URL)
    recorded: list[list[str]] = []

    def record(*_: object, command: list[str], **__: object) -> None:
        recorded.append(command)
        raise InputError("enough")

    monkeypatch.setattr("hover_batch.segment.run_segment", record)
    with pytest.raises(InputError, match="enough"):
        segment_slide(f"https://me:{bucket.SECRET}@host/a.svs?token={bucket.SECRET}", tmp_path)
    assert recorded == [["hover_batch.segment_slide", "https://host/a.svs"]]


@pytest.mark.slow  # for its run on Ray; the driver uploads with either executor, and the other tests run the local one
def test_the_driver_uploads_what_ray_has_made(fields: Fields, run_on_ray: Run, tmp_path: Path) -> None:
    assert run_on_ray(fields("a", "b"), tmp_path / "work", LoadQuick(), bucket=URL).exit_code == 0
    assert_bucket_holds(tmp_path / "work", "a", "b")


@pytest.mark.faults
def test_kill_9_between_uploads(server: str, fields: Fields, run: Run, tmp_path: Path) -> None:
    """After some numbers of objects: each slide.json there has its table, and the next start adds the rest."""
    work, cohort = tmp_path / "work", fields("a", "b", "c")
    assert run(cohort, work, LoadQuick()).exit_code == 0
    flags = ["--unit", "256", "--batch", "2", "--precision", "fp32", "--threads", "1", "--tissue", "all"]
    words = ["segment", str(cohort), "-o", URL, "--work", str(work), "--backend", "local", "--device", "cpu", *flags]
    for number in (1, 8, 9, 16):
        bucket.reset(server)
        bucket.put("bucket", {})
        process = subprocess.Popen(
            [sys.executable, "-c", "from hover_batch.cli import app; app()", *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and len(bucket.names("bucket")) < number:
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        there = bucket.contents("bucket")
        for slide in "abc":
            if f"run/slides/{slide}/slide.json" in there:
                assert {f"run/slides/{slide}/{name}" for name in RESULTS} <= set(there)
        assert run(cohort, work, LoadQuick(), bucket=URL).exit_code == 0
        assert_bucket_holds(work, "a", "b", "c")
