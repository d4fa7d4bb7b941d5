"""Real slides on both backends: the same tables, byte for byte, even if the run on Ray is interrupted three times."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from cohort_runs import on_loopback
from command import assert_all_gone, count, start
from real_slides import COMPLETE, write_real_cohort

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

FLAGS = ["--unit", "1024", "--tissue", "auto", "--runtime", "auto"]
STRUCK_AT = {"Ctrl-C once": 3, "Ctrl-C twice": 12, "kill -9": 24}
"""Units that are predicted by then, of some fifty."""


def predicted(out: Path) -> int:
    return sum(count(folder) for folder in out.glob("slides/*/markers"))


def tables(out: Path) -> dict[str, bytes]:
    return {slide_id: (out / "slides" / slide_id / "nuclei.parquet").read_bytes() for slide_id in COMPLETE}


def untimed(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    return table.drop(columns=[name for name in table if name == "model_busy" or name.startswith("seconds")])


def strike(pid: int, how: str) -> None:
    """Ctrl-C as a terminal sends it, to all processes; kill -9 to the driver alone."""
    if how == "kill -9":
        os.kill(pid, signal.SIGKILL)
        return
    os.killpg(pid, signal.SIGINT)
    if how == "Ctrl-C twice":
        time.sleep(0.1)
        os.killpg(pid, signal.SIGINT)


def test_both_backends_however_interrupted(data: Path, tmp_path: Path) -> None:
    on_loopback()
    cohort = write_real_cohort(data, tmp_path)
    local = start(cohort, tmp_path / "local", *FLAGS, "--backend", "local")
    printed, _ = local.communicate()
    assert local.returncode == 3, printed

    out = tmp_path / "ray"
    for how, units in STRUCK_AT.items():
        process = start(cohort, out, *FLAGS)
        while predicted(out) < units:
            assert process.poll() is None, f"ended before it could be interrupted: {process.communicate()[0]}"
            time.sleep(0.01)
        strike(process.pid, how)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == (-signal.SIGKILL if how == "kill -9" else 130), printed
        assert_all_gone(process.pid)
        assert not all((out / "slides" / slide_id / "slide.json").exists() for slide_id in COMPLETE)
    process = start(cohort, out, *FLAGS)
    printed, _ = process.communicate()
    assert process.returncode == 3, printed
    assert_all_gone(process.pid)
    assert tables(out) == tables(tmp_path / "local")
    for name in ("summary.csv", "failures.csv"):
        pd.testing.assert_frame_equal(untimed(out / name), untimed(tmp_path / "local" / name))
