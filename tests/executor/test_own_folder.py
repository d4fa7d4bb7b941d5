"""Ray's folder of a killed process is removed at the next start, but no other; Ray's output goes to its own log.

A start that fails is repeated, and then ends the command.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from hover_batch.errors import InputError
from hover_batch.executor import cluster
from hover_batch.executor.cluster import _stderr_to, own_folder
from hover_batch.executor.resources import Node, Resources

HOLD = """
import sys
from pathlib import Path
from hover_batch.executor.cluster import own_folder
with own_folder(Path(sys.argv[1])) as folder:
    (folder / "session").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_swept_and_what_lives_is_not(tmp_path: Path) -> None:
    others = tmp_path / "hb-other"  # has no owner that could be asked
    others.mkdir()
    (tmp_path / "hb-link").symlink_to(tmp_path / "elsewhere")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout and holder.stdin
    held = Path(holder.stdout.readline().strip())
    with own_folder(tmp_path) as mine:
        assert held.is_dir() and mine.is_dir() and mine != held
    assert not mine.exists()
    holder.kill()
    holder.communicate()
    assert (held / "session").is_dir()
    with own_folder(tmp_path):
        assert not held.exists()
    assert others.is_dir() and (tmp_path / "hb-link").is_symlink()


def test_what_ray_says_past_python_while_it_comes_up_goes_to_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "ray.log"
    for attempt in ("first", "second"):
        with _stderr_to(log):
            os.write(2, f"{attempt}, of its core\n".encode())
        os.write(2, f"{attempt}, of the run\n".encode())
    assert log.read_text() == "first, of its core\nsecond, of its core\n"
    assert capfd.readouterr().err == "first, of the run\nsecond, of the run\n"


def test_a_start_that_always_fails_is_no_internal_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**settings: object) -> None:
        raise Exception("the node did not answer\nmore")

    monkeypatch.setattr(cluster, "_init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # it would end the cluster of the other tests
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    warnings: list[str] = []
    message = r"did not start on this machine in 3 attempts \(the node did not answer\); .* use --backend local"
    start = cluster.started(Resources((Node.here(),)), tmp_path / "ray.log", warn=warnings.append)
    with pytest.raises(InputError, match=message), start:  # exit code 2: nothing was run
        pytest.fail("Ray has started")
    assert len(warnings) == 2
