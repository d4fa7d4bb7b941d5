"""`doctor` reports each problem with its fix and never fails itself."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from hover_batch import doctor
from hover_batch.cli import app
from hover_batch.doctor import GIB, Check, Finding, checks
from hover_batch.errors import PackageError
from hover_batch.executor.resources import Node
from hover_batch.model import package

Disk = namedtuple("Disk", "total used free")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def look(name: str, output: Path = Path()) -> Finding:
    return next(check for check in checks(output) if check.name == name).run()


def test_this_machine_passes_and_each_check_is_one_line(tmp_path: Path) -> None:
    result = run("-o", tmp_path / "new" / "out")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == len(checks(tmp_path)) and {line.split()[0] for line in lines} <= {"PASS", "WARN"}
    assert not list(tmp_path.iterdir())  # it writes nothing there
    for said in (torch.__version__, metadata.version("ray"), "PASS  weights", "PASS  openslide"):
        assert said in result.stdout
    held = json.loads(run("--json", "-o", tmp_path).stdout)
    assert held["ok"] and [check["check"] for check in held["checks"]] == [check.name for check in checks(tmp_path)]
    assert all(check["fix"] for check in held["checks"] if check["status"] == "WARN")


def test_a_check_that_raises_is_a_fail_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises() -> Finding:
        raise ZeroDivisionError("by nought\nand more")

    check = Check("odd", raises, "mend it")
    assert check.run() == Finding("FAIL", "ZeroDivisionError: by nought", "mend it")
    monkeypatch.setattr(doctor, "checks", lambda *_, **__: [check])
    result = run()
    assert result.exit_code == 2 and result.stdout == "FAIL  odd         ZeroDivisionError: by nought → mend it\n"
    result = run("--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["ok"] is False


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert look("output", tmp_path / "file" / "out").status == "FAIL"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(100 * GIB, 99 * GIB, GIB))
    found = look("output", tmp_path)
    assert found.status == "WARN" and "1.0 GiB free" in found.found and found.fix
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(100 * GIB, 100 * GIB, 1000))
    assert look("output", tmp_path).status == "FAIL"


def _cache_below_a_file(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HOVER_BATCH_CACHE", "/dev/null/cache")


def _no_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(Node, "here", lambda: Node(4, 0, 8 * GIB))


def _torch_for_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(torch.version, "cuda", None)
    patch.setattr(Node, "here", lambda: Node(4, 2, 8 * GIB))


def _old_driver(patch: pytest.MonkeyPatch) -> None:
    def unavailable() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old (found version 11040).", stacklevel=1)
        return False

    patch.setattr(torch.cuda, "is_available", unavailable)
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(Node, "here", lambda: Node(4, 1, 8 * GIB))


def _one_core(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Node, "here", lambda: Node(1, 0, 8 * GIB))
    patch.setattr(doctor, "LOW_MEMORY", 0)  # whatever else runs here


def _little_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Node, "here", lambda: Node(4, 0, GIB))


def _small_address_space(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resource, "getrlimit", lambda _: (3 * GIB, 3 * GIB))


def _small_shm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: Disk(64 << 20, 0, 64 << 20))


def _few_files(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resource, "getrlimit", lambda _: (256, 8192))


def _two_opencvs(patch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    patch.setattr(doctor, "version", lambda name: "4.13.0.90" if name == "opencv-python-headless" else real(name))


def _latin(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "getfilesystemencoding", lambda: "latin-1")


def _no_extensions(patch: pytest.MonkeyPatch) -> None:
    class Plain:
        def close(self) -> None:
            pass

    patch.setattr(sqlite3, "connect", lambda _: Plain())


def _no_token(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("RAY_AUTH_MODE", "token")
    patch.delenv("RAY_AUTH_TOKEN", raising=False)
    patch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")


def _harmed_weights(patch: pytest.MonkeyPatch) -> None:
    def harmed(_: Any) -> None:
        raise PackageError("the weights do not match their card")

    patch.setattr(doctor, "load_tensors", harmed)


def _no_starter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(package, "ASSETS", Path("/nowhere"))


@pytest.mark.parametrize(
    ("name", "spoil", "status", "said", "fix"),
    [
        ("gpu", _no_gpu, "WARN", "use the CPU", "GPU"),
        ("gpu", _torch_for_cpu, "FAIL", "CPU only", "CUDA"),
        ("gpu", _old_driver, "FAIL", "driver on your system is too old", "CUDA 13.0"),
        ("memory", _one_core, "WARN", "cores: 1", "two cores"),
        ("memory", _little_memory, "WARN", "memory: 1.0 GiB", "4 GiB"),
        ("memory", _small_address_space, "WARN", "address space is limited to 3.0 GiB", "ulimit -v unlimited"),
        ("/dev/shm", _small_shm, "WARN", "0.1 GiB free", "--shm-size"),
        ("open files", _few_files, "WARN", "256", "ulimit -n 8192"),
        (
            "opencv",
            _two_opencvs,
            "WARN",
            "opencv-python-headless 4.13.0.90",
            "pip install --no-deps opencv-python==",
        ),
        ("text", _latin, "WARN", "latin-1", "C.UTF-8"),
        ("sqlite", _no_extensions, "WARN", "loads no extensions", "loadable"),
        ("token", _no_token, "WARN", "no token", "RAY_AUTH_TOKEN"),
        ("weights", _harmed_weights, "FAIL", "do not match", "reinstall"),
        ("cache", _cache_below_a_file, "WARN", "/dev/null cannot be written", "HOVER_BATCH_CACHE"),
        ("weights", _no_starter, "FAIL", "no such package", "reinstall"),
    ],
)
def test_each_problem_is_reported_with_its_fix(
    name: str,
    spoil: Callable[[pytest.MonkeyPatch], None],
    status: str,
    said: str,
    fix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        spoil(patch)
        found = look(name)
    assert found.status is status and said in found.found and fix in found.fix, found


def test_a_library_that_does_not_load_is_a_fail_and_no_traceback(tmp_path: Path) -> None:
    """In a process of its own, in which importing OpenSlide, torch and Ray fails, as without libGL or after half an
    installation."""
    for library in ("openslide", "torch", "ray", "cv2"):
        (tmp_path / f"{library}.py").write_text("raise OSError('libX.so.1: cannot open shared object file')")
    ended = subprocess.run(
        [sys.executable, "-c", "from hover_batch.cli import app; app()", "doctor", "-o", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2 and ended.stderr == ""
    failed = {line.split()[1]: line for line in ended.stdout.splitlines() if line.startswith("FAIL")}
    assert {"openslide", "torch", "ray", "opencv"} <= failed.keys() and "weights" in failed
    assert all("libX.so.1" in line and " → " in line for line in failed.values()), failed


def test_ray_is_started_where_that_is_asked_for(tmp_path: Path) -> None:
    """In a separate process, since Ray keeps the token of its first import."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        pytest.skip("other interfaces than loopback are up: run `scripts/loopback uv run pytest`, as the CI does")
    ended = subprocess.run(
        [sys.executable, "-c", "from hover_batch.cli import app; app()", "doctor", "--ray", "-o", str(tmp_path)],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"PASS  ray         {metadata.version('ray')}, started and did a task in" in ended.stdout
