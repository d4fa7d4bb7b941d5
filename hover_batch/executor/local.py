"""The reference executor: one process, one slide after the other, all units of a slide and then all its regions."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from functools import cached_property

from hover_batch.cohort.ledger import Ledger
from hover_batch.cohort.record import SlideRecord
from hover_batch.config import Settings
from hover_batch.errors import DISK_FULL, HoverBatchError, PackageError
from hover_batch.executor.progress import CohortProgress
from hover_batch.model.package import Package, load_network
from hover_batch.model.predict import Predictor
from hover_batch.pipeline import (
    Seconds,
    discard_predictions,
    finalize,
    infer,
    inferred,
    open_store,
    post,
    posted,
    result_key,
    survey,
)
from hover_batch.slide.reader import open_slide


class LocalExecutor:
    """Runs a cohort in this process. The model is loaded when the first tile needs it."""

    def __init__(self, package: Package, settings: Settings, ledger: Ledger, progress: CohortProgress) -> None:
        self.package = package
        self.settings = settings
        self.ledger = ledger
        self.progress = progress
        self._stage = "open"

    @cached_property
    def predictor(self) -> Predictor:
        return Predictor(load_network(self.package), self.package.card, self.settings.infer)

    def run(self, records: Sequence[SlideRecord]) -> None:
        """Every slide to its end, into the ledger. One that fails costs itself only.

        Raises HoverBatchError where the disk is full, PackageError where the model cannot be loaded: these stop the
        cohort and blame no slide.
        """
        for record in records:
            self._stage = "open"
            try:
                self._slide(record)
            except PackageError:
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise HoverBatchError(
                        f"no space left on disk at {record.slide_id}; free some and run the same command again"
                    ) from error
                expected = isinstance(error, HoverBatchError)
                reason = str(error) if expected else f"{type(error).__name__}: {error}"
                self.ledger.record_failure(record.slide_id, record.row, record.path, self._stage, reason)
                if not expected:
                    self.ledger.events.append("traceback", slide_id=record.slide_id, text=traceback.format_exc())
                self.progress.slide_failed(record.slide_id, reason)

    def _slide(self, record: SlideRecord) -> None:
        started, seconds = time.monotonic(), Seconds()
        events, progress = self.ledger.events, self.progress
        with open_slide(record) as reader:
            key = result_key(record, reader.info, self.package, self.settings)
            slide_id = record.slide_id
            if self.ledger.slide_done(slide_id, key):
                # Asked for since, or the run that wrote the table died before.
                if self.settings.output.discard_predictions:
                    discard_predictions(self.ledger.layout.slide(slide_id))
                progress.slide_skipped(slide_id)
                return
            layout = self.ledger.open_slide(slide_id, key)
            events.append("slide_started", slide_id=slide_id)
            for warning in reader.info.warnings:
                progress.say(f"{slide_id}: {warning}")

            self._stage = "tissue"
            with seconds.of("tissue"):
                work = survey(reader, record, self.package, self.settings, layout)
            store = open_store(work)

            self._stage = "inference"
            progress.start_stage(slide_id, "inference, tiles", sum(len(u.tiles) for u in work.units))
            for unit in work.units:
                if inferred(unit, work, store):
                    progress.advance(len(unit.tiles))
                    continue
                seconds.add(infer(unit, work, reader, self.predictor, store, progress.advance))
                events.append("unit_done", slide_id=slide_id, column=unit.column, row=unit.row)

            self._stage = "post-processing"
            progress.start_stage(slide_id, "post-processing, regions", len(work.units))
            for unit in work.units:
                if not posted(unit, work):
                    seconds.add(post(unit, work, store))
                progress.advance(1)

            self._stage = "tables"
            values = finalize(work, reader, seconds)
            self.ledger.write_slide_json(slide_id, key, values)
            if self.settings.output.discard_predictions:
                discard_predictions(layout)
        progress.slide_done(slide_id, values["nuclei"], time.monotonic() - started)
