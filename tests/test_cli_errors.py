"""Faults of the machine end a command with one message, not with a traceback."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import typer
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner

from hover_batch.__main__ import main
from hover_batch.cli import app
from hover_batch.cli_errors import CommandGroup


class Killed(Dataset[int]):
    """Dataset whose reader dies, as if the system had run out of memory."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def storage_fails() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))  # as from `write`, which does not know the path


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        (lambda: np.empty(1 << 50), "not enough memory (Unable to allocate 8.00 PiB"),
        (lambda: torch.empty(1 << 50), "not enough memory ("),
        (lambda: next(iter(DataLoader(Killed(), num_workers=1))), "a process that prepares batches was killed"),
        (storage_fails, "Input/output error; check the disk or network file system"),
    ],
    ids=["memory", "memory of a tensor", "killed reader", "storage"],
)
def test_what_the_machine_lacks_is_said_in_one_line(lacking: Callable[[], object], message: str) -> None:
    machine = typer.Typer(cls=CommandGroup, pretty_exceptions_enable=False)
    machine.callback()(lambda: None)
    machine.command("use")(lambda: lacking() and None)
    result = CliRunner().invoke(machine, ["use"])
    assert result.exit_code == 1 and result.stderr.startswith(f"Error: {message}"), result.output
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ImportError("libX.so.1: cannot open shared object file"), "a library does not load (libX.so.1: cannot open"),
        (OSError("/usr/lib/_raylet.so: failed to map segment"), "a library does not load (/usr/lib/_raylet.so: failed"),
        (MemoryError(), "not enough memory; give smaller batches or images; `hover-batch doctor` checks"),
        (ImportError("cannot import name 'x' from 'y'"), None),
        (OSError("no number"), None),
    ],
)
def test_a_library_that_does_not_load_ends_with_a_message(raised: Exception, message: str | None) -> None:
    """As without libGL, or under a limit of the address space."""
    command = typer.Typer(cls=CommandGroup)

    @command.command()
    def fail() -> None:
        raise raised

    @command.callback()
    def group() -> None: ...

    result = CliRunner().invoke(command, ["fail"])
    if message is None:
        assert result.exception is raised
    else:
        assert result.exit_code == 1 and result.stderr.startswith(f"Error: {message}")


def test_a_limit_of_file_sizes_is_named_with_its_remedy(tmp_path: Path) -> None:
    out, tile = tmp_path / "out", tmp_path / "tile.tif"
    resolution = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tile, np.full((200, 300, 3), 245, np.uint8), photometric="rgb", **resolution)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        result = CliRunner().invoke(app, ["segment", str(tile), "-o", str(out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1
    said = f"Error: {out}/.*: File too large; raise the limit of file sizes \\(ulimit -f\\), or write to .*"
    assert re.fullmatch(said, result.stderr.splitlines()[-1])


@pytest.mark.parametrize("command", ["status", "export --to csv", "cohort -o new", "query SELECT"])
def test_a_path_that_no_file_can_have_is_invalid_input(tmp_path: Path, command: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    word, *more = command.split()
    for path in (tmp_path / "loop", tmp_path / ("x" * 300)):
        words = [word, *([path, *more] if word == "query" else [*more, path])]
        result = CliRunner().invoke(app, [str(each) for each in words])
        assert result.exit_code == 2 and re.search("symbolic links|too long", result.stderr), result.output


def test_a_path_that_is_not_utf8_is_invalid_input(tmp_path: Path) -> None:
    for words in (["status", "\udcff"], ["query", str(tmp_path), "SELECT 1", "-o", "\udcff.csv"]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2 and "its name is not valid UTF-8" in result.stderr


def test_a_settings_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff")
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "huge.toml").write_text(f"[tissue]\nmask_mpp = 1{'0' * 400}\n")
    for file, message in (
        ("none.toml", "none.toml: cannot be read (No such file or directory); name a TOML file"),
        ("folder.toml", "folder.toml: cannot be read (Is a directory); name a TOML file"),
        ("pipe.toml", "pipe.toml: cannot be read (is a device or a pipe, not a file; name a file); name a TOML file"),
        ("binary.toml", "is not TOML in UTF-8"),
        ("huge.toml", "setting tissue.mask_mpp: a number of 401 digits is too large"),
    ):
        result = CliRunner().invoke(app, ["plan", "cohort.csv", "--config", str(tmp_path / file)])
        assert result.exit_code == 2 and message in result.stderr, result.output


def test_an_interruption_while_the_commands_are_built_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(app: typer.Typer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.main.get_command", interrupted)
    monkeypatch.setattr("gc.set_threshold", lambda *thresholds: None)
    monkeypatch.setattr("hover_batch.executor.interrupts.restore_default_actions", lambda: None)  # keep pytest's
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_while_python_shuts_down_ends_without_a_traceback(number: signal.Signals) -> None:
    program = f"""
import atexit, os, sys
from hover_batch.__main__ import main
atexit.register(os.kill, os.getpid(), {int(number)})
sys.argv = ["hover-batch", "--version"]
main()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-number, "") and ended.stdout.strip()


@pytest.mark.parametrize("command", ["segment", "cohort"])
def test_results_are_not_written_to_memory(command: str, tmp_path: Path) -> None:
    words = {"segment": ["segment", "--example"], "cohort": ["cohort", str(tmp_path)]}[command]
    result = CliRunner().invoke(app, [*words, "-o", "memory://bucket/out"])
    assert result.exit_code == 2 and "memory://bucket/out: memory:// exists only while" in result.stderr


def test_variables_in_lower_case_are_warned_of(tmp_path: Path) -> None:
    env = {"hover_batch_q": "1", "HOVER_BATCH_Q": "1", "hover_batch_batch": "4"}
    said = CliRunner().invoke(app, ["status", str(tmp_path)], env=env).stderr.splitlines()
    none = "is not known, and has no effect"
    assert said[0] == f"Warning: the environment variable HOVER_BATCH_Q {none}"
    assert said[1].startswith(f"Warning: the environment variable hover_batch_batch {none}; did you mean HOVER_BATCH_B")
    assert said[2] == f"Warning: the environment variable hover_batch_q {none}"
