"""Progress of a cohort on stderr: bars for the slides and the stage at hand, plain lines where no terminal is."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0
"""Seconds between two plain lines of one stage."""


class _Console(Console):
    """A console whose reader may go: rich would end the program, but the run goes on without anyone looking."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What is still in Python's buffer would be tried again at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


class CohortProgress:
    """`start_stage` and `advance` as work goes on; `slide_done` and `slide_failed` at the end of each slide."""

    def __init__(self, slides: int) -> None:
        self._console = _Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self._slides = slides
        self._finished = 0
        self._stage, self._total, self._count = "", 0, 0
        self._started = self._printed = time.monotonic()
        self._bars: Progress | None = None
        self._cohort_bar = self._stage_bar = TaskID(0)
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
            )
            self._cohort_bar = self._bars.add_task("slides", total=slides, rate="")
            self._stage_bar = self._bars.add_task("", total=1, rate="", visible=False)

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, soft_wrap=True)

    def start_stage(self, slide_id: str, stage: str, total: int) -> None:
        """`total` counts what `advance` will report: tiles, regions."""
        self._stage, self._total, self._count = f"{slide_id} · {stage}", total, 0
        self._started = self._printed = time.monotonic()
        if self._bars:
            self._bars.reset(self._stage_bar, description=self._stage, total=max(1, total), visible=True, rate="")
        else:
            self.say(f"[{self._finished + 1}/{self._slides}] {self._stage}: {total}")

    def advance(self, n: int) -> None:
        self._count += n
        now = time.monotonic()
        rate = self._count / max(1e-6, now - self._started)
        if self._bars:
            self._bars.update(self._stage_bar, advance=n, rate=f"{rate:.1f}/s")
        elif now - self._printed >= LINE_EVERY_S and self._count < self._total:
            self._printed = now
            left = (self._total - self._count) / rate
            self.say(f"  {self._stage}: {self._count}/{self._total}, {rate:.1f}/s, {_clock(left)} left")

    def slide_done(self, slide_id: str, nuclei: int, seconds: float) -> None:
        self._finish()
        self.say(f"{slide_id}: {nuclei:,} nuclei in {_clock(seconds)}")

    def slide_skipped(self, slide_id: str) -> None:
        self._finish()
        self.say(f"{slide_id}: done before")

    def slide_failed(self, slide_id: str, reason: str) -> None:
        self._finish()
        self.say(f"{slide_id}: FAILED: {reason}")

    def _finish(self) -> None:
        self._finished += 1
        if self._bars:
            self._bars.update(self._cohort_bar, advance=1)
            self._bars.update(self._stage_bar, visible=False)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d} min"
