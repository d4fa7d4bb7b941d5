"""A process that was considered dead returns with other bytes: the first writer wins, and nothing changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from accelerators import LoadQuick, Quick
from cohort_runs import Run, note, runner
from numpy.typing import NDArray
from test_contract import tables

from hover_batch.errors import SlideError
from hover_batch.executor.slide_state import SlideState, Surveyed
from hover_batch.geometry import Box
from hover_batch.pipeline import infer
from hover_batch.seconds import Seconds
from hover_batch.slide.reader import open_slide
from hover_batch.slide_work import SlideWork, open_store

pytestmark = pytest.mark.faults

Fields = Callable[..., Path]


@dataclass
class Other(Quick):
    """Predicts other maps, once `go_on` holds."""

    begun: threading.Event = field(default_factory=threading.Event)
    go_on: Callable[[], bool] = lambda: True

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        self.begun.set()
        while not self.go_on():
            time.sleep(0.01)
        return 255 - super().predict(tiles)


class Zombie(threading.Thread):
    """Predicts the slide's last unit beside the run, from before the run has done it."""

    def __init__(self, work: SlideWork, go_on: Callable[[], bool]) -> None:
        super().__init__()
        self.work, self.unit = work, work.units[-1]
        self.marker = work.layout.marker(self.unit.column, self.unit.row)
        self.network = Other(work.card, 2, go_on=lambda: self.marker.exists() and go_on())
        self.error: Exception | None = None

    def run(self) -> None:
        def read(boxes: list[Box], seconds: Seconds) -> Iterator[NDArray[np.uint8]]:
            with open_slide(self.work.record) as reader:
                for box in boxes:
                    yield reader.read(box, self.work.grid)

        try:
            infer(self.unit, self.work, read, self.network, open_store(self.work), lambda _: None)
        except SlideError as error:
            self.error = error


@pytest.fixture
def zombies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], bool]], list[Zombie]]]:
    """`zombies(go_on)`: of each slide that is surveyed from now on there is one; they write when `go_on` holds."""
    started: list[Zombie] = []

    def haunt(go_on: Callable[[], bool]) -> list[Zombie]:
        add_survey = SlideState.add_survey

        def haunted(slide: SlideState, found: Surveyed) -> None:
            zombie = Zombie(found.work, go_on)
            zombie.start()
            started.append(zombie)
            assert zombie.network.begun.wait(60) and not zombie.marker.exists()
            add_survey(slide, found)

        monkeypatch.setattr(SlideState, "add_survey", haunted)
        return started

    yield haunt
    for zombie in started:
        zombie.join(60)


def test_the_first_writer_wins(
    fields: Fields,
    run_on_ray: Run,
    tmp_path: Path,
    zombies: Callable[..., list[Zombie]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It finishes its unit after the run has: shard, marker and table stay the run's."""
    out, cohort = tmp_path / "out", fields("a")
    written: dict[str, bytes] = {}

    def go_on() -> bool:
        (slide,) = (out / "slides").iterdir()
        if not written:
            files = [*(slide / "predictions.zarr" / "c").rglob("*"), *(slide / "markers").glob("*.json")]
            written.update({str(path): path.read_bytes() for path in files if path.is_file()})
        return True

    started = zombies(go_on)
    assert run_on_ray(cohort, out, LoadQuick(0.1)).exit_code == 0
    (zombie,) = started
    zombie.join(60)
    assert zombie.error is None and str(zombie.marker) in written
    assert {path: Path(path).read_bytes() for path in written} == written
    runner("local", monkeypatch)(cohort, tmp_path / "reference", LoadQuick())
    note("a zombie with other bytes", out, tmp_path / "reference", 2, 0.0)
    # Tables made after the zombie has written are the same.
    (out / "slides" / "a" / "slide.json").unlink()
    for part in (out / "slides" / "a" / "parts").iterdir():
        part.unlink()
    monkeypatch.undo()
    assert runner("local", monkeypatch)(cohort, out, LoadQuick()).exit_code == 0
    assert tables(out) == tables(tmp_path / "reference")


def test_one_of_another_run_key_stands_aside(
    fields: Fields,
    run_on_ray: Run,
    tmp_path: Path,
    zombies: Callable[..., list[Zombie]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It finishes its unit when the folder belongs to a run with another pixel size."""
    out, cohort = tmp_path / "out", fields("a")
    released = threading.Event()
    started = zombies(released.is_set)
    assert run_on_ray(cohort, out, LoadQuick()).exit_code == 0
    monkeypatch.undo()
    local = runner("local", monkeypatch)
    (out / "slides" / "a" / "slide.json").unlink()
    cohort.write_text("path,mpp\na.png,0.26\n")
    assert local(cohort, out, LoadQuick()).exit_code == 0
    released.set()
    (zombie,) = started
    zombie.join(60)
    assert "another run has taken over" in str(zombie.error)
    local(cohort, tmp_path / "reference", LoadQuick())
    note("a zombie of another run key", out, tmp_path / "reference", 1, 0.0)
