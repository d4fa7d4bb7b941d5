"""Nodes join and leave a cluster during a run: nothing is lost, no slide is blamed, and new nodes are used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from accelerators import LoadQuick
from cohort_runs import note, on_loopback, runner
from test_contract import events
from test_kill_9 import recovery

pytestmark = pytest.mark.faults

HERE = Path(__file__).parent


def on_nodes(folder: Path, environment: Mapping[str, str] = MappingProxyType({}), **plan: Any) -> dict[str, Any]:
    """Run several_nodes.py by this plan, with more variables in its `environment`; returns what it printed."""
    on_loopback()
    (folder / "plan.json").write_text(json.dumps(plan, default=str))
    done = subprocess.run(
        [sys.executable, HERE / "several_nodes.py", folder / "plan.json"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_machine_is_lost_and_another_comes(
    fields: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    cohort, out = fields("a", "b", "c", "d"), tmp_path / "out"
    wanted = [("unit_done", 6, "remove"), ("lost", 1, "add")]
    found = on_nodes(tmp_path, cohort=cohort, out=out, gpus=gpus, cpus=2, nodes=2, seconds=1.0, unit=256, events=wanted)
    assert found["exit_code"] == 0
    assert events(out, "lost") and not events(out, "strike")
    assert {e["nodes"] for e in events(out, "nodes_changed")} >= {2}
    runner("local", monkeypatch)(cohort, tmp_path / "reference", LoadQuick())
    on = "a GPU" if gpus else "the CPU"
    note(f"a machine of two is lost, networks on {on}", out, tmp_path / "reference", 2, recovery(out, "lost"))


def test_the_last_machine_is_lost_and_another_comes(
    fields: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, out = fields("a", "b"), tmp_path / "out"
    wanted = [("unit_done", 3, "remove"), ("lost", 1, "add")]
    found = on_nodes(tmp_path, cohort=cohort, out=out, gpus=0, cpus=2, nodes=1, seconds=1.0, unit=256, events=wanted)
    assert found["exit_code"] == 0
    assert events(out, "lost") and not events(out, "strike")
    runner("local", monkeypatch)(cohort, tmp_path / "reference", LoadQuick())
    note("the last machine is lost", out, tmp_path / "reference", 2, recovery(out, "lost"))
