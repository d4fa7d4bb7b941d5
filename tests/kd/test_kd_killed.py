"""kd commands, killed with -9 at random moments and run again, give the results of an undisturbed run."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_teach import write_images, write_teacher
from training_folder import write_folder

from kd.data.datasets import read_data
from kd.data.samples import truth_sha256
from kd.training.logs import LOG, read_log

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--size", "64", "--batch", "2", "--steps", "30", "--epoch-steps", "3", "--threads", "1"]
TIMES = 4
"""Kills of one run."""


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from hover_batch.cli import app; app()", "kd", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*words: object) -> None:
    process = start(*words)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed


def killed(begun: Callable[[], bool], done: Callable[[], bool], within_s: float, seed: int, *words: object) -> int:
    """Run the command and kill it at some time after it has `begun` its work, TIMES times; how often that was before
    it was `done`."""
    moments = random.Random(seed)
    struck = 0
    for _ in range(TIMES):
        process = start(*words)
        until = time.monotonic() + 300
        while not begun() and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(moments.uniform(0, within_s))
        if done() or process.poll() is not None:
            process.communicate()
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        struck += 1
    assert struck, "it was never struck in the middle of its work"
    return struck


def weights(package: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(package)
    return found


def assert_same_run(out: Path, other: Path) -> None:
    ours, theirs = weights(out / "student.safetensors"), weights(other / "student.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    rows = [[{k: v for k, v in row.items() if k != "s_per_step"} for row in read_log(of / LOG)] for of in (out, other)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("seed", [1, 2])
def test_training(tmp_path: Path, seed: int) -> None:
    data = tmp_path / "data"
    data.mkdir()
    words = ["train", "--data", write_folder(data), *QUICK, "--out"]
    finish(*words, tmp_path / "undisturbed")
    out = tmp_path / "out"
    # The first time from its first checkpoint on; later, from wherever the next process stands.
    count = killed((out / "checkpoint.pt").exists, (out / "student.safetensors").exists, 12.0, seed, *words, out)
    print(f"killed {count} times")
    finish(*words, out)
    assert_same_run(out, tmp_path / "undisturbed")


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_a_sweep(tmp_path: Path, backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "ray":
        import socket

        if [name for _, name in socket.if_nameindex()] != ["lo"]:
            pytest.skip("other interfaces than loopback are up: run `scripts/loopback uv run pytest -m faults`")
    data = tmp_path / "data"
    data.mkdir()
    words = ["sweep", "--data", write_folder(data), "--seed", 1, "--seed", 2, "--threads", 1, "--test-fold", "val"]
    more = ["--backend", backend, "--cpus", 1, "--", *QUICK[:-2]]
    out = tmp_path / "out"
    finish(*words, "-o", tmp_path / "undisturbed", *more)
    killed(lambda: any(out.rglob("checkpoint.pt")), (out / "sweep.csv").exists, 15.0, 3, *words, "-o", out, *more)
    finish(*words, "-o", out, *more)
    runs = sorted(path.parent.relative_to(out) for path in out.rglob("student.safetensors"))
    assert len(runs) == 2
    for run in runs:
        assert_same_run(out / run, tmp_path / "undisturbed" / run)
        assert (out / run / "scores.json").exists()


def test_a_teachers_cache(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    words = ["teach", write_images(images), "--teacher", write_teacher(tmp_path / "professor.safetensors")]
    more = ["--backend", "local", "--cpus", 1]
    finish(*words, "-o", tmp_path / "undisturbed", *more)
    out = tmp_path / "out"
    killed(out.exists, lambda: False, 0.2, 4, *words, "-o", out, *more)
    finish(*words, "-o", out, *more)
    files = {
        of: {
            path.relative_to(of): path.read_bytes() for path in of.rglob("*") if path.is_file() and path.name != ".lock"
        }
        for of in (out, tmp_path / "undisturbed")
    }
    assert files[out] == files[tmp_path / "undisturbed"]


@pytest.mark.parametrize("name", ["data.npz", "data.zarr"])
def test_what_is_prepared(tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    folder = write_folder(data)
    out = tmp_path / "out"
    out.mkdir()
    finish("prepare", folder, "-o", tmp_path / name)
    killed(lambda: any(out.iterdir()), (out / name).exists, 0.05, 5, "prepare", folder, "-o", out / name)
    finish("prepare", folder, "-o", out / name)
    ours, theirs = (read_data(of / name, ["train", "val"]).samples for of in (out, tmp_path))
    assert len(ours) == 6
    assert [sample.image_sha256 for sample in ours] == [sample.image_sha256 for sample in theirs]
    assert truth_sha256(ours) == truth_sha256(theirs)
