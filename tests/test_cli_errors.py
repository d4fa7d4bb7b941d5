"""A machine that lacks memory or whose storage fails: one message, not a traceback."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest
import torch
import typer
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner

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
