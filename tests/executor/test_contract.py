"""The contract of executors: each test runs on both backends, and tables are the same, byte for byte."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from accelerators import LoadQuick, load_nothing
from cohort_runs import SETTINGS, Run, file_system, runner
from PIL import Image
from random_weights import random_mask_rcnn

from hover_batch.cohort.events import stream_events
from hover_batch.config import EngineSettings, OutputSettings, TissueSettings
from hover_batch.errors import PackageError, TooManyFailures
from hover_batch.executor import disk_space
from hover_batch.executor.disk_space import DiskSpace
from hover_batch.executor.run_recorder import RunRecorder
from hover_batch.model.package import save_package

Fields = Callable[..., Path]


def tables(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in (out / "slides").glob("*/nuclei.parquet")}


def events(out: Path, name: str) -> list[dict[str, object]]:
    return [e for e in stream_events(out / "logs" / "events.jsonl") if e["event"] == name]


@pytest.fixture
def reference(fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The tables of slides a and b as the local executor makes them."""
    out = tmp_path / "reference"
    outcome = runner("local", monkeypatch)(fields("a", "b"), out, LoadQuick())
    assert all(slide["nuclei"] > 30 for slide in outcome.slides)
    return tables(out)


def test_a_real_tile_gives_the_same_bytes(
    data: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The starter over a real field of 512² pixels."""
    field = sorted((data / "nuclei" / "images").glob("tnbc_*.png"))[0]
    cohort = tmp_path / "cohort.csv"
    cohort.write_text(f"path,slide_id,mpp\n{field},field,0.25\n")
    assert run(cohort, tmp_path / "out").exit_code == 0
    runner("local", monkeypatch)(cohort, tmp_path / "reference")
    assert tables(tmp_path / "out") == tables(tmp_path / "reference")
    assert pq.read_metadata(tmp_path / "out" / "slides" / "field" / "nuclei.parquet").num_rows > 20


@pytest.mark.slow
def test_nuclei_that_tiles_cut_give_the_same_bytes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of Mask R-CNN depend on where tiles lie, but not on which process computes a unit."""
    save_package(tmp_path / "random.safetensors", *random_mask_rcnn())
    noise = np.random.default_rng(0).integers(60, 220, (200, 500, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    (tmp_path / "cohort.csv").write_text("path,mpp\nnoise.png,0.25\n")
    settings = replace(SETTINGS, model=str(tmp_path / "random.safetensors"))
    outcome = run(tmp_path / "cohort.csv", tmp_path / "out", settings=settings)
    assert outcome.exit_code == 0 and outcome.slides[0]["nuclei"] > 20
    runner("local", monkeypatch)(tmp_path / "cohort.csv", tmp_path / "reference", settings=settings)
    assert tables(tmp_path / "out") == tables(tmp_path / "reference")


def test_a_cohort_ends_whole(fields: Fields, run: Run, reference: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = run(fields("a", "b"), out, LoadQuick())
    assert outcome.exit_code == 0 and outcome.model_busy is not None and 0 < outcome.model_busy <= 1
    assert tables(out) == reference
    for slide_id in ("a", "b"):
        assert len([e for e in events(out, "unit_done") if e["slide_id"] == slide_id]) == 9
        assert len([e for e in events(out, "region_done") if e["slide_id"] == slide_id]) == 9
    assert [e["units"] for e in events(out, "slide_surveyed")] == [9, 9]
    summary = pd.read_csv(out / "summary.csv")
    assert (summary[summary.level == "slide"][["seconds_infer", "seconds_post", "seconds_read"]] > 0).all(axis=None)
    busy = summary.set_index("level").model_busy["cohort"]
    assert busy == pytest.approx(outcome.model_busy, rel=1e-4)


def test_what_was_done_is_not_done_again(fields: Fields, run: Run, reference: dict[str, bytes], tmp_path: Path) -> None:
    """Half a slide is left: shards, markers and parts of some units, one shard without its marker, one corrupted."""
    out = tmp_path / "out"
    run(fields("a", "b"), out, LoadQuick())
    slide = out / "slides" / "a"
    for name in ("slide.json", "nuclei.parquet", "markers/0_0.json", "parts/0_0.parquet", "markers/1_0.json"):
        (slide / name).unlink()
    (slide / "predictions.zarr" / "c" / "0" / "0" / "1").unlink()
    shard = slide / "predictions.zarr" / "c" / "0" / "1" / "1"
    shard.write_bytes(shard.read_bytes()[:-10])
    before = len(events(out, "unit_done"))
    outcome = run(fields("a", "b"), out, LoadQuick())
    assert outcome.exit_code == 0 and tables(out) == reference
    done = events(out, "unit_done")[before:]
    # The shard without a marker is adopted, which is no prediction; the other two are predicted again.
    assert sorted((e["column"], e["row"]) for e in done) == [(0, 0), (1, 0), (1, 1)]
    assert sorted("infer" in str(e["seconds"]) for e in done) == [False, True, True]


def test_a_finished_cohort_loads_no_network(fields: Fields, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(fields("a"), out, LoadQuick())
    assert run(fields("a"), out, LoadQuick()).exit_code == 0
    assert events(out, "run_finished")[-1]["model_busy"] is None


def test_a_slide_that_cannot_be_processed_costs_itself_only(
    fields: Fields, run: Run, reference: dict[str, bytes], tmp_path: Path
) -> None:
    """The picture between two good ones is cut off in the middle: its header reads, its pixels do not."""
    cohort = fields("a", "b", "cut")
    cut = cohort.parent / "cut.png"
    cut.write_bytes(cut.read_bytes()[:3000])
    cohort.write_text("path,mpp\na.png,0.25\ncut.png,0.25\nb.png,0.25\n")
    out = tmp_path / "out"
    outcome = run(cohort, out, LoadQuick())
    assert outcome.exit_code == 3 and tables(out) == reference
    failures = pd.read_csv(out / "failures.csv")
    assert list(failures.slide_id) == ["cut"] and "cut.png" in failures.reason[0]


def test_more_failures_than_allowed_stop_the_cohort(
    fields: Fields, run: Run, reference: dict[str, bytes], tmp_path: Path
) -> None:
    """Three pictures that cannot be read come first, one may fail; then the same cohort without a limit."""
    cohort = fields("a", "b", "cut", "cut-2", "cut-3")
    for path in cohort.parent.glob("cut*.png"):
        path.write_bytes(path.read_bytes()[:3000])
    names = ("cut", "cut-2", "cut-3", "a", "b")
    cohort.write_text("path,mpp\n" + "".join(f"{name}.png,0.25\n" for name in names))
    out = tmp_path / "out"
    with pytest.raises(TooManyFailures, match="2 slides failed, more than --max-failures 1") as stopped:
        run(cohort, out, LoadQuick(), settings=replace(SETTINGS, engine=EngineSettings(max_failures=1)))
    assert stopped.value.exit_code == 3
    assert len(pd.read_csv(out / "failures.csv")) == 2 and events(out, "run_stopped")
    assert run(cohort, out, LoadQuick()).exit_code == 3
    assert len(pd.read_csv(out / "failures.csv")) == 3 and tables(out) == reference


def test_a_network_that_cannot_be_loaded_stops_the_cohort(fields: Fields, run: Run, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="do not match their card"):
        run(fields("a", "b"), tmp_path / "out", load_nothing)
    assert list(pd.read_csv(tmp_path / "out" / "failures.csv").slide_id) == []


def test_stores_are_discarded_where_asked(
    fields: Fields, run: Run, reference: dict[str, bytes], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, output=OutputSettings(discard_predictions=True))
    out = tmp_path / "out"
    assert run(fields("a", "b"), out, LoadQuick(), settings=settings).exit_code == 0
    assert tables(out) == reference and not list(out.glob("slides/*/predictions.zarr"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    with file_system(tmp_path / "disk", "12m") as folder:
        yield folder


@pytest.mark.parametrize(
    "left", [pytest.param(0, id="nothing left"), pytest.param(200_000, id="some left", marks=pytest.mark.slow)]
)
def test_a_full_disk_is_waited_for(
    fields: Fields,
    run: Run,
    reference: dict[str, bytes],
    small_disk: Path,
    left: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It fills up when the first unit is done; no slide is blamed, nothing is lost, and there is space again later."""
    monkeypatch.setattr(disk_space, "NEEDED_BYTES", 4 << 20)
    monkeypatch.setattr(disk_space, "CHECK_EVERY_S", 0.5)
    ballast, waited = small_disk / "ballast", []

    def fill(recorder: RunRecorder, *values: Any) -> None:
        done(recorder, *values)
        if not ballast.exists():
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 20))
                    file.truncate(max(0, file.tell()))
            os.truncate(ballast, max(0, ballast.stat().st_size - left))

    def clear(disk: DiskSpace, slide_id: str, error: BaseException | None = None) -> None:
        report_full(disk, slide_id, error)
        waited.append(slide_id)
        ballast.write_bytes(b"")

    done, report_full = RunRecorder.record_unit, DiskSpace.report_full
    monkeypatch.setattr(RunRecorder, "record_unit", fill)
    monkeypatch.setattr(DiskSpace, "report_full", clear)
    outcome = run(fields("a", "b"), small_disk / "out", LoadQuick())
    assert waited and outcome.exit_code == 0
    assert tables(small_disk / "out") == reference
    said = capfd.readouterr().err
    assert "no space left on disk" in said and "there is space on disk again" in said


def test_a_slide_without_tissue_has_an_empty_table(run: Run, tmp_path: Path) -> None:
    """More than a square millimetre of glass: less would be taken for a tile that somebody cut out."""
    Image.fromarray(np.full((4200, 4200), 245, np.uint8)).save(tmp_path / "glass.png")
    (tmp_path / "cohort.csv").write_text("path,mpp\nglass.png,0.25\n")
    settings = replace(SETTINGS, tissue=TissueSettings(tissue="auto"))
    outcome = run(tmp_path / "cohort.csv", tmp_path / "out", LoadQuick(), settings=settings)
    assert outcome.exit_code == 0 and outcome.slides[0]["nuclei"] == 0
    assert events(tmp_path / "out", "slide_surveyed")[0]["units"] == 0


def test_a_mask_on_glass_is_warned_of_during_the_run(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((300, 300), 245, np.uint8)).save(tmp_path / "glass.png")
    Image.fromarray(np.eye(30, dtype=np.uint8)).save(tmp_path / "mask.png")
    (tmp_path / "cohort.csv").write_text("path,mpp,mask_path\nglass.png,0.25,mask.png\n")
    outcome = run(tmp_path / "cohort.csv", tmp_path / "out", LoadQuick())
    assert outcome.exit_code == 0
    warning = "Only 0% of the mask lies on stained tissue"
    assert f"glass: {warning}" in capfd.readouterr().err
    done = json.loads((tmp_path / "out" / "slides" / "glass" / "slide.json").read_bytes())
    assert warning in done["warnings"][0] and done["quality"]["mask_on_tissue"] == 0
