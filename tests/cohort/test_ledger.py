"""Ledger of a run: what it writes, and how it resumes, refuses or removes earlier results."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hover_batch.cohort.events import stream_events
from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.ledger import Ledger, SlideFailure
from hover_batch.cohort.manifest import Cohort, read_cohort
from hover_batch.cohort.run_folder import read_slides
from hover_batch.cohort.run_key import ModelId, run_key
from hover_batch.config import InferSettings, OutputSettings, PostSettings, Settings, TissueSettings
from hover_batch.errors import InputError, SettingsChanged
from hover_batch.geometry import Mpp

MODEL = ModelId("starter", "a" * 64)


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    for name in "abc":
        (tmp_path / f"{name}.svs").write_bytes(b"")
    (tmp_path / "cohort.csv").write_text('path,mpp,Age,note\na.svs,0.25,61,"x, ""y"""\nb.svs,,,\nc.svs,,7,\n')
    return read_cohort(tmp_path / "cohort.csv")


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    return RunLayout(tmp_path / "deep" / "out")


def start(ledger: Ledger, cohort: Cohort, **changes: Any) -> None:
    values: dict[str, Any] = {
        "settings": Settings(),
        "model": MODEL,
        "schema_version": 1,
        "cohort": cohort,
        "versions": {"hover_batch": "0.1.0"},
        "command": ["segment", "cohort.csv"],
    }
    ledger.start(**values | changes)


def run_once(layout: RunLayout, cohort: Cohort, **changes: Any) -> None:
    with Ledger(layout) as ledger:
        start(ledger, cohort, **changes)


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What a run leaves


def test_a_run_says_what_it_is(layout: RunLayout, cohort: Cohort) -> None:
    settings = Settings(infer=InferSettings(unit=1024))
    run_once(layout, cohort, settings=settings)
    run = json.loads(layout.run_json.read_bytes())
    assert (run["model_id"], run["model_sha256"], run["schema_version"]) == ("starter", "a" * 64, 1)
    assert run["results_key"]["infer"]["unit"] == 1024 and len(run["results_key_sha256"]) == 64
    assert run["cohort"] == cohort.source and run["command"] == ["segment", "cohort.csv"]
    assert Settings.from_dict(tomllib.loads(layout.settings_toml.read_text())) == settings
    assert json.loads(layout.versions_json.read_bytes()) == {"hover_batch": "0.1.0"}
    (event,) = stream_events(layout.events_jsonl)
    assert event["event"] == "run_started" and event["slides"] == 3


def test_slides_and_failures_at_the_end(layout: RunLayout, cohort: Cohort) -> None:
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        assert [row["status"] for row in table(layout.slides_csv)] == ["pending"] * 3
        ledger.open_slide("a", "k")
        assert ledger.write_slide_json("a", "k", {"nuclei": 3})
        record = cohort.records[2]
        ledger.record_failure("c", record.row, record.path, "open", 'not a slide, "no"\nheader')
        ledger.record_failure("", 1, "", "cohort", "path is empty")
        ledger.finish(cohort)
    rows = table(layout.slides_csv)
    assert list(rows[0]) == [
        *("path", "slide_id", "mpp", "magnification", "mask_path", "patient_id", "group"),
        *("Age", "note", "row", "status"),
    ]
    assert [(r["slide_id"], r["mpp"], r["Age"], r["row"], r["status"]) for r in rows] == [
        ("a", "0.25", "61", "2", "done"),
        ("b", "", "", "3", "pending"),
        ("c", "", "7", "4", "failed"),
    ]
    assert rows[0]["note"] == 'x, "y"'
    assert table(layout.failures_csv) == [
        {"slide_id": "", "row": "1", "path": "", "stage": "cohort", "reason": "path is empty"},
        {
            "slide_id": "c",
            "row": "4",
            "path": str(cohort.records[2].path),
            "stage": "open",
            "reason": 'not a slide, "no"\nheader',
        },
    ]
    assert ledger.failures()[0] == SlideFailure("", 1, "", "cohort", "path is empty")
    assert [event["event"] for event in stream_events(layout.events_jsonl)] == [
        *("run_started", "slide_done", "slide_failed", "slide_failed", "run_finished")
    ]


def test_slides_csv_is_a_cohort_again(layout: RunLayout, cohort: Cohort) -> None:
    run_once(layout, cohort)
    again = read_cohort(layout.slides_csv)
    assert again.faults == ()
    assert [(r.slide_id, r.path, r.mpp) for r in again.records] == [(r.slide_id, r.path, r.mpp) for r in cohort.records]


