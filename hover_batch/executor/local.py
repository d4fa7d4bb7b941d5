"""The reference executor: one process, one slide after the other, all units of a slide and then all its regions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from hover_batch.executor.disk_space import is_disk_full
from hover_batch.executor.interrupts import on_ctrl_c
from hover_batch.executor.run_recorder import CohortBooks, Load
from hover_batch.model.predict import Predictor, load_predictor
from hover_batch.pipeline import Seconds, finalize, infer, inferred, post, posted, reading
from hover_batch.plan import PlannedSlide
from hover_batch.slide_work import opened, survey, swept_store


class LocalExecutor:
    """Runs a cohort in this process. The model is loaded, by `load`, when the first tile needs it."""

    def __init__(self, books: CohortBooks, load: Load = load_predictor) -> None:
        self.books = books
        self.load = load
        self._stage = "open"
        self._interrupted = False

    @cached_property
    def predictor(self) -> Predictor:
        return self.load(self.books.package, self.books.settings.infer)

    def run(self, slides: Sequence[PlannedSlide]) -> None:
        """Every slide to its end, into the ledger. One that fails costs itself only.

        Raises PackageError where the model cannot be loaded: that stops the cohort and blames no slide.
        """
        with on_ctrl_c(self._interrupt):
            for slide in slides:
                while not self._ended(slide):
                    self.books.room.wait()

    def _ended(self, slide: PlannedSlide) -> bool:
        """Take a slide to its end, good or bad. False where the disk is full before."""
        self._stage = "open"
        try:
            self._slide(slide)
        except Exception as error:
            if is_disk_full(error):
                self.books.put_back(slide)
                self.books.room.ran_out(slide.record.slide_id, error)
                return False
            self.books.fail(slide, self._stage, error)
        return True

    def _interrupt(self) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _go_on(self) -> None:
        """KeyboardInterrupt after a Ctrl-C that did not come through: what is raised while a compiler or a destructor
        runs is lost."""
        if self._interrupted:
            raise KeyboardInterrupt

    def _advance(self, tiles: int) -> None:
        self._go_on()
        self.books.progress.tiles(tiles)

    def _slide(self, slide: PlannedSlide) -> None:
        books, slide_id = self.books, slide.record.slide_id
        layout = books.begin(slide)
        seconds = Seconds()
        with opened(slide, books.copies) as reader:
            self._stage = "tissue"
            with seconds.of("tissue"):
                work = survey(reader, slide, books.package, books.settings, layout)
            store = swept_store(work)
            there = [unit for unit in work.units if inferred(unit, work, store)]
            done = [unit for unit in work.units if posted(unit, work)]
            books.surveyed(slide_id, work.units, there, len(done))

            self._stage = "inference"
            for unit in work.units:
                if unit not in there:
                    spent = infer(unit, work, reading(reader, work), self.predictor, store, self._advance)
                    seconds.add(spent)
                    books.unit_done(slide_id, unit, spent)

            self._stage = "post-processing"
            for unit in work.units:
                self._go_on()
                if unit not in done:
                    spent = post(unit, work, store)
                    seconds.add(spent)
                    books.region_done(slide_id, unit, spent)

            self._go_on()
            self._stage = "tables"
            books.end(slide_id, finalize(work, reader, seconds))
