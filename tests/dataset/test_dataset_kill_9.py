"""kill -9 of `cohort` at random moments while it writes, adds and replaces: the data set opens, nothing is double."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from dataset_runs import MadeRun, check, held, same

from hover_batch.dataset import nuclei_file, update
from hover_batch.geometry import Size

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

SLIDES = [f"s{number:02d}" for number in range(24)]
CONTEXT = multiprocessing.get_context("forkserver")
"""A process that has imported everything starts the others, so that kills hit their work."""
CONTEXT.set_forkserver_preload(["hover_batch.dataset.update"])


def add(run: Path, dataset: Path) -> None:
    """What `cohort` does, in smaller files. Ends the process with its exit code."""
    nuclei_file.ROW_GROUP, update.SHARED_ROWS = 300, 1500
    sys.exit(update.add_run(run, dataset, (), lambda line: None).exit_code)


def run_and_kill(run: Path, dataset: Path, delay: float) -> tuple[int | None, float]:
    """Add the run in a process, which is killed after `delay` seconds. Return its exit code and its seconds."""
    process = CONTEXT.Process(target=add, args=(run, dataset))
    started = time.monotonic()
    process.start()
    process.join(delay)
    process.kill()
    process.join()
    return process.exitcode, time.monotonic() - started


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_kill_at_a_random_moment(nuclei: tuple[Any, Size], tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    made, dataset = MadeRun(tmp_path / "run", *nuclei), tmp_path / "dataset"
    known: dict[str, list[pa.Table]] = {slide_id: [] for slide_id in SLIDES}
    run_and_kill(made.layout.root, tmp_path / "none", 60)  # starts the server
    seconds, kills, attempts = 1.0, 0, 0
    for step in range(12):
        # First half of the slides, then all; later, some are made again, and some of these are small now.
        for slide_id in SLIDES[:12] if step == 0 else SLIDES:
            if not known[slide_id] or chance.random() < 0.4:
                made.put(slide_id, chance.choice([0, 30, 300, 900, 1600]), seed=100 * step + seed)
                known[slide_id].append(made.table(slide_id))
        listed = {(name, made.model): made.table(name) for name in made.patients}
        while True:
            attempts += 1
            code, took = run_and_kill(made.layout.root, dataset, chance.uniform(0, seconds))
            if dataset.joinpath("slides.parquet").exists():
                for (slide_id, _), table in held(dataset).items():
                    assert any(same(table, version) for version in known[slide_id]), slide_id
            if code != -signal.SIGKILL:
                assert code == 0
                seconds = took
                break
            kills += 1
            seconds *= 1.15  # in the end, it is done
        check(dataset, listed)
        if step >= 3 and kills >= 3:
            break
    assert kills >= 3
    if report := os.environ.get("FAULT_REPORT"):
        row = {
            "fault": f"kill -9 of cohort at random, seed {seed}",
            "attempts": attempts,
            "nuclei": sum(map(len, listed.values())),
        }
        with open(report, "a") as file:
            file.write(json.dumps(row | {"lost": 0, "duplicate": 0}) + "\n")
