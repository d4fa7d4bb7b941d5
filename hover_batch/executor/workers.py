"""Tasks and the actor that run in Ray's processes: thin wrappers of `hover_batch.pipeline`.

A network lives in an actor and has its blocks read by tasks on its own node, so that a crash in libopenslide kills a
reader, not the model. Ray itself retries nothing; `RayExecutor` does. This module imports Ray, so it must be
imported inside `cluster.started` or `cluster.joined`, which set Ray's environment.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import ray
import zarr
from numpy.typing import NDArray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hover_batch.blocks import ReadBlocks
from hover_batch.cohort.layout import SlideLayout
from hover_batch.cohort.record import SlideRecord, Stage
from hover_batch.config import InferSettings, Settings
from hover_batch.executor.faults import cause_of
from hover_batch.executor.protocol import LoadNetwork
from hover_batch.executor.resources import BLOCKS_AHEAD
from hover_batch.executor.slide_state import Surveyed
from hover_batch.geometry import Box, Grid
from hover_batch.model.package import Package
from hover_batch.pipeline import infer, is_post_processed, post, verify_unit
from hover_batch.plan import PlannedSlide
from hover_batch.sampled import finish, next_work
from hover_batch.seconds import Seconds
from hover_batch.slide.reader import SlideReader, open_slide
from hover_batch.slide.staging import Copies
from hover_batch.slide_work import SlideWork, open_store, open_swept_store, opened, survey

if TYPE_CHECKING:  # it brings torch, which readers and post-processing do without
    from hover_batch.model.predict import Predictor

BLOCKS_PER_TASK = 4
"""Blocks of 1024² pixels that one task reads: some tenths of a second, to which Ray adds a few milliseconds."""


def limit_threads() -> None:
    """Limit OpenCV and zarr in this process to one thread, for the core that a task reserves, and hide the GPUs.

    OpenMP and BLAS follow OMP_NUM_THREADS, which Ray sets to the number of reserved cores; OpenCV and zarr do not. To
    hide the GPUs, CUDA_VISIBLE_DEVICES in os.environ is set to "". All of this stays set.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _limit_libraries()


def _limit_libraries() -> None:
    cv2.setNumThreads(1)
    zarr.config.set({"threading.max_workers": 1})


_cached: tuple[tuple[SlideRecord, str], SlideReader] | None = None


def _reader(record: SlideRecord, fingerprint: str) -> SlideReader:
    """Return a reader of the slide. The last one stays open, since the next task is likely to read it again."""
    global _cached
    if _cached is None or _cached[0] != (record, fingerprint):
        _close_reader()
        _cached = (record, fingerprint), open_slide(record)
    return _cached[1]


def _close_reader() -> None:
    global _cached
    if _cached is not None:
        _cached[1].close()
        _cached = None


def _copies(layout: SlideLayout, settings: Settings) -> Copies:
    return Copies.of_run(layout.root, settings.engine.scratch)


@ray.remote(num_cpus=1, max_retries=0)
def survey_slide(slide: PlannedSlide, package: Package, settings: Settings, layout: SlideLayout) -> Surveyed:
    """Find a slide's tissue and units, or draw the clusters of its next look, and find out which of them are done.

    survey.json and, for a sample, clusters.json are written, and the store is created if there is none. Corrupted units
    and leftovers of killed writes are removed from it, so nothing else may write to the slide at the same time. A slide
    in cloud storage is copied to this machine. Threads are limited and GPUs hidden in this process (see
    `limit_threads`).

    `slide`: slide as planned. `package`: package of the model. `settings`: settings in effect. `layout`: paths of the
    slide's results, opened by `Ledger.open_slide`.

    InputError if the pixel size is unknown, or a slide in cloud storage does not exist or access to it is denied.
    SlideError if the slide, its mask, or the results of the run that stored its maps cannot be used. ScratchFull if
    there is no space for its copy. OSError if a file cannot be read or written; errors of zarr if the store is
    corrupted.
    """
    limit_threads()
    seconds = Seconds()
    with seconds.measure(Stage.SURVEY), opened(slide, _copies(layout, settings)) as reader:
        work = next_work(survey(reader, slide, package, settings, layout), reader)
    store = open_swept_store(work)
    numbered = list(enumerate(work.units))
    return Surveyed(
        work,
        tuple(i for i, unit in numbered if verify_unit(unit, work, store)),
        tuple(i for i, unit in numbered if is_post_processed(unit, work)),
        seconds,
    )


