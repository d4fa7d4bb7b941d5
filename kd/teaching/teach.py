"""Run a teacher once over the training images, and store its outputs in a cache.

The teacher computes in float32 on all machines, so that its outputs do not depend on the hardware's precision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from hover_batch.cohort.run_lock import locked
from hover_batch.config import EngineSettings, InferSettings
from hover_batch.errors import InputError
from hover_batch.executor.map_tasks import TaskFailed, map_tasks, task_resources
from hover_batch.model.card import Card
from hover_batch.model.package import find_package
from hover_batch.progress import ProgressCounter
from kd.data.datasets import Sample, folds_of, read_data, taxonomy_of
from kd.data.pixel_size import check_pixel_size
from kd.teaching.teacher_cache import TeacherCache
from kd.teaching.tta import VIEWS, averaged

if TYPE_CHECKING:
    from hover_batch.model.predict import Predictor

TILES_A_TASK = 16
"""Number of tiles from which on no more images are added to a task."""
THREADS = 4
"""Threads of each teacher on the CPU with Ray, which may run several teachers."""
LOCK = ".lock"
"""Name of the file in the folder of the outputs that a run locks while it writes."""
NOTIFY_EVERY_S = 10.0
"""Shortest interval between progress lines, in seconds."""


@dataclass(frozen=True)
class Teaching:
    """Settings that all tasks share."""

    data: Path
    """Annotated images."""
    teacher: Path
    """Package of the teacher."""
    cache: Path
    """Folder of the outputs."""
    sources: tuple[str, ...] | None
    """Sources to use; None: all."""
    infer: InferSettings
    """Batch size, precision, threads and device of the teacher."""
    tta: int
    """Number of views to average over: 8, or 1 for none."""


@dataclass(frozen=True)
class Lesson:
    """Task with a few images of one fold. It holds their indices, so that no pixels are sent between processes."""

    teaching: Teaching
    """Settings that all tasks share."""
    fold: str
    """Fold of the images."""
    indices: tuple[int, ...]
    """Indices of the images in the fold."""


def teach(
    data: Path,
    teacher: str,
    cache: Path,
    folds: Sequence[str],
    sources: Sequence[str] | None = None,
    *,
    batch: int = 4,
    tta: int = 1,
    engine: EngineSettings,
    notify: Callable[[str], None],
) -> TeacherCache:
    """Store a teacher's output for every image of some folds and sources in a cache, and return the cache.

    Intact outputs are used; all others are deleted and computed again, so an interrupted run resumes. Only one run at a
    time may write to a cache, whose folder is created if it is missing. With the backend local, the teacher runs in
    this process: torch's number of threads is set for a CPU, and TF32 is switched off in cuDNN for a GPU.

    `data`, `folds`, `sources`: annotated images (see `read_data`). `teacher`: name or path of the package (see
    `find_package`). `cache`: folder of the outputs. `batch`: tiles per batch. `tta`: 8 to average over the rotations
    and flips of each image, else 1. `engine`: settings of the backend. `notify`: called with lines about the progress.

    Raises InputError if `tta` is not 1 or 8, the data cannot be read or has no image of a fold, the teacher is for
    other classes or another pixel size or is not a HoVerNet system, `cache` cannot be created, holds other outputs or
    is written by another run, or the backend's resources are not available; PackageError if the teacher cannot be
    loaded or its output is not finite; HoverBatchError if Ray does not start; OSError if an output cannot be written.
    The first task that fails ends the run with its error; the outputs stored so far remain.
    """
    if tta not in (1, len(VIEWS)):
        raise InputError(f"--tta {tta}: must be 1, or {len(VIEWS)} for the rotations and flips of an image")
    package = find_package(teacher, "--teacher")
    check_pixel_size(package.card, f"--teacher {teacher}")
    if package.card.system != "hover":
        raise InputError(
            f"--teacher {teacher}: is a network of {package.card.system}, from which students cannot be distilled; "
            "give one with HoVerNet's outputs"
        )
    teacher_taxonomy, data_taxonomy = package.card.taxonomy, taxonomy_of(data)
    if teacher_taxonomy.classes != data_taxonomy.classes:
        names, wanted = (", ".join(c.name for c in t.classes) for t in (teacher_taxonomy, data_taxonomy))
        raise InputError(
            f"--teacher {teacher}: its classes are those of {teacher_taxonomy.name}, but the data's are those of "
            f"{data_taxonomy.name} ({names} against {wanted}); give a teacher with the data's classes, or other "
            "--classes to `hover-batch kd prepare`"
        )
    outputs = TeacherCache.create(cache, package, tta)
    with locked(cache / LOCK, "-o"), task_resources(engine, cache / "ray.log") as resources:
        on_gpu = resources.gpus > 0
        if engine.backend == "ray":
            device = "cuda" if on_gpu else "cpu"
            threads = 0 if on_gpu else min(THREADS, resources.cpus)
        else:
            device = "cpu" if engine.gpus == 0 else "auto"
            threads = 0 if on_gpu else engine.cpus
        infer = InferSettings(batch=batch, precision="fp32", threads=threads, device=device)
        # Processes of a cluster may have another working directory.
        teaching = Teaching(
            data=data.resolve(),
            teacher=package.path.resolve(),
            cache=cache.resolve(),
            sources=None if sources is None else tuple(sources),
            infer=infer,
            tta=tta,
        )
        progress = ProgressCounter("images")
        results = map_tasks(
            run_lesson,
            _lessons(teaching, folds, outputs, package.card, progress, notify),
            backend=engine.backend,
            cpus=max(1, threads),
            gpus=int(on_gpu),
            at_once=resources.gpus or max(1, resources.cpus // max(1, threads)),
            reuse_workers=True,
        )
        notified_at = time.monotonic()
        for lesson, result in results:
            if isinstance(result, TaskFailed):
                raise result.error
            progress.advance(len(lesson.indices))
            if (now := time.monotonic()) - notified_at >= NOTIFY_EVERY_S:
                notified_at = now
                notify(f"  {progress.line}")
    notify(f"{progress.done} images done, {progress.done_now} of them now")
    return outputs


def _lessons(
    teaching: Teaching,
    folds: Sequence[str],
    cache: TeacherCache,
    card: Card,
    progress: ProgressCounter,
    notify: Callable[[str], None],
) -> Iterator[Lesson]:
    """Yield the remaining tasks, fold by fold; an image that occurs twice is done once."""
    seen: set[str] = set()
    for fold in folds:
        samples = _samples(teaching, fold)
        new = {s.image_sha256: i for i, s in enumerate(samples) if s.image_sha256 not in seen}
        seen |= new.keys()
        left = [i for i in new.values() if not cache.has_intact(samples[i])]
        progress.expect(len(new), len(new) - len(left))
        notify(f"fold {fold}: {len(new)} images, {len(new) - len(left)} of them done before")
        while left:
            indices, tiles = [], 0
            while left and tiles < TILES_A_TASK:
                indices.append(left.pop(0))
                height, width = samples[indices[-1]].image.shape[:2]
                tiles += -(-height // card.tile_out) * -(-width // card.tile_out)
            yield Lesson(teaching, fold, tuple(indices))


def run_lesson(lesson: Lesson) -> None:
    """Compute and store the outputs of the teacher for the images of one task. Intact outputs are kept.

    Outputs that are not intact are deleted first (see `TeacherCache.has_intact`). Data and teacher are loaded once per
    process, and stay in memory. In this process, torch's number of threads is set for a CPU, and TF32 is switched off
    in cuDNN for a GPU.

    `lesson`: the task.

    Raises InputError if the data or the cache cannot be read, PackageError if the teacher cannot be loaded or its
    output is not finite, OSError if an output cannot be deleted or written.
    """
    from hover_batch.model.images import image_logits

    cache = TeacherCache.open(lesson.teaching.cache)
    of_fold = _samples(lesson.teaching, lesson.fold)
    # A crashed worker may have stored some of the outputs.
    samples = [of_fold[i] for i in lesson.indices if not cache.has_intact(of_fold[i])]
    predictor = _predictor(lesson.teaching)
    logits_of = partial(image_logits, predictor)
    images = [s.image for s in samples]
    n_types = len(predictor.card.taxonomy.classes)
    outputs = logits_of(images) if lesson.teaching.tta == 1 else averaged(logits_of, images, n_types)
    for sample, logits in zip(samples, outputs, strict=True):
        cache.write(sample, logits)


@lru_cache(maxsize=1)
def _samples(teaching: Teaching, fold: str) -> list[Sample]:
    """Read the images of a fold, once per process."""
    samples = read_data(teaching.data, [fold], teaching.sources).samples
    if not samples:
        of = f" of {', '.join(teaching.sources)}" if teaching.sources else ""
        folds = ", ".join(folds_of(teaching.data))
        raise InputError(
            f"--fold {fold}: {teaching.data} has no image of this fold{of}; give one of its folds, {folds}"
        )
    return samples


@lru_cache(maxsize=1)
def _predictor(teaching: Teaching) -> Predictor:
    """Load the teacher, once per process."""
    from hover_batch.model.predict import load_predictor

    return load_predictor(find_package(str(teaching.teacher), "--teacher"), teaching.infer)
