"""Count the progress of long work."""

from __future__ import annotations

import time

from hover_batch.formatting import duration


class ProgressCounter:
    """Items done of a total that may grow while the work goes on.

    `done` includes items that an earlier start did; the rate counts only those of this process.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.total = self.done = 0
        self._before = 0
        self._started: float | None = None

    def expect(self, total: int, before: int = 0) -> None:
        """Add `total` items, of which `before` are done already. The clock starts at the first call."""
        if self._started is None:
            self._started = time.monotonic()
        self.total += total
        self.done += before
        self._before += before

    def advance(self, items: int = 1) -> None:
        """Count more items as done."""
        self.done += items

    @property
    def done_now(self) -> int:
        """Items that this process did."""
        return self.done - self._before

    @property
    def rate(self) -> float:
        """Items a second since the clock started."""
        elapsed = 0.0 if self._started is None else time.monotonic() - self._started
        return self.done_now / max(1e-6, elapsed)

    @property
    def line(self) -> str:
        """`NAME DONE/TOTAL`, with the rate and the time left where they are known."""
        words, rate = f"{self.name} {self.done}/{self.total}", self.rate
        if rate > 0 and self.done < self.total:
            words += f", {rate:.1f}/s, {duration((self.total - self.done) / rate)} left"
        return words
