"""How a command speaks on stderr while it works: in lines for people, or in lines of JSON for schedulers."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import StrEnum


class LogFormat(StrEnum):
    text = "text"
    json = "json"


def json_line(level: str, message: str, **fields: object) -> str:
    """One JSON object: `time` (UTC), `level` (info, warning or error), `message` and whatever else there is to say."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "level": level, "message": message, **fields}, default=str)
