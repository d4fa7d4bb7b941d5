"""Format of the messages on stderr: text for people, or lines of JSON for schedulers."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import StrEnum


class LogFormat(StrEnum):
    """Format of the messages on stderr."""

    text = "text"
    json = "json"


def json_line(level: str, message: str, **fields: object) -> str:
    """Return a message as one line of JSON, without a line end.

    Its keys are `time` (UTC, ISO 8601), `level`, `message`, and the names in `fields`. Values that JSON does not
    support become text. `level`: info, warning or error.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "level": level, "message": message, **fields}, default=str)
