"""Wall time of a slide's work, by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from hover_batch.cohort.record import Stage


class Seconds:
    """Wall time by stage, in seconds."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        """Sum of all measured blocks, by stage."""
        self.spans: dict[str, tuple[float, float]] = {}
        """Start of the first block and end of the last one, by stage, in seconds since 1970, so that they can be
        compared between processes."""

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Measure the wall time of the block, and add it to `stage`, even if the block raises an exception."""
        started, clock = time.time(), time.monotonic()
        try:
            yield
        finally:
            self.add_span(stage, time.monotonic() - clock, (started, time.time()))

    def add(self, other: Seconds) -> None:
        """Add the totals of `other`, and extend each span to include the one in `other`."""
        for stage, seconds in other.totals.items():
            self.add_span(stage, seconds, other.spans[stage])

    def add_span(self, stage: str, seconds: float, span: tuple[float, float]) -> None:
        """Add `seconds` of work to `stage`, and extend its span to include `span`.

        `span`: start and end of the work, in seconds since 1970.
        """
        self.totals[stage] = self.totals.get(stage, 0.0) + seconds
        first, last = self.spans.get(stage, span)
        self.spans[stage] = min(first, span[0]), max(last, span[1])
