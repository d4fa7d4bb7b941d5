"""Run the command as a process in a session of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import psutil

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["--unit", "256", "--batch", "1", "--tissue", "all", "--threads", "1"]
UNITS = 16
GONE_S = 120
"""Ray's helpers notice the death of their driver within a minute."""


def start(
    cohort: Path, out: Path, *flags: str, more: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    """The command in a session of its own, as a terminal would have it."""
    return subprocess.Popen(
        [sys.executable, "-c", "from hover_batch.cli import app; app()", "segment", str(cohort), "-o", str(out)]
        + ["--backend", "ray", *SETTINGS, *flags],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def of_session(session: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue


def assert_all_gone(session: int) -> None:
    deadline = time.monotonic() + GONE_S
    while left := [" ".join(p.cmdline())[:80] for p in of_session(session)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.5)


def count(folder: Path) -> int:
    return sum(1 for p in folder.glob("*") if not p.name.startswith(".")) if folder.is_dir() else 0
