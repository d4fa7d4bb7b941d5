"""The log of a run's changes of state: one JSON object a line, only ever appended to."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class EventLog:
    """Appends to `path`. Every line but the last is whole: a last line torn by a kill is cut off on opening."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  (closed by close())
        self._guard = threading.Lock()
        self._file.seek(0)
        self._file.truncate(_whole_lines(self._file.read()))

    def append(self, event: str, **values: Any) -> None:
        """One line: `time` (UTC, ISO 8601), `event`, then `values` in the order given."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, **values}) + "\n"
        # Unbuffered and in one call, so that a kill of the process loses nothing that was appended.
        with self._guard:
            self._file.write(line.encode())

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events, oldest first; a torn last line is passed over. No file, no events."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in data[: _whole_lines(data)].splitlines()]


def _whole_lines(data: bytes) -> int:
    """Length of `data` up to its last line end."""
    return data.rfind(b"\n") + 1
