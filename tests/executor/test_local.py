"""Properties of the reference executor alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerators import LoadQuick, Quick
from cohort_runs import SETTINGS, runner
from numpy.typing import NDArray
from test_contract import events, tables
from thread_streams import Memory, thread_streams

import hover_batch.model.predict
import hover_batch.segment
from hover_batch.config import AUTO_BATCH, InferSettings
from hover_batch.model.heads import Heads
from hover_batch.model.package import Package
from hover_batch.model.predict import Predictor


class Deaf(Quick):
    """Loses a Ctrl-C, as a compiler's or a destructor's callback may."""

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return super().predict(tiles)


def load_deaf(package: Package, settings: InferSettings) -> Any:
    return Deaf(package.card, settings.batch)


def test_a_ctrl_c_that_is_lost_on_its_way_still_stops_the_run(
    fields: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = runner("local", monkeypatch), tmp_path / "out"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(fields("a"), out, load_deaf)
    assert signal.getsignal(signal.SIGINT) is before
    assert not events(out, "unit_done") and events(out, "run_stopped")
    assert list(pd.read_csv(out / "slides.csv").status) == ["begun"]
    assert run(fields("a"), out, LoadQuick()).exit_code == 0
    run(fields("a"), tmp_path / "reference", LoadQuick())
    assert tables(out) == tables(tmp_path / "reference")


class Tight(Quick):
    """Its device has memory for one tile at a time."""

    @property
    def at_once(self) -> int:
        return 1


def test_smaller_batches_are_a_warning(
    fields: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = runner("local", monkeypatch), tmp_path / "out"
    outcome = run(fields("a"), out, lambda package, settings: Tight(package.card, settings.batch))
    (warning,) = outcome.slides[0]["warnings"]
    assert warning.startswith("9 of 9 units were predicted in batches of 1")
    assert json.loads((out / "slides" / "a" / "markers" / "0_0.json").read_text())["batch"] == 1
    whole = run(fields("a"), tmp_path / "whole", LoadQuick())
    assert whole.slides[0]["warnings"] == []


@pytest.mark.parametrize("how", ["another run has taken over", "was removed or moved"])
def test_a_run_that_lost_its_folder_writes_nothing_more(
    fields: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A run of another key takes over the folder during the third unit, as after --force elsewhere; or it is gone."""
    run, out = runner("local", monkeypatch), tmp_path / "out"
    slide = out / "slides" / "a"

    class Usurped(Quick):
        batches = 0

        def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
            Usurped.batches += 1
            if Usurped.batches == 3:
                (slide / "key.json").write_text('{"run_key": "another"}')
                if "removed" in how:
                    (slide / "key.json").unlink()
            return super().predict(tiles)

    outcome = run(fields("a"), out, lambda package, settings: Usurped(package.card, settings.batch))
    assert outcome.exit_code == 4 and how in outcome.failures[0].reason
    assert len(list((slide / "markers").glob("*.json"))) == 2
    assert len([p for p in (slide / "predictions.zarr" / "c").rglob("*") if p.is_file()]) == 2
    run(fields("a"), tmp_path / "reference", LoadQuick())
    assert run(fields("a"), out, LoadQuick()).exit_code == 0
    assert tables(out) == tables(tmp_path / "reference")


def test_a_slide_that_is_replaced_while_it_is_read_fails(
    fields: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictions of both files are discarded, also if the first one comes back."""
    run, cohort, out = runner("local", monkeypatch), fields("a", "b"), tmp_path / "out"
    cohort.write_text("path,mpp\na.png,0.25\n")
    slide, first = cohort.parent / "a.png", (cohort.parent / "a.png").read_bytes()

    class Replacing(Quick):
        def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
            slide.write_bytes((cohort.parent / "b.png").read_bytes())
            return super().predict(tiles)

    outcome = run(cohort, out, lambda package, settings: Replacing(package.card, settings.batch))
    assert outcome.exit_code == 4 and "a.png: was replaced or changed" in outcome.failures[0].reason
    slide.write_bytes(first)
    assert run(cohort, out, LoadQuick()).exit_code == 0
    run(cohort, tmp_path / "reference", LoadQuick())
    assert tables(out) == tables(tmp_path / "reference")


class Darkness(torch.nn.Module):
    """Network that finds the dark discs. Its `breaks`-th batch raises."""

    def __init__(self, package: Package, breaks: int = -1) -> None:
        super().__init__()
        self.channels, self.breaks, self.batches = Heads(package.card.layout.n_types).channels, breaks, 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        if self.batches == self.breaks:
            raise RuntimeError("the device is lost")
        return (0.5 - image[:, :1]) * torch.linspace(-20, 20, self.channels)[:, None, None]


def test_batches_in_flight_change_no_byte_of_a_run(
    fields: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit of 9 tiles, in batches of 2, on a simulated device."""
    run, cohort = runner("local", monkeypatch), fields("a")
    settings = replace(SETTINGS, infer=replace(SETTINGS.infer, unit=1024))
    with thread_streams(Memory()) as streams:

        def load(package: Package, infer: InferSettings, breaks: int = -1) -> Predictor:
            predictor = Predictor(Darkness(package, breaks), package.card, infer)
            predictor.streams = streams
            return predictor

        outcome = run(cohort, tmp_path / "out", load, settings=settings)
        assert outcome.exit_code == 0 and outcome.slides[0]["nuclei"] > 20
        broken = run(cohort, tmp_path / "broken", lambda *given: load(*given, breaks=3), settings=settings)
    (failure,) = broken.failures
    assert failure.stage == "infer" and failure.reason == "NetworkFailed: RuntimeError: the device is lost"
    run(cohort, tmp_path / "reference", lambda p, s: Predictor(Darkness(p), p.card, s), settings=settings)
    assert tables(tmp_path / "out") == tables(tmp_path / "reference")
    stores = [sorted((tmp_path / of).rglob("predictions.zarr/c/**/*")) for of in ("out", "reference")]
    read = [[path.read_bytes() for path in store if path.is_file()] for store in stores]
    assert read[0] == read[1] != []


def test_an_automatic_batch_is_recorded_and_kept(
    fields: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU the batch is the default. On a GPU it is found in a trial, whose second result would be another one."""
    run, cohort = runner("local", monkeypatch), fields("a")
    trials = iter((4, 16))
    monkeypatch.setattr(hover_batch.model.predict, "auto_batch", lambda *_: next(trials))

    def recorded(out: Path, batch: int = AUTO_BATCH) -> dict[str, Any]:
        run(cohort, out, LoadQuick(), settings=replace(SETTINGS, infer=replace(SETTINGS.infer, batch=batch)))
        saved = tomllib.loads((out / "settings.toml").read_text())["infer"]["batch"]
        key: dict[str, Any] = json.loads((out / "run.json").read_text())["results_key"]
        assert saved == key["infer"]["batch"]
        return key

    assert recorded(tmp_path / "cpu") == recorded(tmp_path / "eight", 8)
    assert "batch: 8 tiles (auto)" in capsys.readouterr().err
    assert recorded(tmp_path / "two", 2) == recorded(tmp_path / "two")
    # As `resolve_here` leaves the settings on a GPU.
    monkeypatch.setattr(hover_batch.segment, "resolve_here", lambda settings, card: settings)
    assert recorded(tmp_path / "gpu")["infer"]["batch"] == 4
    assert recorded(tmp_path / "gpu")["infer"]["batch"] == 4
    assert tables(tmp_path / "gpu") == tables(tmp_path / "cpu")
