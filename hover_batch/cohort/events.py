"""Append-only log of a run's changes of state, with one JSON object per line."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from hover_batch.errors import DISK_FULL
from hover_batch.files import naming

_BLOCK = 1 << 16


class EventLog:
    """Log of events in the file `path`; thread-safe.

    An incomplete last line, left when a process was killed, is removed on opening. OSError if the file cannot be
    opened.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  (closed by close())
        self._guard = threading.Lock()
        self._file.truncate(_end_of_whole_lines(self._file))

    def append(self, event: str, **values: Any) -> None:
        """Append one line of JSON with `time` (UTC, ISO 8601), `event` and `values`, in this order.

        If the disk is full, the event is dropped, because a run that waits for space must not end.

        `event`: name of the event. `values`: its JSON values by name.

        OSError if the write fails although the disk is not full, ValueError after `close`, TypeError if a value is not
        JSON.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, **values}) + "\n"
        content = line.encode()
        # Unbuffered and in one call, so that killing the process loses no appended line.
        with self._guard:
            end = self._file.seek(0, os.SEEK_END)
            try:
                with naming(Path(self._file.name)):
                    complete = self._file.write(content) == len(content)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                complete = False
            if not complete:
                self._file.truncate(end)

    def close(self) -> None:
        """Close the log file; no event can be appended afterwards."""
        self._file.close()


def stream_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of the log at `path`, oldest first, as dictionaries with `time`, `event` and the event's values.

    If the file does not exist, nothing is yielded. Another process may append events at the same time. Incomplete and
    corrupted lines are skipped.

    OSError if the file cannot be read.
    """
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
    """Return the offset after the last line end.

    It is searched from the end, since logs of large cohorts have gigabytes.
    """
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - _BLOCK)
        file.seek(begin)
        if (found := file.read(end - begin).rfind(b"\n")) >= 0:
            return begin + found + 1
        end = begin
    return 0
