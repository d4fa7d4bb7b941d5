"""What both executors do when a slide begins, a unit is done, a slide fails or ends: the ledger and the progress.

So that they differ in where and when work is done, and in nothing that is written down.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.ledger import Ledger
from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.config import InferSettings, Settings
from hover_batch.errors import HoverBatchError, PackageError, SlideQuarantined, TooManyFailures
from hover_batch.executor.disk_space import Room, is_disk_full
from hover_batch.executor.progress import CohortProgress
from hover_batch.model.package import Package
from hover_batch.pipeline import Seconds, discard_predictions
from hover_batch.plan import PlannedSlide
from hover_batch.slide.staging import Copies
from hover_batch.slide.tiles import Unit

if TYPE_CHECKING:  # it brings torch, which readers and post-processing do without
    from hover_batch.model.predict import Predictor

Load = Callable[[Package, InferSettings], "Predictor"]
"""How an executor comes by its network: `hover_batch.model.predict.load_predictor`, unless a test puts another."""


class CohortBooks:
    """The books of one run, kept by one thread; so many `networks` are at work in it. `keys`: the run key of each
    slide_id."""

    def __init__(
        self,
        package: Package,
        settings: Settings,
        ledger: Ledger,
        progress: CohortProgress,
        keys: Mapping[str, str],
    ) -> None:
        self.package = package
        self.settings = settings
        self.ledger = ledger
        self.progress = progress
        self.room = Room(ledger.layout.root, progress.warn, ledger.events.append)
        self.networks = 1
        self.copies = Copies.of_run(ledger.layout.root, settings.engine.scratch)
        self.release: Callable[[str], None] = self.copies.release
        """Removes the copies of a slide, by its id, on all machines of the run."""
        self._copied: set[str] = set()
        self._model = Seconds()
        self._keys = keys
        self._started: dict[str, float] = {}
        self._left: dict[str, tuple[int, int]] = {}
        """Tiles and regions still to be done, by slide."""

    def refuse(self, record: SlideRecord, reason: str) -> None:
        """A slide that cannot be opened, as its header told before the run."""
        self._note(record, "open", reason)

    def done_before(self, slide: PlannedSlide) -> bool:
        """Whether an earlier run finished the slide, with the same key."""
        slide_id = slide.record.slide_id
        if not self.ledger.slide_done(slide_id, self._keys[slide_id]):
            return False
        # Asked for since, or the run that wrote the table died before.
        if self.settings.output.discard_predictions:
            discard_predictions(self.ledger.layout.slide(slide_id))
        self.progress.slide_skipped(slide_id)
        return True

    def quarantined_before(self, slide: PlannedSlide, *, retry: bool) -> bool:
        """Whether an earlier start put the slide aside, which is its failure of this start, too; with `retry` that is
        forgotten."""
        record = slide.record
        held = self.ledger.quarantined(record.slide_id, self._keys[record.slide_id])
        if held is None:
            return False
        if retry:
            self.ledger.release(record.slide_id)
            return False
        stage, reason = held
        self._note(record, stage, f"{reason} (put aside by an earlier start; --retry-failed tries it again)")
        return True

    def begin(self, slide: PlannedSlide) -> SlideLayout:
        """Open the slide's folder, with unfinished work of the same key in it."""
        slide_id = slide.record.slide_id
        self._started[slide_id] = time.monotonic()
        layout = self.ledger.open_slide(slide_id, self._keys[slide_id])
        if isinstance(slide.record.path, Url) and slide.kept is None:
            self._copied.add(slide_id)
        self.ledger.events.append("slide_started", slide_id=slide_id)
        for warning in slide.info.warnings:
            self.progress.warn(f"{slide_id}: {warning}")
        return layout

    def surveyed(self, slide_id: str, units: Sequence[Unit], inferred: Iterable[Unit], posted: int) -> None:
        """The slide's tissue is found: `units` are to be predicted and post-processed; the units `inferred`, and
        `posted` regions, were done before."""
        tiles = sum(len(u.cells) for u in units)
        self.ledger.events.append("slide_surveyed", slide_id=slide_id, tiles=tiles, units=len(units))
        before = sum(len(u.cells) for u in inferred)
        self.progress.expect(tiles, len(units), before, posted)
        self._left[slide_id] = tiles - before, len(units) - posted

    def unit_done(self, slide_id: str, unit: Unit, seconds: Seconds) -> None:
        """A unit's maps are in the store. Its tiles were told to the progress by whoever predicted them."""
        self.model_worked(seconds)
        tiles, regions = self._left[slide_id]
        self._left[slide_id] = tiles - len(unit.cells), regions
        self._log("unit_done", slide_id, unit, seconds, tiles=len(unit.cells) if "infer" in seconds.spans else 0)

    def model_worked(self, seconds: Seconds) -> None:
        """Count the time that a network took for a unit, whatever became of its slide."""
        if "infer" in seconds.spans:
            self._model.add(seconds)

    def region_done(self, slide_id: str, unit: Unit, seconds: Seconds) -> None:
        """A region's nuclei are on disk."""
        tiles, regions = self._left[slide_id]
        self._left[slide_id] = tiles, regions - 1
        self._log("region_done", slide_id, unit, seconds)
        self.progress.regions(1)

    def _log(self, event: str, slide_id: str, unit: Unit, seconds: Seconds, **more: int) -> None:
        self.ledger.events.append(
            event,
            slide_id=slide_id,
            column=unit.column,
            row=unit.row,
            **more,
            seconds={stage: round(value, 3) for stage, value in seconds.totals.items()},
            spans={stage: [round(at, 3) for at in span] for stage, span in seconds.spans.items()},
        )

    @property
    def model_busy(self) -> float | None:
        """Share of the time from the first to the last prediction in which the networks computed, over all of them;
        None where nothing was predicted."""
        if "infer" not in self._model.spans:
            return None
        started, ended = self._model.spans["infer"]
        return min(1.0, self._model.totals["infer"] / (self.networks * max(1e-9, ended - started)))

    def end(self, slide_id: str, values: Mapping[str, Any]) -> None:
        """The slide's tables and pictures are on disk: declare it done. `values` are those of `finalize`."""
        self.ledger.write_slide_json(slide_id, self._keys[slide_id], values)
        del self._left[slide_id]
        self._release(slide_id)
        if self.settings.output.discard_predictions:
            discard_predictions(self.ledger.layout.slide(slide_id))
        self.progress.slide_done(slide_id, values["nuclei"], time.monotonic() - self._started.pop(slide_id))

    def _release(self, slide_id: str) -> None:
        if slide_id in self._copied:
            self._copied.remove(slide_id)
            self.release(slide_id)

    def put_back(self, slide: PlannedSlide) -> None:
        """Expect no more of the slide: it failed, or is begun again."""
        tiles, regions = self._left.pop(slide.record.slide_id, (0, 0))
        self.progress.expect(-tiles, -regions)

    def fail(self, slide: PlannedSlide, stage: str, error: Exception, trace: str | None = None) -> None:
        """Note that the slide failed at `stage`; `trace` is where, if not here.

        Raises instead what stops the cohort and blames no slide: PackageError where the model cannot be loaded. Raises
        TooManyFailures after it where the settings allow no more.
        """
        record = slide.record
        if isinstance(error, PackageError):
            raise error
        expected = isinstance(error, HoverBatchError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        if isinstance(error, SlideQuarantined):
            try:
                self.ledger.quarantine(record.slide_id, self._keys[record.slide_id], stage, reason)
            except OSError as full:  # then the next start tries the slide again
                if not is_disk_full(full):
                    raise
        self.put_back(slide)
        self._release(record.slide_id)
        if not expected:
            text = trace or "".join(traceback.format_exception(error))
            self.ledger.events.append("traceback", slide_id=record.slide_id, text=text)
        self._note(record, stage, reason)

    def _note(self, record: SlideRecord, stage: str, reason: str) -> None:
        self.ledger.record_failure(record.slide_id, record.row, record.path, stage, reason)
        self.progress.slide_failed(record.slide_id, reason)
        most, failed = self.settings.engine.max_failures, len(self.ledger.failures())
        if 0 <= most < failed:
            raise TooManyFailures(
                f"{failed} slides failed, more than --max-failures {most}: stopped. The reasons are in "
                f"{self.ledger.layout.failures_csv}; nothing done is lost, and the same command goes on"
            )
