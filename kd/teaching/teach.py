"""The teacher runs once: its output for every image, kept in a cache from which students learn.

A cache is a folder: teacher.json (whose outputs these are) and for each image, known by the hash of its pixels, a zarr
v3 array IMAGE[:2]/IMAGE.zarr, (channel, y, x) float16 as `hover_batch.model.heads` lays out. Its attributes hold the
hash of its bytes; it takes its name when it is whole. The teacher computes in float32 on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.config import EngineSettings, InferSettings
from hover_batch.errors import InputError, PackageError
from hover_batch.executor.map_tasks import TaskFailed, machines, map_tasks
from hover_batch.model.heads import Heads
from hover_batch.model.package import Card, Package, find_package
from hover_batch.taxonomy import Taxonomy
from kd.data.datasets import Sample, folds_of, read_data, taxonomy_of
from kd.data.pixel_size import check_pixel_size

if TYPE_CHECKING:
    from hover_batch.model.predict import Predictor

FORMAT = "hover-batch teacher cache 1"
CHUNK = 256
"""Side in pixels of what is compressed as one; a file holds a whole image."""
TILES_A_TASK = 16
THREADS = 4
"""Of a teacher on the CPU, where Ray runs several."""
SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class TeacherCache:
    """The outputs of one teacher.

    `taxonomy`: its classes. `sha256`: of its package (`Package.sha256`). `card`: its card, as JSON.
    """

    path: Path
    taxonomy: Taxonomy
    sha256: str
    card: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> TeacherCache:
        """Open what `kd teach` has written. InputError where it is no cache."""
        try:
            about = json.loads((path / "teacher.json").read_bytes())
            if about["format"] != FORMAT:
                raise ValueError(f"it is of the format {about['format']}, not {FORMAT}")
            return cls(path, Card.from_json(about["card"]).taxonomy, about["sha256"], about["card"])
        except FileNotFoundError:
            reason = "it has no teacher.json"
        except (OSError, ValueError, KeyError, TypeError, PackageError) as error:
            reason = f"its teacher.json cannot be read: {error}"
        raise InputError(f"{path}: no outputs of a teacher ({reason}); `hover-batch kd teach` writes a folder of them")

    @classmethod
    def create(cls, path: Path, teacher: Package) -> TeacherCache:
        """Begin a cache, or open the one that is there. InputError where it is another teacher's."""
        if not (path / "teacher.json").exists():
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"-o {path}: {error.strerror}; give a folder that can be written") from error
            about = {"format": FORMAT, "sha256": teacher.sha256, "card": teacher.card.to_json()}
            temporary = path / ".teacher.json.partial"
            temporary.write_text(json.dumps(about, indent=2) + "\n", "utf-8")
            os.replace(temporary, path / "teacher.json")
        cache = cls.open(path)
        if cache.sha256 != teacher.sha256:
            raise InputError(
                f"-o {path}: holds the outputs of another teacher, {cache.card['name']} (sha256 {cache.sha256[:12]}…), "
                f"not of {teacher.card.name} ({teacher.sha256[:12]}…); give another folder, or delete this one"
            )
        return cache

    def logits(self, sample: Sample) -> NDArray[np.float16]:
        """The teacher's output (channel, y, x) float16 for the whole image, as `hover_batch.model.heads` lays out.

        InputError where there is none, or it is not what was written.
        """
        path = self._array(sample)
        if not self.covers(sample):
            raise InputError(
                f"{self.path}: no output for the image {sample.id} of {sample.source}; run `hover-batch kd teach` on "
                "these images first"
            )
        import zarr

        try:
            array = zarr.open_array(path, mode="r")
            logits = np.asarray(array[:])
            expected = (Heads(len(self.taxonomy.classes)).channels, *sample.image.shape[:2])
            if logits.shape != expected or logits.dtype != np.float16:
                raise ValueError(f"it is {logits.dtype} {logits.shape}, not float16 {expected}")
            if array.attrs["teacher_sha256"] != self.sha256:
                raise ValueError("it is another teacher's")
            if array.attrs["sha256"] != _sha256(logits):
                raise ValueError("its bytes are not those that were written")
        except Exception as error:  # a damaged file raises whatever zarr, zstd or JSON think fit
            raise InputError(f"{path}: corrupt ({error}); delete it and run `hover-batch kd teach` again") from error
        return logits

    def covers(self, sample: Sample) -> bool:
        """Whether there is an output for this image, sound or not."""
        return self._array(sample).is_dir()

    def has(self, sample: Sample) -> bool:
        """Whether the output for this image is there and sound; one that is not is deleted."""
        if not self.covers(sample):
            return False
        try:
            self.logits(sample)
        except InputError:
            shutil.rmtree(self._array(sample))
            return False
        return True

    def keep(self, sample: Sample, logits: NDArray[np.floating[Any]]) -> None:
        """Keep the output (channel, y, x) for an image of which there is none yet. PackageError where it is not finite.

        float16 reaches to 65504: what lies beyond, which no softmax tells apart, is cut there.
        """
        import zarr
        from zarr.codecs import ZstdCodec

        if not np.isfinite(logits).all():
            raise PackageError(f"--teacher {self.card['name']}: its output for the image {sample.id} is not finite")
        limit = float(np.finfo(np.float16).max)
        halves = logits.clip(-limit, limit).astype(np.float16)
        path = self._array(sample)
        temporary = path.with_name(f".{path.name}.partial")  # of a killed run, too: the next one takes its place
        path.parent.mkdir(exist_ok=True)
        channels, height, width = halves.shape
        array = zarr.create_array(
            temporary,
            shape=halves.shape,
            shards=(channels, -(-height // CHUNK) * CHUNK, -(-width // CHUNK) * CHUNK),
            chunks=(channels, CHUNK, CHUNK),
            dtype="float16",
            compressors=ZstdCodec(level=1),
            attributes={"sha256": _sha256(halves), "teacher_sha256": self.sha256},
            dimension_names=("channel", "y", "x"),
            zarr_format=3,
            overwrite=True,
        )
        array[:] = halves
        os.replace(temporary, path)

    def _array(self, sample: Sample) -> Path:
        return self.path / sample.image_sha256[:2] / f"{sample.image_sha256}.zarr"


def _sha256(logits: NDArray[np.float16]) -> str:
    return hashlib.sha256(np.ascontiguousarray(logits, "<f2").tobytes()).hexdigest()


@dataclass(frozen=True)
class Teaching:
    """What all tasks share: which images, which teacher, where its outputs go, and how it computes."""

    data: Path
    teacher: Path
    cache: Path
    sources: tuple[str, ...] | None
    infer: InferSettings


@dataclass(frozen=True)
class Lesson:
    """A few images of a fold, by their places in it: a task's message holds no pixels."""

    teaching: Teaching
    fold: str
    places: tuple[int, ...]


def teach(
    data: Path,
    teacher: str,
    cache: Path,
    folds: Sequence[str],
    sources: Sequence[str] | None = None,
    *,
    batch: int = 4,
    engine: EngineSettings,
    say: Callable[[str], None],
) -> TeacherCache:
    """Keep the teacher's output for every image of the folds in `cache`, or go on with what lies there.

    Sound outputs are not made again, corrupt ones are. One run at a time writes a cache. Raises InputError and
    PackageError; whatever is raised, what is kept stays.
    """
    if teacher != "starter" and not Path(teacher).exists():
        raise PackageError(
            f"--teacher {teacher}: no such package; `hover-batch models import` makes one of a published checkpoint"
        )
    package = find_package(teacher, "--teacher")
    check_pixel_size(package.card, f"--teacher {teacher}")
    theirs, ours = package.card.taxonomy, taxonomy_of(data)
    if theirs.classes != ours.classes:
        raise InputError(
            f"--teacher {teacher}: its classes are those of {theirs.name}, the data's those of {ours.name}, "
            "and no student could learn both; take a teacher of the data's classes, or other --classes in "
            "`hover-batch kd prepare`"
        )
    kept = TeacherCache.create(cache, package)
    with machines(engine, cache / "ray.log") as found:
        on_gpu, ray = found.gpus > 0, engine.backend == "ray"
        threads = 0 if on_gpu else min(THREADS, found.cpus) if ray else engine.cpus
        device = ("cuda" if on_gpu else "cpu") if ray else "cpu" if engine.gpus == 0 else "auto"
        infer = InferSettings(batch=batch, precision="fp32", threads=threads, device=device)
        # A cluster's processes may start in other folders than this one.
        teaching = Teaching(
            data=data.resolve(),
            teacher=package.path.resolve(),
            cache=cache.resolve(),
            sources=None if sources is None else tuple(sources),
            infer=infer,
        )
        progress = _Progress(say)
        results = map_tasks(
            take,
            _lessons(teaching, folds, kept, package.card, progress),
            backend=engine.backend,
            cpus=max(1, threads),
            gpus=int(on_gpu),
            at_once=found.gpus or max(1, found.cpus // max(1, threads)),
            stay=True,
        )
        for lesson, result in results:
            if isinstance(result, TaskFailed):
                raise result.error
            progress.advance(len(lesson.places))
    progress.close()
    return kept


def _lessons(
    teaching: Teaching, folds: Sequence[str], cache: TeacherCache, card: Card, progress: _Progress
) -> Iterator[Lesson]:
    """What is left to do, fold by fold; an image that comes twice is taught once."""
    seen: set[str] = set()
    for fold in folds:
        samples = _samples(teaching, fold)
        new = {s.image_sha256: i for i, s in enumerate(samples) if s.image_sha256 not in seen}
        seen |= new.keys()
        left = [i for i in new.values() if not cache.has(samples[i])]
        progress.expect(fold, len(new), len(new) - len(left))
        while left:
            some, tiles = [], 0
            while left and tiles < TILES_A_TASK:
                some.append(left.pop(0))
                height, width = samples[some[-1]].image.shape[:2]
                tiles += -(-height // card.tile_out) * -(-width // card.tile_out)
            yield Lesson(teaching, fold, tuple(some))


def take(lesson: Lesson) -> None:
    """One task: the teacher's outputs for a few images, kept."""
    from hover_batch.model.images import image_logits

    cache = TeacherCache.open(lesson.teaching.cache)
    samples = [_samples(lesson.teaching, lesson.fold)[i] for i in lesson.places]
    samples = [s for s in samples if not cache.has(s)]  # a process that died may have kept some
    outputs = image_logits(_predictor(lesson.teaching), [s.image for s in samples])
    for sample, logits in zip(samples, outputs, strict=True):
        cache.keep(sample, logits)


@lru_cache(maxsize=1)
def _samples(teaching: Teaching, fold: str) -> list[Sample]:
    """The images of a fold, read once by each process."""
    samples = read_data(teaching.data, [fold], teaching.sources).samples
    if not samples:
        of = f" of {', '.join(teaching.sources)}" if teaching.sources else ""
        there = ", ".join(folds_of(teaching.data))
        raise InputError(f"--fold {fold}: {teaching.data} has no such image{of}; it has {there}")
    return samples


@lru_cache(maxsize=1)
def _predictor(teaching: Teaching) -> Predictor:
    """The teacher, loaded once by each process."""
    from hover_batch.model.predict import load_predictor

    return load_predictor(find_package(str(teaching.teacher), "--teacher"), teaching.infer)


class _Progress:
    """Plain lines: how many images are taught, how fast, how long still."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._total = self._done = self._before = 0
        self._started = self._said = time.monotonic()

    def expect(self, fold: str, images: int, before: int) -> None:
        if not self._total:
            self._started = time.monotonic()
        self._total, self._done, self._before = self._total + images, self._done + before, self._before + before
        self._say(f"fold {fold}: {images} images, {before} of them taught before")

    def advance(self, images: int) -> None:
        self._done += images
        if (now := time.monotonic()) - self._said >= SAY_EVERY_S:
            self._said = now
            each = (now - self._started) / (self._done - self._before)
            left = each * (self._total - self._done)
            self._say(f"  {self._done}/{self._total} images, {each:.2g} s each, {left / 60:.1f} min left")

    def close(self) -> None:
        self._say(f"{self._done} images taught, {self._done - self._before} of them now")
