"""The log of a run's changes of state: one JSON object a line, only ever appended to."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from hover_batch.errors import DISK_FULL

_BLOCK = 1 << 16


class EventLog:
    """Appends to `path`. Every line but the last is whole: a last line torn by a kill is cut off on opening."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  (closed by close())
        self._guard = threading.Lock()
        self._file.truncate(_end_of_whole_lines(self._file))

    def append(self, event: str, **values: Any) -> None:
        """One line: `time` (UTC, ISO 8601), `event`, then `values` in the order given. Where the disk is full it is
        left out: a run waits for room, and its log is not worth its end."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, **values}) + "\n"
        # Unbuffered and in one call, so that a kill of the process loses nothing that was appended.
        with self._guard:
            end = self._file.seek(0, os.SEEK_END)
            try:
                whole = self._file.write(line.encode()) == len(line.encode())
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                whole = False
            if not whole:
                self._file.truncate(end)

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events, oldest first; see `stream_events`."""
    return list(stream_events(path))


def stream_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events one by one, oldest first: a log may have hundreds of thousands, and grow while it is read. A torn last
    line is passed over, and so is what a power cut made of a line. No file, no events."""
    try:
        file = open(path, "rb")  # noqa: SIM115  (closed below)
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event


def _end_of_whole_lines(file: BinaryIO) -> int:
    """Where the last line end is over; looked for from the end, for the log of a large cohort has gigabytes."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - _BLOCK)
        file.seek(begin)
        if (found := file.read(end - begin).rfind(b"\n")) >= 0:
            return begin + found + 1
        end = begin
    return 0
