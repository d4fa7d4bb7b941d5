"""Record what happens to slides, in the run's ledger and on the progress bars, in the same way for every executor."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.ledger import Ledger
from hover_batch.cohort.record import SlideRecord, Stage
from hover_batch.cohort.run_folder import slide_if_done
from hover_batch.config import Settings
from hover_batch.errors import HoverBatchError, PackageError, SlideQuarantined, TooManyFailures, file_fault
from hover_batch.executor.disk_space import is_disk_full
from hover_batch.executor.progress import CohortProgress
from hover_batch.pipeline import discard_predictions, discard_sample
from hover_batch.plan import PlannedSlide
from hover_batch.seconds import Seconds
from hover_batch.slide.tiles import Unit


class RunRecorder:
    """Recorder of one run's events in its ledger and on the progress display. Use it from one thread.

    `settings`: settings of the run. `ledger`: must be started. `run_keys`: run key of each slide by slide_id. Methods
    that write raise OSError if a file cannot be written; events are dropped if the disk is full.
    """

    def __init__(
        self, settings: Settings, ledger: Ledger, progress: CohortProgress, run_keys: Mapping[str, str]
    ) -> None:
        self.progress = progress
        self.layout = ledger.layout
        self.networks = 1
        """Largest number of networks that the run had at once, which the executor sets; `model_busy` is their mean."""
        self.on_done: Callable[[str], None] = lambda slide_id: None
        """Function that is called with the slide_id of each slide that is done, those of earlier starts included."""
        self._ledger = ledger
        self._settings = settings
        self._run_keys = run_keys
        self._model = Seconds()
        self._started: dict[str, float] = {}
        self._shown: dict[str, tuple[str, ...]] = {}
        """Warnings that were shown when a slide began."""
        self._left: dict[str, list[int]] = {}
        """Tiles and regions still to be done, by slide."""

    def log_event(self, event: str, **values: Any) -> None:
        """Append an event to the run's log, events.jsonl; it is dropped if the disk is full.

        `event`: name of the event. `values`: its JSON values by name. OSError if the log cannot be written although the
        disk is not full.
        """
        self._ledger.events.append(event, **values)

    def fail_unreadable(self, record: SlideRecord, reason: str) -> None:
        """Record that a slide failed in the stage open, because its header cannot be read.

        `record`: row of the slide in the cohort. `reason`: message for the user.

        TooManyFailures if more slides failed than the settings allow, OSError if the log cannot be written.
        """
        self._failed(record, Stage.OPEN, reason)

    def skip_done(self, slide: PlannedSlide) -> bool:
        """Return whether to skip the slide, because an earlier start with the same run key finished it.

        If so, count it as finished, call `on_done`, and remove the files of its sample and, if the settings say so, its
        predictions. With --stop-at, also skip a slide whose density is already estimated precisely enough: count it as
        finished, keep its files and do not call `on_done`.

        OSError if a file cannot be read or removed. Errors of `on_done` propagate.
        """
        slide_id, sample = slide.record.slide_id, self._settings.sample
        key = self._run_keys[slide_id]
        if self._ledger.is_done(slide_id, key):
            # Discarding may be a new setting, or the earlier start may have died before it.
            self._discard_files(slide_id)
            self.on_done(slide_id)
        elif not (sample.stop_at and self._ledger.is_estimated(slide_id, key, sample.of, sample.stop_at)):
            return False
        self.progress.count_skipped(slide_id)
        return True

    def skip_quarantined(self, slide: PlannedSlide, *, retry: bool) -> bool:
        """Return whether to skip the slide, because an earlier start with the same run key quarantined it.

        If so, record it as failed. `retry`: if True, end the quarantine instead and return False.

        TooManyFailures if more slides failed than the settings allow; OSError if quarantine.json cannot be read or
        removed, or the log cannot be written.
        """
        record = slide.record
        quarantined = self._ledger.quarantined(record.slide_id, self._run_keys[record.slide_id])
        if quarantined is None:
            return False
        if retry:
            self._ledger.end_quarantine(record.slide_id)
            return False
        stage, reason = quarantined
        self._failed(record, stage, f"{reason} (quarantined by an earlier start; --retry-failed tries it again)")
        return True

    def was_begun(self, slide: PlannedSlide) -> bool:
        """Return whether the folder of `slide` exists, which means that an earlier start of the run has begun it."""
        return self._ledger.layout.slide(slide.record.slide_id).folder.exists()

    def begin(self, slide: PlannedSlide) -> SlideLayout:
        """Open the slide's folder, record the start and show the slide's warnings. Return the paths of the slide.

        Unfinished work with the same run key stays; other work is removed, and so is an existing slide.json or
        estimate.json. A table whose size differs from that in slide.json is renamed, with a warning. Call it only if
        `skip_done` is False for the slide.

        OSError if the folder or the log cannot be written.
        """
        slide_id = slide.record.slide_id
        self._started[slide_id] = time.monotonic()
        self._keep_changed_table(slide_id)
        layout = self._ledger.open_slide(slide_id, self._run_keys[slide_id])
        self.log_event("slide_started", slide_id=slide_id)
        self._shown[slide_id] = slide.info.warnings
        for warning in slide.info.warnings:
            self.progress.warn(f"{slide_id}: {warning}")
        return layout

    def _keep_changed_table(self, slide_id: str) -> None:
        """Rename the table of nuclei, with a warning, if its size differs from that in slide.json.

        A table that was renamed before is replaced.
        """
        layout = self._ledger.layout.slide(slide_id)
        stored, table = slide_if_done(layout), layout.nuclei_parquet
        if stored is None or not table.is_file() or stored.get("nuclei_bytes") in (None, table.stat().st_size):
            return
        kept = table.with_name("nuclei.changed.parquet")
        table.replace(kept)
        self.progress.warn(
            f"{slide_id}: its nuclei.parquet was changed after the run; it is kept as {kept}, and the table is written "
            "again"
        )

    def record_survey(self, slide_id: str, units: Sequence[Unit], inferred: Iterable[Unit], posted: int) -> None:
        """Log the numbers of a slide's units and tiles, and add its tiles and regions to the progress.

        `units`: units of the slide, or clusters of its sample; each has one region. `inferred`: those that earlier
        starts predicted. `posted`: number of regions that earlier starts post-processed.

        OSError if the log cannot be written.
        """
        tiles = sum(len(u.tile_cells) for u in units)
        self.log_event("slide_surveyed", slide_id=slide_id, tiles=tiles, units=len(units))
        tiles_before = sum(len(u.tile_cells) for u in inferred)
        self.progress.expect(tiles, len(units), tiles_before, posted)
        self._left[slide_id] = [tiles - tiles_before, len(units) - posted]

    def record_unit(self, slide_id: str, unit: Unit, seconds: Seconds) -> None:
        """Log that a unit's maps are in the store, with the seconds by stage, and add its time to `model_busy`.

        Its tiles are not added to the progress, since the executor has already done so. Call `record_survey` for the
        slide first.

        `slide_id`: slide of the unit. `unit`: the unit. `seconds`: times of the unit by stage. If the stage infer is
        missing, the maps were already stored, and the event says that no tile was predicted.

        OSError if the log cannot be written.
        """
        self.add_network_time(seconds)
        self._left[slide_id][0] -= len(unit.tile_cells)
        predicted = len(unit.tile_cells) if Stage.INFER in seconds.spans else 0
        self._timed_event("unit_done", slide_id, unit, seconds, tiles=predicted)

    def add_network_time(self, seconds: Seconds) -> None:
        """Add the time that a network computed for a unit to `model_busy`.

        The time counts even if the slide of the unit has failed since.

        `seconds`: times of the unit by stage; ignored if the stage infer is missing.
        """
        if Stage.INFER in seconds.spans:
            self._model.add(seconds)

    def record_region(self, slide_id: str, unit: Unit, seconds: Seconds) -> None:
        """Log that the nuclei of a region are on disk, and add the region to the progress.

        Call `record_survey` for the slide first.

        `slide_id`: slide of the region. `unit`: unit of the region. `seconds`: times of the region by stage.

        OSError if the log cannot be written.
        """
        self._left[slide_id][1] -= 1
        self._timed_event("region_done", slide_id, unit, seconds)
        self.progress.add_regions(1)

    def _timed_event(self, event: str, slide_id: str, unit: Unit, seconds: Seconds, **values: int) -> None:
        self.log_event(
            event,
            slide_id=slide_id,
            column=unit.column,
            row=unit.row,
            **values,
            seconds={stage: round(value, 3) for stage, value in seconds.totals.items()},
            spans={stage: [round(at, 3) for at in span] for stage, span in seconds.spans.items()},
        )

    @property
    def model_busy(self) -> float | None:
        """Fraction (0 to 1) of the time in which networks computed, from the first to the last prediction.

        It is the mean over all networks (see `networks`). None if nothing was predicted since the run was last started.
        """
        if Stage.INFER not in self._model.spans:
            return None
        started, ended = self._model.spans[Stage.INFER]
        return min(1.0, self._model.totals[Stage.INFER] / (self.networks * max(1e-9, ended - started)))

    def finish_slide(self, slide_id: str, values: Mapping[str, Any]) -> None:
        """Write slide.json or, if only the density is estimated, estimate.json, and count the slide as finished.

        Warnings that arose since the slide began are shown. After slide.json is written, the files of the slide's
        sample and, if the settings say so, its predictions are removed, and `on_done` is called. After estimate.json is
        written, all files stay.

        `values`: result of `hover_batch.sampled.finish`.

        OSError if a file cannot be written, or the sample's table cannot be removed. Errors of `on_done` propagate.
        """
        key, seconds = self._run_keys[slide_id], time.monotonic() - self._started[slide_id]
        estimate = values.get("estimate")
        if estimate:
            self._ledger.write_estimate_json(slide_id, key, values)
        else:
            self._ledger.write_slide_json(slide_id, key, values)
        del self._left[slide_id], self._started[slide_id]
        for warning in values["warnings"]:
            if warning not in self._shown[slide_id]:
                self.progress.warn(f"{slide_id}: {warning}")
        if estimate:
            self.progress.count_estimated(slide_id, estimate, seconds)
            return
        self._discard_files(slide_id)
        self.progress.count_done(slide_id, values["nuclei"], seconds)
        self.on_done(slide_id)

    def _discard_files(self, slide_id: str) -> None:
        """Remove what a whole slide does not need: its sample and, if the settings say so, its predictions."""
        slide = self.layout.slide(slide_id)
        discard_sample(slide)
        if self._settings.output.discard_predictions:
            discard_predictions(slide)

    def withdraw(self, slide: PlannedSlide) -> None:
        """Subtract the tiles and regions of `slide` that are not done from the totals of the progress.

        Call it if the slide has failed or will start again.
        """
        tiles, regions = self._left.pop(slide.record.slide_id, [0, 0])
        self.progress.expect(-tiles, -regions)

    def fail(self, slide: PlannedSlide, stage: Stage, error: Exception, trace: str | None = None) -> None:
        """Record that the slide failed at `stage`, and quarantine it if `error` is a SlideQuarantined.

        The slide's unfinished tiles and regions are removed from the progress. If the error is not a HoverBatchError,
        its traceback is logged.

        `trace`: traceback of the error, if another process raised it; None to use the traceback of `error`.

        PackageError if `error` is one, since it is not caused by the slide: then nothing is recorded. TooManyFailures
        if more slides failed than the settings allow. OSError if the log or quarantine.json cannot be written; a full
        disk is ignored for both.
        """
        record = slide.record
        if isinstance(error, PackageError):
            raise error
        expected = isinstance(error, HoverBatchError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.filename is not None:
            reason = file_fault(error)
        if isinstance(error, SlideQuarantined):
            try:
                self._ledger.quarantine(record.slide_id, self._run_keys[record.slide_id], stage, reason)
            except OSError as write_error:
                # On a full disk, the run goes on without the quarantine: the next start tries the slide again.
                if not is_disk_full(write_error):
                    raise
        self.withdraw(slide)
        if not expected:
            trace = trace or "".join(traceback.format_exception(error))
            self.log_event("traceback", slide_id=record.slide_id, text=trace)
        self._failed(record, stage, reason)

    def _failed(self, record: SlideRecord, stage: str, reason: str) -> None:
        self._ledger.record_failure(record.slide_id, record.row, record.path, stage, reason)
        self.progress.count_failed(record.slide_id, reason)
        allowed, failed = self._settings.engine.max_failures, len(self._ledger.failures())
        if 0 <= allowed < failed:
            raise TooManyFailures(
                f"{failed} slides failed, more than --max-failures {allowed}: stopped. See the reasons in "
                f"{self.layout.failures_csv}, then run the same command again: it resumes, nothing done is lost"
            )
