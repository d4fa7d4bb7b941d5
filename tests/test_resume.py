"""A run that is interrupted by Ctrl-C or kill -9 gives the same nuclei.parquet as an undisturbed one, byte for byte."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.cohort.events import stream_events

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ["--unit", "256", "--batch", "1", "--tissue", "all", "--threads", "1"]
UNITS = 16


@pytest.fixture(scope="module")
def cohort(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real field of 1000² pixels."""
    folder = tmp_path_factory.mktemp("cohort")
    shutil.copy(data / "nuclei" / "images" / "consep_train_03.png", folder / "field.png")
    (folder / "cohort.csv").write_text("path,mpp\nfield.png,0.25\n")
    return folder / "cohort.csv"


@pytest.fixture(scope="module")
def whole(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert CliRunner().invoke(app, ["segment", str(cohort), "-o", str(out), *SETTINGS]).exit_code == 0
    return out


@pytest.fixture(scope="module")
def undisturbed(whole: Path) -> bytes:
    table = whole / "slides" / "field" / "nuclei.parquet"
    assert pq.read_metadata(table).num_rows > 50
    return table.read_bytes()


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A run of one's own that has ended."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def start(cohort: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from hover_batch.cli import app; app()", "segment", str(cohort), "-o", str(out)]
        + SETTINGS,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def strike(process: subprocess.Popen[str], when: Callable[[], bool], how: signal.Signals) -> tuple[int, str]:
    """Send the signal as soon as `when` holds; returns the exit code and what was printed."""
    deadline = time.monotonic() + 180
    while not when():
        assert process.poll() is None, f"ended before it could be struck: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(how)
    printed, _ = process.communicate(timeout=120)
    return process.returncode, printed


def count(folder: Path) -> int:
    return sum(1 for p in folder.glob("*") if not p.name.startswith(".")) if folder.is_dir() else 0


@pytest.mark.parametrize(
    ("stage", "how", "code"),
    [
        ("markers", signal.SIGKILL, -signal.SIGKILL),
        # Quick: SIGTERM in post-processing, and kill -9 in inference.
        pytest.param("parts", signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.faults),
        ("markers", signal.SIGINT, 130),
        ("parts", signal.SIGTERM, 130),
    ],
    ids=["kill -9 in inference", "kill -9 in post-processing", "Ctrl-C in inference", "SIGTERM in post-processing"],
)
def test_an_interrupted_run_ends_like_an_undisturbed_one(
    cohort: Path, undisturbed: bytes, tmp_path: Path, stage: str, how: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    slide = out / "slides" / "field"
    ended, printed = strike(start(cohort, out), lambda: count(slide / stage) >= 3, how)
    assert ended == code, printed
    reached = count(slide / stage)
    assert 3 <= reached < UNITS, "it was not struck in the middle of its work"
    assert not (slide / "slide.json").exists()

    result = CliRunner().invoke(app, ["segment", str(cohort), "-o", str(out), *SETTINGS])
    assert result.exit_code == 0, result.output
    assert (slide / "nuclei.parquet").read_bytes() == undisturbed
    # What was done before was not done again.
    predicted = [e for e in stream_events(out / "logs" / "events.jsonl") if e["event"] == "unit_done"]
    assert len(predicted) <= UNITS + 1
    assert len({(e["column"], e["row"]) for e in predicted}) >= UNITS - 1


def test_a_finished_run_is_not_run_again(cohort: Path, undisturbed: bytes, finished: Path) -> None:
    arguments = ["segment", str(cohort), "-o", str(finished), *SETTINGS]
    table = finished / "slides" / "field" / "nuclei.parquet"
    before = table.stat().st_mtime_ns
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "done before" in result.stderr
    assert table.stat().st_mtime_ns == before and table.read_bytes() == undisturbed


def test_a_table_that_was_changed_is_kept_beside_the_new_one(cohort: Path, undisturbed: bytes, finished: Path) -> None:
    table = finished / "slides" / "field" / "nuclei.parquet"
    pq.write_table(pq.read_table(table).slice(0, 5), table)
    changed = table.read_bytes()
    result = CliRunner().invoke(app, ["segment", str(cohort), "-o", str(finished), *SETTINGS])
    kept = table.with_name("nuclei.changed.parquet")
    assert result.exit_code == 0 and f"field: its nuclei.parquet was changed after the run; it is kept as {kept}" in (
        " ".join(result.stderr.split())
    )
    assert table.read_bytes() == undisturbed and kept.read_bytes() == changed


def test_a_shard_without_its_marker_is_adopted(cohort: Path, undisturbed: bytes, finished: Path) -> None:
    arguments = ["segment", str(cohort), "-o", str(finished), *SETTINGS]
    slide = finished / "slides" / "field"
    for path in (slide / "slide.json", slide / "markers" / "1_1.json", slide / "parts" / "1_1.parquet"):
        path.unlink()
    (slide / "nuclei.parquet").unlink()
    shard = slide / "predictions.zarr" / "c" / "0" / "1" / "1"
    before = shard.stat().st_mtime_ns
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert shard.stat().st_mtime_ns == before
    assert (slide / "nuclei.parquet").read_bytes() == undisturbed


@pytest.mark.parametrize("harm", ["shard gone", "shard damaged", "marker damaged"])
def test_a_harmed_unit_is_predicted_again(cohort: Path, undisturbed: bytes, finished: Path, harm: str) -> None:
    arguments = ["segment", str(cohort), "-o", str(finished), *SETTINGS]
    slide = finished / "slides" / "field"
    shard, marker = slide / "predictions.zarr" / "c" / "0" / "1" / "1", slide / "markers" / "1_1.json"
    if harm == "shard gone":
        shard.unlink()
    elif harm == "shard damaged":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        marker.write_text("{")
    for path in (slide / "slide.json", slide / "nuclei.parquet"):
        path.unlink()
    shutil.rmtree(slide / "parts")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (slide / "nuclei.parquet").read_bytes() == undisturbed


@pytest.mark.parametrize("unit", ["512", "1024"])
def test_the_side_of_the_units_changes_nothing(cohort: Path, undisturbed: bytes, tmp_path: Path, unit: str) -> None:
    out = tmp_path / "out"
    settings = ["--unit", unit, "--batch", "1", "--tissue", "all", "--threads", "1"]
    assert CliRunner().invoke(app, ["segment", str(cohort), "-o", str(out), *settings]).exit_code == 0
    assert (out / "slides" / "field" / "nuclei.parquet").read_bytes() == undisturbed


def test_rows_added_to_the_cohort_are_no_change(cohort: Path, finished: Path) -> None:
    out = finished
    longer = cohort.parent / "longer.csv"
    longer.write_text("path,slide_id,mpp\nfield.png,field,0.25\nfield.png,again,0.25\n")
    result = CliRunner().invoke(app, ["segment", str(longer), "-o", str(out), *SETTINGS])
    assert result.exit_code == 0 and "field: done before" in result.stderr
    again = pq.read_table(out / "slides" / "again" / "nuclei.parquet").drop_columns("slide_id")
    first = pq.read_table(out / "slides" / "field" / "nuclei.parquet").drop_columns("slide_id")
    assert again.equals(first)
