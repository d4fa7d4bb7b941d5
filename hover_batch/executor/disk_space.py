"""Pause a run while the disk is full, without counting it as a failure of a slide."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from hover_batch.errors import DISK_FULL, ScratchFull

NEEDED_BYTES = 64 << 20
"""Free space with which a run continues: some shards of units and the tables of a slide."""
CHECK_EVERY_S = 5.0
"""Seconds between checks."""
MAX_WAIT_S = 300.0
"""Longest wait between checks, when the disk fills up again right after each."""


def is_disk_full(error: BaseException) -> bool:
    """Return whether `error` is an OSError because the disk, or the user's quota on it, is full."""
    return isinstance(error, OSError) and error.errno in DISK_FULL


class DiskSpace:
    """Monitor of the disk space in `folder`. It checks nothing until `report_full` is called.

    `warn`: shows a line to the user. `record`: logs an event, given its name and values.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None], record: Callable[..., None]) -> None:
        self.folder = folder
        self._warn = warn
        self._record = record
        self.full = False
        """Whether the disk was full at the last check."""
        self._watched = folder
        self._check_at = 0.0
        self._wait_s = CHECK_EVERY_S
        self._freed_at = -MAX_WAIT_S

    def report_full(self, slide_id: str | None, error: BaseException | None = None) -> None:
        """Pause the run because a write failed: set `full`, warn the user and log the event `disk_full`.

        If the run is paused already, nothing happens.

        `slide_id`: slide that was being written; None if there is none. `error`: error of the write. A ScratchFull
        names the folder for copies whose disk is full; for other errors, the disk of `folder` is full. If the folder
        for copies does not exist on this machine, `available` checks `folder` instead.
        """
        if self.full:
            return
        now = time.monotonic()
        filled_up_again = now - self._freed_at < self._wait_s + CHECK_EVERY_S
        self._wait_s = min(2 * self._wait_s, MAX_WAIT_S) if filled_up_again else CHECK_EVERY_S
        self.full = True
        self._check_at = now + self._wait_s
        self._record("disk_full", slide_id=slide_id)
        folder = Path(error.filename) if isinstance(error, ScratchFull) else self.folder
        self._watched = folder if folder.is_dir() else self.folder  # another machine's copies are not visible here
        where = f" at {slide_id}" if slide_id else ""
        self._warn(
            f"no space left on disk{where}: waiting for space in {folder}. Free some, and the run continues "
            "by itself; or stop it with Ctrl-C and resume it later with the same command"
        )

    def available(self) -> bool:
        """Return whether the run can continue; do not wait.

        True unless the run is paused because the disk is full. While it is paused, try to reserve NEEDED_BYTES in a
        temporary file, at most every CHECK_EVERY_S seconds. This interval doubles each time that the disk fills up
        again at once, up to MAX_WAIT_S. A reservation also respects quotas, which the amount of free space does not
        show. If it succeeds, the pause ends: `full` is reset, the user gets a message, and the event `disk_has_room` is
        logged.

        OSError if the temporary file cannot be written although the disk is not full.
        """
        if self.full and time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + self._wait_s
            if _can_reserve(self._watched, NEEDED_BYTES):
                self.full, self._freed_at = False, time.monotonic()
                self._record("disk_has_room")
                self._warn("there is space on disk again: continuing")
        return not self.full

    def wait(self) -> None:
        """Block while the run is paused: poll `available` until it returns True.

        Return at once if the run is not paused. Errors of `available` propagate.
        """
        while not self.available():
            time.sleep(0.2)


def _can_reserve(folder: Path, n: int) -> bool:
    """Whether `n` bytes can be reserved in the folder; they are freed again."""
    probe = folder / f".room-{uuid.uuid4().hex}"
    try:
        with open(probe, "xb") as file:
            os.posix_fallocate(file.fileno(), 0, n)
    except OSError as error:
        if is_disk_full(error):
            return False
        raise
    finally:
        probe.unlink(missing_ok=True)
    return True
