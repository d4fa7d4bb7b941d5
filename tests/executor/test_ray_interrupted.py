"""The command on Ray, interrupted and repeated, gives the same tables, byte for byte, and no process is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from command import UNITS, assert_all_gone, count, of_session, start

from hover_batch.cohort.events import stream_events


def test_a_cluster_that_is_up_is_joined(cohort: Path, undisturbed: bytes, ray_cluster: Path, tmp_path: Path) -> None:
    """By a process of its own, which is given the cluster's address and token."""
    import ray

    address = ray.get_runtime_context().gcs_address
    token = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    joining = start(cohort, tmp_path / "out", "--address", address, more=token)
    # Meanwhile, since it only asks.
    refused = start(cohort, tmp_path / "no", "--address", address, more=token | {"RAY_AUTH_TOKEN": "0" * 64})
    printed, _ = joining.communicate(timeout=300)
    assert joining.returncode == 0, printed
    assert "cores: 3" in printed
    assert (tmp_path / "out" / "slides" / "field" / "nuclei.parquet").read_bytes() == undisturbed
    printed, _ = refused.communicate(timeout=300)
    assert refused.returncode == 2 and "refuses the token" in printed, printed


@pytest.mark.faults
@pytest.mark.parametrize("how", ["Ctrl-C once", "Ctrl-C twice", "SIGTERM", "kill -9", "raylet killed"])
def test_an_interrupted_run_ends_like_an_undisturbed_one(
    cohort: Path, undisturbed: bytes, tmp_path: Path, how: str
) -> None:
    out = tmp_path / "out"
    slide = out / "slides" / "field"
    process = start(cohort, out)
    deadline = time.monotonic() + 300
    while count(slide / "markers") < 3:
        assert process.poll() is None, f"ended before it could be interrupted: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if how == "kill -9":
        process.kill()  # the driver alone: its helpers are to notice
    elif how == "raylet killed":  # as the system does when memory runs out
        [raylet] = [p for p in of_session(process.pid) if p.name() == "raylet"]
        raylet.kill()
    elif how == "SIGTERM":
        process.terminate()  # as schedulers do
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
        if how == "Ctrl-C twice":
            time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=180)
    assert process.returncode == {"kill -9": -signal.SIGKILL, "raylet killed": 1}.get(how, 130), printed
    assert ("Ray's raylet has died" in printed) == (how == "raylet killed"), printed
    assert_all_gone(process.pid)
    reached = count(slide / "markers")
    assert 3 <= reached < UNITS, "it was not interrupted in the middle of its work"
    if how in ("Ctrl-C once", "SIGTERM"):
        # What was under way was finished: every marker has its event.
        events = list(stream_events(out / "logs" / "events.jsonl"))
        assert len([e for e in events if e["event"] == "unit_done"]) == reached
        assert "Finishing" in printed
        assert pd.read_csv(out / "slides.csv").status.tolist() == ["begun"]

    # Once more on a single core, which the network shares with readers and post-processing.
    again = start(cohort, out, *(["--cpus", "1"] if how == "Ctrl-C twice" else []))
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    assert (slide / "nuclei.parquet").read_bytes() == undisturbed
    assert_all_gone(again.pid)
    done = [e for e in stream_events(out / "logs" / "events.jsonl") if e["event"] == "unit_done"]
    assert len(done) <= UNITS + 3, "more than the units that were under way was done again"
