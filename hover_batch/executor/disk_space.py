"""Room on disk. A run whose disk is full waits until there is some, and blames no slide."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from hover_batch.errors import DISK_FULL, ScratchFull

ROOM_BYTES = 64 << 20
"""What must be free before a run goes on: some shards of units, and the tables of a slide."""
ASK_EVERY_S = 5.0
MAX_WAIT_S = 300.0
"""The longest wait where the disk is full again and again, though each time there seemed to be room."""


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that there is no space, or no more of it for this user."""
    return isinstance(error, OSError) and error.errno in DISK_FULL


class Room:
    """Whether there is room in `folder` to go on: yes, until somebody says that it `ran_out`.

    `say` tells the user, `log` the events.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], log: Callable[..., None]) -> None:
        self.folder = folder
        self._say = say
        self._log = log
        self.full = False
        """Whether somebody said so, and there was no room when it was last asked."""
        self._ask_at = 0.0
        self._wait = ASK_EVERY_S
        self._back_at = -MAX_WAIT_S

    def ran_out(self, where: str, error: BaseException | None = None) -> None:
        """A write failed for want of space, in the work on `where`; `error` tells where that was not in `folder`."""
        if self.full:
            return
        again = time.monotonic() - self._back_at < self._wait + ASK_EVERY_S
        self._wait = min(2 * self._wait, MAX_WAIT_S) if again else ASK_EVERY_S
        self.full, self._ask_at = True, time.monotonic() + self._wait
        self._log("disk_full", slide_id=where)
        folder = error.filename if isinstance(error, ScratchFull) else self.folder
        self._say(
            f"no space left on disk at {where}: waiting for room in {folder}. Free some and the run goes on by "
            "itself; Ctrl-C ends it, and the same command goes on later"
        )

    def there(self) -> bool:
        """Whether work may go on. Asks the file system every few seconds, quotas included."""
        if self.full and time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + self._wait
            if _fits(self.folder, ROOM_BYTES):
                self.full, self._back_at = False, time.monotonic()
                self._log("disk_has_room")
                self._say("there is room on disk again: going on")
        return not self.full

    def wait(self) -> None:
        """Return when there is room."""
        while not self.there():
            time.sleep(0.2)


def _fits(folder: Path, n: int) -> bool:
    """Whether `n` bytes can be had in the folder: they are reserved, and given back."""
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
