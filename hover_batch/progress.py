"""Count the progress of long work."""

from __future__ import annotations

import time

from hover_batch.formatting import duration


class ProgressCounter:
    """Counter of items done out of a total, which may grow during the work.

    `name`: what is counted, for `line`. `done` includes items of an earlier start; the rate counts only items that this
    process has done. Use it from one thread.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.total = self.done = 0
        self._before = 0
        self._started: float | None = None

    def expect(self, total: int, before: int = 0) -> None:
        """Add `total` items to the total. The clock of `rate` starts at the first call.

        `before`: number of these items that an earlier start has done. Negative numbers remove items.
        """
        if self._started is None:
            self._started = time.monotonic()
        self.total += total
        self.done += before
        self._before += before

    def advance(self, items: int = 1) -> None:
        """Count `items` more items as done."""
        self.done += items

    @property
    def done_now(self) -> int:
        """Number of items done by this process."""
        return self.done - self._before

    @property
    def rate(self) -> float:
        """Items per second that this process has done since the first call of `expect`; 0 before it."""
        elapsed = 0.0 if self._started is None else time.monotonic() - self._started
        return self.done_now / max(1e-6, elapsed)

    @property
    def line(self) -> str:
        """Progress as text, such as `tiles 30/100, 2.5/s, 28 s left`.

        Rate and time left are included only if this process has done items and some remain.
        """
        text = f"{self.name} {self.done}/{self.total}"
        rate = self.rate
        if rate > 0 and self.done < self.total:
            text += f", {rate:.{1 if rate >= 0.1 else 3}f}/s, {duration((self.total - self.done) / rate)} left"
        return text
