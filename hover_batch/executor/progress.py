"""Progress of a cohort on stderr: bars on a terminal, plain lines elsewhere, or lines of JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hover_batch.cohort.record import Stage
from hover_batch.cohort.run_folder import estimate_line
from hover_batch.formatting import duration, plain_console
from hover_batch.logs import LogFormat, json_line
from hover_batch.progress import ProgressCounter

LINE_EVERY_S = 10.0
"""Lower bound of the interval between plain progress lines, which is a twentieth of the time that the run has taken."""
MAX_LINE_EVERY_S = 600.0
"""Upper bound of the interval between progress lines."""


class CohortProgress:
    """Progress of a run's slides, and of the tiles and regions of the slides that have begun.

    It is shown on stderr: as lines of JSON if `log_format` is json, otherwise as bars on a terminal, and as lines of
    text elsewhere. Use it as a context manager, which restores the terminal, and from one thread, except `say`, `warn`
    and `show_uploads`. `slides`: number of slides in all.
    """

    def __init__(self, slides: int, log_format: LogFormat = LogFormat.text) -> None:
        self._console = plain_console(file=sys.stderr)
        self._json = log_format is LogFormat.json
        self._slides = slides
        self._finished = 0
        self._uploads: tuple[int, int] | None = None
        """Numbers of slides that are uploaded, and of those that are done; None if nothing is uploaded."""
        self._counts = {
            Stage.INFER: ProgressCounter("inference: tiles"),
            Stage.POST: ProgressCounter("post-processing: regions"),
        }
        self._began = self._printed = time.monotonic()
        self._bars: Progress | None = None
        self._upload_bar: TaskID | None = None
        if self._console.is_interactive and not self._json:  # a terminal that can redraw
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
            self._stage_bars = {
                stage: self._bars.add_task(count.name, total=None, rate="") for stage, count in self._counts.items()
            }

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, line: str, level: str = "info", **fields: object) -> None:
        """Print a line on stderr that stays on the screen.

        If the log format is json, the line is a JSON object, with `level` (info, warning or error) and `fields` as
        keys. Otherwise these are not shown.
        """
        self._console.print(json_line(level, line.strip(), **fields) if self._json else line, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Print `line` on stderr as a warning; see `say`."""
        self.say(line, "warning")

    def expect(self, tiles: int, regions: int, tiles_before: int = 0, regions_before: int = 0) -> None:
        """Add a slide's tiles and regions to the totals; negative numbers remove them.

        `tiles`, `regions`: numbers in all. `tiles_before`, `regions_before`: how many of them an earlier start of the
        run has done.
        """
        self._counts[Stage.INFER].expect(tiles, tiles_before)
        self._counts[Stage.POST].expect(regions, regions_before)
        self._show()

    def add_tiles(self, n: int) -> None:
        """Count `n` more tiles as predicted, and show the progress."""
        self._counts[Stage.INFER].advance(n)
        self._show()

    def add_regions(self, n: int) -> None:
        """Count `n` more regions as post-processed, and show the progress."""
        self._counts[Stage.POST].advance(n)
        self._show()

    def show_uploads(self, uploaded: int, done: int) -> None:
        """Show that `uploaded` of the `done` finished slides are in cloud storage.

        On a terminal, a bar is updated at once. Otherwise, the numbers are part of the next progress line.
        """
        self._uploads = uploaded, done
        if self._bars:
            if self._upload_bar is None:
                self._upload_bar = self._bars.add_task("upload: slides", rate="")
            self._bars.update(self._upload_bar, total=done, completed=uploaded)

    def _show(self) -> None:
        if self._bars:
            for stage, count in self._counts.items():
                rate = f"{count.rate:.1f}/s" if count.total else ""
                self._bars.update(self._stage_bars[stage], total=count.total, completed=count.done, rate=rate)
            return
        now = time.monotonic()
        if now - self._printed >= min(MAX_LINE_EVERY_S, max(LINE_EVERY_S, (now - self._began) / 20)):
            self._printed = now
            tiles, regions = self._counts.values()
            uploads = " · uploaded {}/{}".format(*self._uploads) if self._uploads else ""
            self.say(
                f"  slides {self._finished}/{self._slides} · {tiles.line} · {regions.line}{uploads}",
                event="progress",
                slides=[self._finished, self._slides],
                tiles=[tiles.done, tiles.total],
                regions=[regions.done, regions.total],
                tiles_per_second=round(tiles.rate, 2),
                uploaded=list(self._uploads) if self._uploads else None,
            )

    def count_done(self, slide_id: str, nuclei: int, seconds: float) -> None:
        """Count a slide as finished, and print its result.

        `nuclei`: number of nuclei of the slide. `seconds`: time that the slide took.
        """
        line = f"{slide_id}: {nuclei:,} nuclei in {duration(seconds)}"
        self._finish(line, event="slide_done", slide_id=slide_id, nuclei=nuclei, seconds=round(seconds, 2))

    def count_estimated(self, slide_id: str, estimate: Mapping[str, Any], seconds: float) -> None:
        """Count a slide as finished, and print its estimated density.

        `estimate`: section `estimate` of estimate.json. `seconds`: time that the slide took.
        """
        line = f"{slide_id}: {estimate_line(estimate)}, in {duration(seconds)}"
        self._finish(line, event="slide_estimated", slide_id=slide_id, estimate=estimate, seconds=round(seconds, 2))

    def count_skipped(self, slide_id: str) -> None:
        """Count a slide as finished, and print that an earlier start of the run completed it."""
        self._finish(f"{slide_id}: done before", event="slide_skipped", slide_id=slide_id)

    def count_failed(self, slide_id: str, reason: str) -> None:
        """Count a slide as finished, and print that it failed for `reason`, a message for the user."""
        line = f"{slide_id}: FAILED: {reason}"
        self._finish(line, "error", event="slide_failed", slide_id=slide_id, reason=reason)

    def _finish(self, line: str, level: str = "info", **fields: object) -> None:
        self._finished += 1
        if self._bars:
            self._bars.update(self._cohort_bar, advance=1)
        self.say(f"[{self._finished}/{self._slides}] {line}", level, **fields)
