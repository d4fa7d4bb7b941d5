"""Reference executor: one process, one slide after the other, all units of a slide and then all its regions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from threading import Thread

from hover_batch.blocks import block_reader
from hover_batch.cohort.record import Stage
from hover_batch.executor.disk_space import is_disk_full
from hover_batch.executor.interrupts import on_interrupt, raise_interrupt
from hover_batch.executor.protocol import Executor, LoadNetwork, RunContext
from hover_batch.model.predict import Predictor, load_predictor
from hover_batch.nuclei.stitch import load_kernels
from hover_batch.nuclei.systems import splitter_of
from hover_batch.pipeline import infer, is_post_processed, post, verify_unit
from hover_batch.plan import PlannedSlide
from hover_batch.sampled import finish, next_work
from hover_batch.seconds import Seconds
from hover_batch.slide.reader import SlideReader
from hover_batch.slide_work import SlideWork, open_swept_store, opened, survey


class LocalExecutor(Executor):
    """Executor that runs a cohort in this process.

    `context`: what all slides share. `load`: function that loads the network, on its first use.
    """

    def __init__(self, context: RunContext, load: LoadNetwork = load_predictor) -> None:
        self.context = context
        self.load = load
        self._stage = Stage.OPEN
        self._interrupted = False

    @cached_property
    def predictor(self) -> Predictor:
        """Network of the run, loaded on first use. On the CPU, this sets torch's number of threads in this process.

        PackageError if its weights cannot be loaded or it cannot be compiled, InputError if the device cannot be used.
        """
        return self.load(self.context.package, self.context.settings.infer)

    def run(self, slides: Sequence[PlannedSlide]) -> None:
        """Run the slides one after the other, each until it is done or has failed.

        If the disk fills up, wait for space and then resume the slide. A failed slide is recorded, and does not stop
        the others. Call it from the main thread, which receives signals.

        PackageError if the model cannot be loaded, TooManyFailures if more slides failed than the settings allow,
        OSError if the run's records cannot be written, or the disk space cannot be checked. KeyboardInterrupt as soon
        as possible after one of `interrupts.SIGNALS`, such as Ctrl-C.
        """
        # The network computes without Python's lock: meanwhile, post-processing can be loaded.
        card, post = self.context.package.card, self.context.settings.post
        Thread(target=load_kernels, args=(card.layout, splitter_of(card, post.sobel_norm)), daemon=True).start()
        with on_interrupt(self._interrupt):
            for slide in slides:
                while not self._end(slide):
                    self.context.disk.wait()

    def _end(self, slide: PlannedSlide) -> bool:
        """Process a slide until it is done or has failed. Return False if the disk was full before that."""
        context, slide_id = self.context, slide.record.slide_id
        self._stage = Stage.OPEN
        try:
            self._process(slide)
        except Exception as error:
            if is_disk_full(error):
                context.recorder.withdraw(slide)
                context.disk.report_full(slide_id, error)
                return False
            context.recorder.fail(slide, self._stage, error)
        context.copies.release(slide_id)
        return True

    def _interrupt(self) -> None:
        self._interrupted = True
        raise_interrupt()

    def _check_interrupted(self) -> None:
        """Re-raise a KeyboardInterrupt that was swallowed, because a compiler or destructor was running."""
        if self._interrupted:
            raise KeyboardInterrupt

    def _advance(self, tiles: int) -> None:
        self._check_interrupted()
        self.context.recorder.progress.add_tiles(tiles)

    def _process(self, slide: PlannedSlide) -> None:
        context, recorder = self.context, self.context.recorder
        layout = recorder.begin(slide)
        seconds = Seconds()
        with opened(slide, context.copies) as reader:
            result = None
            while result is None:
                self._stage = Stage.SURVEY
                with seconds.measure(self._stage):
                    work = next_work(survey(reader, slide, context.package, context.settings, layout), reader)
                self._predict(work, reader, seconds)
                self._stage = Stage.FINALIZE
                result = finish(work, reader, seconds)
            recorder.finish_slide(slide.record.slide_id, result)

    def _predict(self, work: SlideWork, reader: SlideReader | None, seconds: Seconds) -> None:
        """Predict and post-process all units that earlier starts have not done, and add the times to `seconds`."""
        recorder, slide_id = self.context.recorder, work.record.slide_id
        store = open_swept_store(work)
        predicted = [unit for unit in work.units if verify_unit(unit, work, store)]
        done = [unit for unit in work.units if is_post_processed(unit, work)]
        recorder.record_survey(slide_id, work.units, predicted, len(done))

        self._stage = Stage.INFER
        for unit in work.units:
            if unit not in predicted:
                spent = infer(unit, work, block_reader(reader, work), self.predictor, store, self._advance)
                seconds.add(spent)
                recorder.record_unit(slide_id, unit, spent)

        self._stage = Stage.POST
        for unit in work.units:
            self._check_interrupted()
            if unit not in done:
                spent = post(unit, work, store)
                seconds.add(spent)
                recorder.record_region(slide_id, unit, spent)
        self._check_interrupted()