def test_sizes_along_x_and_y_stay_in_slides_csv(layout: RunLayout, cohort: Cohort, tmp_path: Path) -> None:
    (tmp_path / "xy.csv").write_text("path,mpp_x,mpp_y\na.svs,0.25,0.5\nb.svs,0.5,0.5\nc.svs,,\n")
    asked = read_cohort(tmp_path / "xy.csv")
    run_once(layout, asked)
    expected = [Mpp(0.25, 0.5), Mpp(0.5, 0.5), None]
    assert [record.mpp for record in read_slides(layout) or ()] == expected
    assert [record.mpp for record in read_cohort(layout.slides_csv).records] == expected


def test_decimal_commas_of_sizes_along_x_and_y_can_be_read_again(layout: RunLayout, tmp_path: Path) -> None:
    for name in ("a.svs", "b.svs"):
        (tmp_path / name).touch()
    (tmp_path / "xy.csv").write_text("path;mpp_x;mpp_y\na.svs;0,25;0,5\nb.svs;;\n")
    run_once(layout, read_cohort(tmp_path / "xy.csv"))
    assert [record.mpp for record in read_slides(layout) or ()] == [Mpp(0.25, 0.5), None]


def test_without_failures_the_table_of_the_last_time_is_emptied(layout: RunLayout, cohort: Cohort) -> None:
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        ledger.record_failure("a", 2, "a.svs", "infer", "why")
        ledger.finish(cohort)
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        ledger.finish(cohort)
    assert layout.failures_csv.read_text() == "slide_id,row,path,stage,reason\n"


# Going on with a run


def test_a_slide_whose_table_was_replaced_is_not_done(layout: RunLayout, cohort: Cohort) -> None:
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        table = ledger.open_slide("a", "k").nuclei_parquet
        table.write_bytes(b"a table")
        ledger.write_slide_json("a", "k", {"nuclei": 3, "nuclei_bytes": 7})
        assert ledger.is_done("a", "k")
        table.write_bytes(b"another table")
        assert not ledger.is_done("a", "k")


def test_events_outside_of_the_block(layout: RunLayout, cohort: Cohort) -> None:
    ledger = Ledger(layout)
    with ledger:
        start(ledger, cohort)
    with pytest.raises(RuntimeError, match="open only after `start`, in the ledger's `with` block"):
        ledger.events.append("late")


def test_the_same_command_goes_on(layout: RunLayout, cohort: Cohort) -> None:
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        assert not ledger.is_done("a", "k")
        ledger.open_slide("a", "k").nuclei_parquet.write_bytes(b"a table")
        ledger.write_slide_json("a", "k", {"nuclei": 3})
    created = layout.run_json.read_bytes()
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        assert ledger.is_done("a", "k")
        assert not ledger.is_done("a", "other")
        assert not ledger.is_done("b", "k")
        # A late writer changes nothing.
        assert not ledger.write_slide_json("a", "k", {"nuclei": 4})
        ledger.finish(cohort)
    assert layout.run_json.read_bytes() == created
    assert json.loads(layout.slide("a").slide_json.read_bytes()) == {"nuclei": 3, "run_key": "k", "slide_id": "a"}
    assert [row["status"] for row in table(layout.slides_csv)] == ["done", "pending", "pending"]
    assert [e["event"] for e in stream_events(layout.events_jsonl)].count("run_resumed") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"k"', b'{"run_key": null}'])
def test_a_slide_json_that_says_something_else_is_not_done(layout: RunLayout, cohort: Cohort, content: bytes) -> None:
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        ledger.open_slide("a", "k").slide_json.write_bytes(content)
        assert not ledger.is_done("a", "k")


def test_what_does_not_change_results_may_change(layout: RunLayout, cohort: Cohort, tmp_path: Path) -> None:
    run_once(layout, cohort)
    run_once(layout, cohort, settings=Settings(output=OutputSettings(discard_predictions=True)))
    assert tomllib.loads(layout.settings_toml.read_text())["output"]["discard_predictions"] is True
    run_once(layout, cohort, model=ModelId("starter.safetensors", MODEL.sha256))
    # A settings file says 8 where the default is 8.0.
    run_once(layout, cohort, settings=Settings.from_dict({"tissue": {"mask_mpp": 8}}))
    (tmp_path / "d.svs").write_bytes(b"")
    with open(tmp_path / "cohort.csv", "a") as file:
        file.write("d.svs,,,\n")
    run_once(layout, read_cohort(tmp_path / "cohort.csv"))
    assert len(table(layout.slides_csv)) == 4


