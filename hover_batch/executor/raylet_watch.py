"""End this process when the raylet of its own Ray cluster has died.

Ray itself would end it half a minute later, without a message. The raylet is Ray's process that manages a node.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from hover_batch.errors import HoverBatchError

_POLL_S = 1.0
"""Seconds between checks of the raylet."""


@contextlib.contextmanager
def exit_if_raylet_dies(folder: Path, at_end: Callable[[], None]) -> Iterator[None]:
    """While the block runs, end this process with exit code 1 when the raylet of a cluster dies.

    The process ends at once, as after a kill; `finally` blocks do not run. If the raylet is not found, as on
    systems without /proc, it is not watched.

    `folder`: folder of the cluster's files, whose name is in the raylet's command line. `at_end`: called in a thread
    before the process ends.
    """
    raylet = _raylet_pid(folder)
    if raylet is None:
        yield
        return
    leaving = threading.Event()

    def watch() -> None:
        while not leaving.wait(_POLL_S):
            if not _is_running(raylet):
                try:
                    at_end()
                finally:
                    os._exit(HoverBatchError.exit_code)

    watcher = threading.Thread(target=watch, name="raylet", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        leaving.set()
        watcher.join()


def _raylet_pid(folder: Path) -> int | None:
    """Return the process id of the raylet with files in `folder`; None if it is not found."""
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            program, _, arguments = command_line.read_bytes().partition(b"\0")
            if program.endswith(b"/raylet") and os.fsencode(folder) in arguments:
                return int(command_line.parent.name)
    return None


def _is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie, which has ended but is still listed."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
