"""Summarize a run's log (events.jsonl): the progress, rate and failures of its last start."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from hover_batch.cohort.events import stream_events

RATE_WINDOW_S = 600.0
"""Length in seconds of the window over which the rate is measured."""
RETRY_CAUSES = {"strike": "a process crashed or failed", "lost": "a node was lost", "memory_short": "memory ran out"}
"""Descriptions of the events after which work is retried, by event."""


@dataclass(frozen=True)
class LoggedFailure:
    """Failure of a slide, or of an invalid row of the cohort, since the last start."""

    slide_id: str
    """Slide, or name of the row in messages."""
    row: int | None
    """Row of the cohort; None if the log does not give it."""
    stage: str
    """`Stage` in which it failed; empty if the log does not give it."""
    reason: str
    """Message of the error."""


@dataclass(frozen=True)
class Rate:
    """Rate of work."""

    per_s: float
    """Tiles or regions per second."""
    seconds: float
    """Length of the window in seconds of wall time."""
    until: datetime
    """Time at which the last of the work was done."""


class RateWindow:
    """Sliding window over the work of the last RATE_WINDOW_S seconds before the last entry.

    `begin`: time when the work began.
    """

    def __init__(self, begin: datetime) -> None:
        self._entries = deque([(begin, 0)])
        """The first entry only marks where the window begins."""

    def add(self, time: datetime, amount: int) -> None:
        """Add `amount` tiles or regions that were done at `time`, and drop entries that have left the window.

        Call it in chronological order.
        """
        self._entries.append((time, amount))
        while len(self._entries) > 2 and (time - self._entries[1][0]).total_seconds() >= RATE_WINDOW_S:
            self._entries.popleft()

    @property
    def rate(self) -> Rate | None:
        """Mean rate over the window; None if nothing was done in it or it has no duration."""
        begin, _ = self._entries[0]
        end, _ = self._entries[-1]
        seconds = (end - begin).total_seconds()
        amount = sum(amount for _, amount in list(self._entries)[1:])
        return Rate(amount / seconds, seconds, end) if seconds > 0 and amount > 0 else None


@dataclass
class RunLog:
    """Summary of events.jsonl since the last start. Times are UTC."""

    started: datetime | None = None
    """Time of the last start; None if the log has none."""
    last: datetime | None = None
    """Time of the last event."""
    finished: datetime | None = None
    """Time when the last start ended; None if it has not."""
    failures: list[tuple[LoggedFailure, datetime]] = field(default_factory=list)
    """Failures and their times."""
    slides_done: int = 0
    """Number of slides finished since the last start."""
    last_slide: datetime | None = None
    """Time when the last slide was finished."""
    stopped: bool = False
    """Whether the last start ended before its cohort was done: by Ctrl-C, or because the disk was full."""
    surveyed: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Number of units and tiles by slide_id, over all starts."""
    model_busy: float | None = None
    """Fraction (0 to 1) of the time in which the networks computed, logged when a start ended; None if unknown."""
    disk_full: datetime | None = None
    """Time since which the run has been waiting for disk space; None if it is not."""
    retries: Counter[str] = field(default_factory=Counter)
    """Number of events of each kind in RETRY_CAUSES."""
    nodes_and_networks: tuple[int, int] | None = None
    """Numbers of nodes and networks after the last change of the cluster; None if it has not changed."""
    upload_url: str | None = None
    """URL of the folder to which the results are uploaded; None if they stay on disk."""
    uploaded: int = 0
    """Number of slides that are there, found or uploaded since the last start."""
    _tiles: RateWindow | None = None
    _regions: RateWindow | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the summary of the log of events at `path`; it is empty if the file does not exist.

        Incomplete and corrupted lines are skipped. OSError if the file cannot be read.
        """
        log = cls()
        for event in stream_events(path):
            log.add(event)
        return log

    def add(self, event: Mapping[str, Any]) -> None:
        """Add the next event, a dictionary as `stream_events` yields it.

        Events without a valid time are ignored. For events that are malformed or of unknown kinds, only `last` is
        updated. The start of a run resets the fields that count since the last start.
        """
        if (time := to_utc(event.get("time"))) is None:
            return
        self.last = time
        match event:
            case {"event": "run_started" | "run_resumed"}:
                self.started, self.finished, self.last_slide = time, None, None
                self.failures, self.slides_done = [], 0
                self.disk_full, self.retries, self.nodes_and_networks = None, Counter(), None
                self.upload_url, self.uploaded = None, 0
                self._tiles, self._regions = RateWindow(time), RateWindow(time)
            case {"event": "run_finished" | "run_stopped" as ended}:
                self.finished, self.stopped, self.disk_full = time, ended == "run_stopped", None
                busy = event.get("model_busy")
                self.model_busy = float(busy) if isinstance(busy, int | float) else None
            case {"event": "slide_surveyed", "slide_id": str(slide_id), "units": int(units), "tiles": int(tiles)}:
                self.surveyed[slide_id] = units, tiles
            case {"event": "unit_done", "tiles": int(tiles)} if self._tiles:
                self._tiles.add(time, tiles)
            case {"event": "region_done"} if self._regions:
                self._regions.add(time, 1)
            case {"event": "disk_full"}:
                self.disk_full = time
            case {"event": "disk_has_room"}:
                self.disk_full = None
            case {"event": str(kind)} if kind in RETRY_CAUSES:
                self.retries[kind] += 1
            case {"event": "nodes_changed", "nodes": int(nodes), "networks": int(networks)}:
                self.nodes_and_networks = nodes, networks
            case {"event": "upload_started", "url": str(url)}:
                self.upload_url = url
            case {"event": "slide_uploaded"}:
                self.uploaded += 1
            case {"event": "slide_done" | "slide_estimated"}:
                self.slides_done += 1
                self.last_slide = time
            case {"event": "slide_failed", "slide_id": str(slide_id)}:
                row = event.get("row")
                stage, reason = (str(event.get(name, "")) for name in ("stage", "reason"))
                failure = LoggedFailure(slide_id, row if isinstance(row, int) else None, stage, reason)
                self.failures.append((failure, time))

    @property
    def tile_rate(self) -> Rate | None:
        """Rate of prediction in tiles per second, over the last RATE_WINDOW_S seconds before the last unit was done.

        None if the log has no start, or no tile was predicted in this time. Also None if an older version wrote the
        log, because such a log has no numbers of tiles.
        """
        return self._tiles.rate if self._tiles else None

    @property
    def region_rate(self) -> Rate | None:
        """Rate of post-processing in regions per second, over the last RATE_WINDOW_S seconds before the last region.

        None if the log has no start, or no region was post-processed since the last one.
        """
        return self._regions.rate if self._regions else None


def to_utc(time: object) -> datetime | None:
    """Return `time`, an ISO 8601 text such as "2025-01-31T12:00:00+01:00", as a datetime in UTC.

    None if it is anything else. A time without an offset from UTC is taken as local time.
    """
    try:
        return datetime.fromisoformat(str(time)).astimezone(UTC)
    except ValueError:
        return None