def test_changed_settings_are_refused_and_named(layout: RunLayout, cohort: Cohort) -> None:
    run_once(layout, cohort)
    before = tree(layout.root)
    changed = Settings(infer=InferSettings(unit=1024), post=PostSettings(sobel_norm="window"))
    with Ledger(layout) as ledger, pytest.raises(SettingsChanged) as caught:
        start(ledger, cohort, settings=changed, model=ModelId("other", "b" * 64), schema_version=2)
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert lines[1:5] == [
        "  model: starter (sha256 aaaaaaaaaaaa…) → other (sha256 bbbbbbbbbbbb…)",
        "  infer.unit: 4096 → 1024",
        "  post.sobel_norm: fixed → window",
        "  schema_version: 1 → 2",
    ]
    assert "--output" in lines[-1] and "same settings" in lines[-1] and "--force" in lines[-1] and len(lines) == 6
    assert tree(layout.root) == before


def test_force_starts_anew_and_leaves_what_is_not_ours(layout: RunLayout, cohort: Cohort, tmp_path: Path) -> None:
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        slide = ledger.open_slide("a", "k")
        (slide.predictions_zarr / "c").mkdir(parents=True)
        for path in slide.removal_order:
            if path.suffix not in ("", ".zarr"):
                path.write_bytes(b"old")
        (slide.predictions_zarr / "c" / "0").write_bytes(b"old")
        slide.marker(0, 0).write_bytes(b"old")
        (slide.folder / ".slide.json.0123.partial").write_bytes(b"killed")
        (slide.folder / ".nuclei.spatialdata.zarr.0123.partial" / "c").mkdir(parents=True)
        for path in (layout.summary_csv, layout.summary_parquet):
            path.write_bytes(b"old")
        ledger.finish(cohort)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "shard").write_bytes(b"kept")
    layout.slide("b").folder.mkdir()
    layout.slide("b").predictions_zarr.symlink_to(outside)
    mine = [layout.root / "notes.txt", layout.slides / "my folder" / "x", layout.slide("c").folder / "mine.geojson"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"kept")

    changed = Settings(infer=InferSettings(unit=1024))
    run_once(layout, cohort, settings=changed, force=True)
    new = {layout.lock, layout.run_json, layout.settings_toml, layout.versions_json, layout.slides_csv}
    assert set(tree(layout.root)) == {*new, layout.events_jsonl, *mine}
    assert (outside / "shard").read_bytes() == b"kept"
    assert sorted(path.name for path in layout.slides.iterdir()) == ["c", "my folder"]
    run_once(layout, cohort, settings=changed)