@ray.remote(num_cpus=1, max_retries=0)
def read_blocks(
    record: SlideRecord, fingerprint: str, copies: Copies, grid: Grid, boxes: list[Box]
) -> tuple[list[NDArray[np.uint8]], Seconds]:
    """Read boxes of a slide. Return the pixels of each, RGB (y, x, 3) uint8, in order, and the seconds by stage.

    A slide in cloud storage is copied to this machine first. The slide stays open in this process for the next call;
    after an error, it is closed. Threads are limited and GPUs hidden in this process (see `limit_threads`).

    `record`: row of the slide in the cohort. `fingerprint`: fingerprint of the slide, which a copy must have. `copies`:
    the run's copies on this machine. `grid`: inference grid of the slide. `boxes`: in inference pixels of `grid`.

    InputError or SlideError if the slide cannot be read, ScratchFull if there is no space for its copy.
    """
    limit_threads()
    seconds = Seconds()
    try:
        with copies.staged(record, fingerprint) as here:
            reader = _reader(here, fingerprint)
            with seconds.measure(Stage.READ):
                return [reader.read(box, grid) for box in boxes], seconds
    except BaseException:
        _close_reader()  # after an error OpenSlide fails every further read
        raise


@ray.remote(num_cpus=1, max_retries=0)
def post_region(work: SlideWork, index: int) -> Seconds:
    """Post-process the region of the unit `work.units[index]`, and write its nuclei. Return the seconds by stage.

    Threads are limited and GPUs hidden in this process (see `limit_threads`).

    UnitsMissing if it needs units that are not predicted, or whose results are not visible on this node. SlideError if
    another run has taken over the slide's folder, or a shard is corrupted. OSError if the part cannot be written;
    errors of zarr if the store is corrupted.
    """
    limit_threads()
    return post(work.units[index], work, open_store(work))


@ray.remote(num_cpus=1, max_retries=0)
def finalize_slide(work: SlideWork, seconds: Seconds) -> dict[str, Any] | None:
    """Write the tables and pictures of a slide or of its estimate. Return the content of slide.json or estimate.json.

    The caller writes that file. If the density is not estimated precisely enough, the result is None, and another look
    is needed. Threads are limited and GPUs hidden in this process (see `limit_threads`).

    `work`: slide, or clusters of a look, whose units are all done. `seconds`: times of the slide's earlier stages.

    UnitsMissing if results of units are not visible on this node. InputError or SlideError if the slide cannot be read,
    SlideError if another run has taken over its folder or two regions hold the same nucleus. ScratchFull if there is no
    space for its copy, OSError if a file cannot be written.
    """
    limit_threads()
    with opened(work, _copies(work.layout, work.settings)) as reader:
        return finish(work, reader, seconds)


@ray.remote(max_restarts=0, max_task_retries=0)
class InferActor:
    """Actor with one network, on its GPU or on its share of the CPU.

    `load`: function that loads the network from `package` with `settings`. Methods may be called from several threads,
    which read and write units at once and take turns at the network.
    """

    def __init__(self, package: Package, settings: InferSettings, load: LoadNetwork) -> None:
        self.package = package
        self.settings = settings
        self.load = load
        self.predictor: Predictor
        # On another node while this one is busy: a network must never wait for cores that others hold.
        self._prefer_here = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True, _spill_on_unavailable=True
        )

    def where(self) -> str:
        """Return Ray's id of the node on which the actor runs."""
        return ray.get_runtime_context().get_node_id()

    def start(self) -> None:
        """Load the network; call this once, before any unit.

        OpenCV and zarr are limited to one thread in this process. On the CPU, torch's number of threads is set, too.

        PackageError if the weights cannot be loaded or the network cannot be compiled, InputError if the device cannot
        be used.
        """
        _limit_libraries()
        self.predictor = self.load(self.package, self.settings)

    def infer(self, work: SlideWork, index: int) -> Seconds:
        """Run the network on the unit `work.units[index]`, and store its maps. Return the seconds by stage.

        Pixels are read by tasks in other processes (see `read_blocks`). If the maps are stored already, they are not
        predicted again.

        WorkerDied if a process that reads pixels died, ScratchFull if there is no space for the slide's copy,
        NetworkFailed if the network raises an exception. InputError or SlideError if the slide cannot be read,
        SlideError if another run has taken over its folder. OSError if a file cannot be written; errors of zarr if the
        store is corrupted.
        """
        return infer(work.units[index], work, self._reading(work), self.predictor, open_store(work), lambda _: None)

    def _reading(self, work: SlideWork) -> ReadBlocks:
        def read(boxes: list[Box], seconds: Seconds) -> Iterator[NDArray[np.uint8]]:
            groups = deque(boxes[i : i + BLOCKS_PER_TASK] for i in range(0, len(boxes), BLOCKS_PER_TASK))
            ahead: deque[Any] = deque()
            task = read_blocks.options(scheduling_strategy=self._prefer_here)
            copies = _copies(work.layout, work.settings)
            while groups or ahead:
                while groups and len(ahead) < BLOCKS_AHEAD // BLOCKS_PER_TASK:
                    ahead.append(task.remote(work.record, work.info.fingerprint, copies, work.grid, groups.popleft()))
                try:
                    images, spent = ray.get(ahead.popleft())
                except RayError as error:
                    raise cause_of(error, "its reader") from None
                seconds.add(spent)
                yield from images

        return read
