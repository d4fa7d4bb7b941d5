"""What runs in Ray's processes: thin shells over `hover_batch.pipeline`, each in a process that may die alone.

The network lives in an actor. It has its blocks read by tasks on its own node, so that a crash in libopenslide kills
a reader and not the model. Ray retries nothing: whoever calls decides. Import this after `cluster` has been entered.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import ray
import zarr
from numpy.typing import NDArray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    UnserializableException,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.config import InferSettings, Settings
from hover_batch.executor.resources import BLOCKS_AHEAD
from hover_batch.executor.run_recorder import Load
from hover_batch.executor.slide_state import Surveyed
from hover_batch.geometry import Box, Grid
from hover_batch.model.package import Package
from hover_batch.pipeline import (
    ReadBlocks,
    Seconds,
    UnitsMissing,
    finalize,
    infer,
    inferred,
    post,
    posted,
)
from hover_batch.plan import PlannedSlide
from hover_batch.slide.reader import SlideReader, open_slide
from hover_batch.slide.staging import Copies
from hover_batch.slide_work import SlideWork, open_store, opened, survey, swept_store

if TYPE_CHECKING:  # it brings torch, which readers and post-processing do without
    from hover_batch.model.predict import Predictor

BLOCKS_A_TASK = 4
"""Blocks that one reading task takes: 4 × 1024² pixels are some tenths of a second, so that Ray's few milliseconds a
task do not show."""


class ReaderDied(Exception):
    """The process that read the slide's pixels died: a crash in a native library, as a rule."""


class MachineLost(Exception):
    """The machine is gone on which the slide's pixels were read: no fault of theirs."""


def hold_threads() -> None:
    """Keep the libraries that would take every core to the one core that a task reserves; and let it see no GPU.

    OpenMP and BLAS follow OMP_NUM_THREADS, which Ray sets to what is reserved; OpenCV and zarr do not.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _hold_libraries()


def _hold_libraries() -> None:
    cv2.setNumThreads(1)
    zarr.config.set({"threading.max_workers": 1})


_cached: tuple[tuple[SlideRecord, str], SlideReader] | None = None


def _reader(record: SlideRecord, fingerprint: str) -> SlideReader:
    """The slide, open; the last one that this process read is kept, since the next task will likely be of it."""
    global _cached
    if _cached is None or _cached[0] != (record, fingerprint):
        _forget_reader()
        _cached = (record, fingerprint), open_slide(record)
    return _cached[1]


def _forget_reader() -> None:
    global _cached
    if _cached is not None:
        _cached[1].close()
        _cached = None


def _copies(layout: SlideLayout, settings: Settings) -> Copies:
    return Copies.of_run(layout.root, settings.engine.scratch)


@ray.remote(num_cpus=1, max_retries=0)
def survey_slide(slide: PlannedSlide, package: Package, settings: Settings, layout: SlideLayout) -> Surveyed:
    """Find the tissue, and what an earlier run left. Call it while nobody writes the slide's store."""
    hold_threads()
    seconds = Seconds()
    with seconds.of("tissue"), opened(slide, _copies(layout, settings)) as reader:
        work = survey(reader, slide, package, settings, layout)
    store = swept_store(work)
    numbered = list(enumerate(work.units))
    return Surveyed(
        work,
        tuple(i for i, unit in numbered if inferred(unit, work, store)),
        tuple(i for i, unit in numbered if posted(unit, work)),
        seconds,
    )


@ray.remote(num_cpus=1, max_retries=0)
def read_blocks(
    record: SlideRecord, fingerprint: str, copies: Copies, grid: Grid, boxes: list[Box]
) -> tuple[list[NDArray[np.uint8]], Seconds]:
    """RGB (h, w, 3) of each box."""
    hold_threads()
    seconds = Seconds()
    try:
        with copies.staged(record, fingerprint) as here:
            reader = _reader(here, fingerprint)
            with seconds.of("read"):
                return [reader.read(box, grid) for box in boxes], seconds
    except BaseException:
        _forget_reader()  # OpenSlide answers nothing more after an error
        raise


@ray.remote(num_cpus=1, max_retries=0)
def post_region(work: SlideWork, index: int) -> Seconds | UnitsMissing:
    """Post-process the region of one unit; or name the units that it needs, too."""
    hold_threads()
    try:
        return post(work.units[index], work, open_store(work))
    except UnitsMissing as missing:
        return missing


@ray.remote(num_cpus=1, max_retries=0)
def finalize_slide(work: SlideWork, seconds: Seconds) -> dict[str, Any] | UnitsMissing:
    """Tables and pictures; or the units of which this machine does not see all results yet."""
    hold_threads()
    try:
        with opened(work, _copies(work.layout, work.settings)) as reader:
            return finalize(work, reader, seconds)
    except UnitsMissing as missing:
        return missing


@ray.remote(max_restarts=0, max_task_retries=0)
class InferActor:
    """One network on its GPU, or on its share of the CPU, fed by several threads that take turns at it."""

    def __init__(self, package: Package, settings: InferSettings, load: Load) -> None:
        self.package = package
        self.settings = settings
        self.load = load
        self.predictor: Predictor
        # Elsewhere where this node is busy: a network must never wait for cores that others hold.
        self._here = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True, _spill_on_unavailable=True
        )

    def where(self) -> str:
        """The id of the machine."""
        return ray.get_runtime_context().get_node_id()

    def start(self) -> None:
        """Load the weights; once, before any unit."""
        _hold_libraries()
        self.predictor = self.load(self.package, self.settings)

    def infer(self, work: SlideWork, index: int) -> Seconds:
        """Predict one unit into the slide's store. ReaderDied where its pixels killed their reader, MachineLost where
        that was not their doing, MemoryError where it was killed for want of memory."""
        return infer(work.units[index], work, self._reading(work), self.predictor, open_store(work), lambda _: None)

    def _reading(self, work: SlideWork) -> ReadBlocks:
        def read(boxes: list[Box], seconds: Seconds) -> Iterator[NDArray[np.uint8]]:
            groups = deque(boxes[i : i + BLOCKS_A_TASK] for i in range(0, len(boxes), BLOCKS_A_TASK))
            ahead: deque[Any] = deque()
            task = read_blocks.options(scheduling_strategy=self._here)
            copies = _copies(work.layout, work.settings)
            while groups or ahead:
                while groups and len(ahead) < BLOCKS_AHEAD // BLOCKS_A_TASK:
                    ahead.append(task.remote(work.record, work.info.fingerprint, copies, work.grid, groups.popleft()))
                images, spent = _result(ahead.popleft())
                seconds.add(spent)
                yield from images

        return read


def _result(reading: Any) -> tuple[list[NDArray[np.uint8]], Seconds]:
    try:
        found: tuple[list[NDArray[np.uint8]], Seconds] = ray.get(reading)
        return found
    except RayTaskError as error:
        raise error.cause from None
    except UnserializableException as error:
        raise RuntimeError(str(error)) from None
    except OutOfDiskError as error:
        raise OSError(errno.ENOSPC, str(error)) from None
    except (NodeDiedError, ObjectLostError) as error:
        raise MachineLost(type(error).__name__) from None
    except OutOfMemoryError as error:
        raise MemoryError(str(error)) from None
    except RayError as error:
        raise ReaderDied(type(error).__name__) from None