def test_a_removal_cut_short_never_leaves_a_promise_without_its_work(
    layout: RunLayout, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        slide = ledger.open_slide("a", "k")
        slide.nuclei_parquet.write_bytes(b"old")
        slide.marker(0, 0).write_bytes(b"old")
        slide.predictions_zarr.mkdir()
        ledger.write_slide_json("a", "k", {})

        def fail(path: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", fail)
            with pytest.raises(OSError, match="Input/output"):
                ledger.clear()
        assert not ledger.is_done("a", "k")
    # Still known as a run, so that --force can be given again.
    run_once(layout, cohort, settings=Settings(infer=InferSettings(unit=1024)), force=True)


# The work of one slide


def test_work_of_the_same_key_stays_and_of_another_goes(layout: RunLayout, cohort: Cohort) -> None:
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        slide = ledger.open_slide("a", "k1")
        slide.marker(0, 1).write_bytes(b"done")
        slide.part(0, 1).write_bytes(b"done")
        ledger.write_slide_json("a", "k1", {})
        assert ledger.open_slide("a", "k1").marker(0, 1).exists()
        assert ledger.open_slide("a", "k2") == slide
        assert list(slide.markers.iterdir()) == list(slide.parts.iterdir()) == []
        assert not slide.slide_json.exists()
        slide.marker(0, 1).write_bytes(b"done")
        slide.key_json.unlink()
        assert not ledger.open_slide("a", "k2").marker(0, 1).exists()


def test_a_slide_id_cannot_leave_the_folder(layout: RunLayout, cohort: Cohort) -> None:
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        with pytest.raises(InputError, match="may contain only"):
            ledger.open_slide("../x", "k")


def test_the_run_key_depends_on_each_part_and_on_no_order() -> None:
    results = Settings().results_key()
    key = run_key("m", results, "s", 1)
    assert len(key) == 64 and key == run_key("m", dict(reversed(results.items())), "s", 1)
    other = Settings(tissue=TissueSettings(mask_mpp=4)).results_key()
    assert len({key, run_key("n", results, "s", 1), run_key("m", other, "s", 1), run_key("m", results, "t", 1)}) == 4
    assert key != run_key("m", results, "s", 2)
    assert key == run_key("m", Settings(tissue=TissueSettings(mask_mpp=8)).results_key(), "s", 1)


# Folders that cannot be used


def entering(folder: Path) -> str:
    with pytest.raises(InputError) as caught, Ledger(RunLayout(folder)):
        pass
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message.startswith(f"--output {folder}: ") and "\n" not in message
    return message


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    assert "cannot be written" in entering(tmp_path / "file")
    assert "Not a directory" in entering(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_file_system_that_takes_no_folders() -> None:
    assert "cannot be written" in entering(Path("/proc/out"))


def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    before = os.geteuid()
    if before == 0:  # the superuser may write everywhere
        os.seteuid(65534)
    try:
        assert "Permission denied" in entering(tmp_path / "closed" / "out")
        assert "Permission denied" in entering(tmp_path / "closed")
    finally:
        os.seteuid(before)


@pytest.mark.parametrize(
    ("step", "code", "reason"),
    [
        ("fsync", errno.ENOSPC, "No space left on device"),
        ("fsync", errno.EROFS, "Read-only file system"),
        ("link", errno.EPERM, "no hard links"),
    ],
)
def test_the_probe_writes_really(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int, reason: str
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code), *(["a", None, "b"] if step == "link" else []))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        assert reason in entering(tmp_path / "out")
    # The lock was let go, and what the attempt left is no obstacle.
    with Ledger(RunLayout(tmp_path / "out")):
        pass


def test_a_folder_that_is_no_run(tmp_path: Path, cohort: Cohort) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_bytes(b"mine")
    before = tree(folder)
    assert "holds chapter.tex but no run.json" in entering(folder)
    (folder / "chapter.tex").rename(folder / "logs")
    assert "holds logs but no run.json" in entering(folder)
    (folder / "logs").rename(folder / "chapter.tex")
    (folder / "run.json").write_text('{"name": "of another program"}')
    assert "was written by another program" in entering(folder)
    (folder / "run.json").write_text("{")
    assert "its run.json is corrupted; restore it" in entering(folder)
    (folder / "run.json").unlink()
    assert tree(folder) == before


def test_a_folder_of_hidden_files_and_of_what_comes_before_a_run_will_do(tmp_path: Path, cohort: Cohort) -> None:
    layout = RunLayout(tmp_path / "out")
    layout.example.mkdir(parents=True)
    layout.logs.mkdir()
    layout.ray_log.write_bytes(b"said while its cluster was joined")
    (tmp_path / "out" / ".DS_Store").write_bytes(b"")
    (tmp_path / "out" / ".run.json.0123.partial").write_bytes(b"killed while it started")
    run_once(layout, cohort)


# One process at a time

HOLDER = """
import sys, time
from pathlib import Path
from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.ledger import Ledger
with Ledger(RunLayout(Path(sys.argv[1]))):
    print("locked", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(layout: RunLayout) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(layout.root)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_until_the_first_is_gone_even_killed(
    layout: RunLayout, cohort: Cohort, holder: subprocess.Popen[str]
) -> None:
    message = entering(layout.root)
    assert f"another run (process {holder.pid} on " in message
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    run_once(layout, cohort)


def test_the_lock_is_let_go_on_leaving(layout: RunLayout, cohort: Cohort) -> None:
    with Ledger(layout):
        entering(layout.root)
    run_once(layout, cohort)


def test_a_file_system_without_locks_only_warns(
    layout: RunLayout, cohort: Cohort, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", fail)
    run_once(layout, cohort)
    assert "has no locks" in caplog.text


def test_a_quarantine_is_remembered_for_its_run_key_until_released(layout: RunLayout, cohort: Cohort) -> None:
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        ledger.open_slide("a", "key")
        ledger.quarantine("a", "key", "inference", "its reader died")
        assert ledger.quarantined("a", "key") == ("inference", "its reader died")
        assert ledger.quarantined("a", "another file's key") is None
        assert ledger.quarantined("b", "key") is None
    with Ledger(layout) as ledger:
        start(ledger, cohort)
        assert ledger.quarantined("a", "key") is not None
        ledger.end_quarantine("a")
        assert ledger.quarantined("a", "key") is None
        ledger.quarantine("a", "key", "inference", "its reader died")
        layout.slide("a").quarantine_json.write_text("{")
        assert ledger.quarantined("a", "key") is None
