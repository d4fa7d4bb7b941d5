"""Draw batches of random crops of annotated images.

Crop i depends only on the seed and i, so an interrupted and resumed run sees the same crops as an uninterrupted one,
with any number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hover_batch.errors import InputError
from hover_batch.taxonomy import Taxonomy
from kd.data.classes import PARTIAL
from kd.data.datasets import Sample, folds_of
from kd.teaching.teacher_cache import TeacherCache
from kd.training.augment import LABEL_MARGIN, random_view
from kd.training.config import TrainConfig
from kd.training.losses import UNKNOWN, Targets
from kd.training.systems import SYSTEMS

OUTPUTS_CACHED = 32
"""Number of whole images whose teacher output a worker caches; 1000² pixels and 9 channels take 18 MB."""
MAX_VALIDATION_CROPS = 256
"""Largest number of crops for the validation loss."""


def open_teacher(path: Path, taxonomy: Taxonomy) -> TeacherCache:
    """Open the teacher's outputs in the folder `path`, which `kd teach` wrote.

    Raises InputError if the folder is no such cache or cannot be read, or the teacher has other classes than
    `taxonomy`.
    """
    cache = TeacherCache.open(path)
    if cache.taxonomy.classes != taxonomy.classes:
        raise InputError(
            f"--teacher {path}: its classes are those of {cache.taxonomy.name}, the data's those of {taxonomy.name}; "
            "run `hover-batch kd teach` with a teacher of the data's classes"
        )
    return cache


def source_shares(config: TrainConfig, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the fraction of the crops to draw from each source. The fractions sum to 1.

    If `config` has shares, these are used, sorted by source; sources without one get no crops. Otherwise the fractions
    are proportional to the areas of the sources in pixels, in the order of the samples.

    `config`: settings of the training. `samples`: training images.

    Raises InputError if a configured source has no image, or if there are no images at all.
    """
    areas: dict[str, float] = {}
    for sample in samples:
        areas[sample.source] = areas.get(sample.source, 0.0) + sample.instances.size
    configured = dict(sorted((config.sources or {}).items()))  # crops must not depend on the order of --source
    relative = configured or areas
    for source in relative:
        if source not in areas:
            raise InputError(
                f"--source {source}: {config.data} has no training images of this source; give --source NAME=SHARE for "
                f"the sources that it has ({', '.join(sorted(areas)) or 'none'}) only, or other --data or --fold"
            )
    if not relative:
        folds = ", ".join(folds_of(config.data))
        raise InputError(
            f"--fold {' '.join(config.train_folds)}: {config.data} has no images of this fold; its folds are {folds}"
        )
    return {source: share / sum(relative.values()) for source, share in relative.items()}


class Crops(Dataset[tuple[Tensor, ...]]):
    """Dataset of `n` crops; the source, image and view of crop i depend only on the data, the settings and i.

    An item is the image (3, y, x) uint8, then np, hv and tp as in `Targets`, but without the batch axis, and with a
    teacher its output (channel, y, x) float32. Targets and output cover the central part of the image, `cut` pixels
    smaller on each side. Images that are smaller than a crop are padded by mirroring, and nothing is learned from the
    padding. `shares`: fraction of the crops from each source (see `source_shares`). `validation`: draw other crops than
    in training, without augmentation.

    Raises InputError if the teacher has no output for one of the samples.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        shares: Mapping[str, float],
        config: TrainConfig,
        cut: int,
        teacher: TeacherCache | None,
        n: int,
        validation: bool = False,
    ) -> None:
        self.samples, self.config, self.cut, self.n = samples, config, cut, n
        self.extra_seed: tuple[int, ...] = (1,) if validation else ()
        self.planes_of = SYSTEMS[config.system].planes
        self.kind = "none" if validation else config.augmentation
        by_source = {source: [i for i, s in enumerate(samples) if s.source == source] for source in shares}
        self.indices = [indices for indices in by_source.values() if indices]
        present = np.array([shares[source] for source, indices in by_source.items() if indices])
        self.shares = present / present.sum()
        # Larger images contain more distinct crops, so images are drawn in proportion to their area.
        areas = [np.array([samples[i].instances.size for i in indices], float) for indices in self.indices]
        self.image_shares = [area / area.sum() for area in areas]
        if teacher is not None and (untaught := [s for s in samples if not teacher.covers(s)]):
            raise InputError(
                f"--teacher {config.teacher}: no output for {len(untaught)} of {len(samples)} images, the first "
                f"{untaught[0].id}; run `hover-batch kd teach` on these images first"
            )
        self.output_of = None if teacher is None else lru_cache(OUTPUTS_CACHED)(lambda i: teacher.logits(samples[i]))
        self.padded = [_padded(sample, config.size) for sample in samples]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng((self.config.seed, i, *self.extra_seed))
        source = rng.choice(len(self.shares), p=self.shares)
        indices = self.indices[source]
        index = indices[rng.choice(len(indices), p=self.image_shares[source])]
        sample = self.padded[index]
        planes = None if self.output_of is None else _padded_planes(self.output_of(index), self.config.size)
        view = random_view(sample, self.config.size, rng, self.kind, planes)
        margin = LABEL_MARGIN + self.cut
        instances = _inner(view.instances, margin)
        nuclei, types = targets_of(
            instances, None if sample.types is None else _inner(view.types, margin), sample.source
        )
        item = (
            torch.from_numpy(view.image).permute(2, 0, 1),
            torch.from_numpy(nuclei),
            torch.from_numpy(np.ascontiguousarray(_inner(self.planes_of(view.instances), margin))),
            torch.from_numpy(types),
        )
        if view.planes is None:
            return item
        return (*item, torch.from_numpy(np.ascontiguousarray(_inner(view.planes, self.cut))))


def targets_of(
    instances: NDArray[np.int32], types: NDArray[np.uint8] | None, source: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the targets of the branches np and tp for one image, both (y, x) int64, with the values of `Targets`.

    Sources in PARTIAL outline only some of the nuclei, so their other pixels may be nuclei or background: np is UNKNOWN
    everywhere, and tp is known only on typed nuclei. For other sources, np is known everywhere inside the image, and tp
    on typed nuclei and on the background. Without annotated types, tp is UNKNOWN everywhere.

    `instances` (y, x) int32: nucleus ids, 0 = background, UNKNOWN outside the image. `types` (y, x) uint8: class ids, 0
    on nuclei without a class; None if types are not annotated. `source`: source of the image.
    """
    unknown = np.full(instances.shape, UNKNOWN, np.int64)
    partial = source in PARTIAL
    nuclei = unknown if partial else np.sign(instances).astype(np.int64)  # UNKNOWN is -1, and stays
    if types is None:
        return nuclei, unknown
    known = types > 0 if partial else (types > 0) | (instances == 0)
    return nuclei, np.where(known & (instances != UNKNOWN), types.astype(np.int64), UNKNOWN)


def training_crops(
    samples: Sequence[Sample], shares: Mapping[str, float], config: TrainConfig, cut: int, teacher: TeacherCache | None
) -> tuple[Crops, int]:
    """Return the crops of the whole run, in training order, and the number of steps per epoch.

    `samples`: training images. `shares`: fraction of the crops from each source (see `source_shares`). `config`:
    settings of the training. `cut`: pixels by which the network's output is smaller on each side (see `cut_of`).
    `teacher`: stored outputs of a teacher; None without distillation.

    Raises InputError if the teacher has no output for one of the samples.
    """
    area = sum(s.instances.size for s in samples)
    epoch_steps = config.epoch_steps or max(1, round(area / (config.size - 2 * cut) ** 2 / config.batch))
    steps = config.steps or config.epochs * epoch_steps
    return Crops(samples, shares, config, cut, teacher, steps * config.batch), epoch_steps


def validation_crops(
    samples: Sequence[Sample], shares: Mapping[str, float], config: TrainConfig, cut: int, teacher: TeacherCache | None
) -> Crops:
    """Return fixed crops without augmentation for the validation loss.

    Their number suffices to cover the area of the images once, but is at most MAX_VALIDATION_CROPS (256).

    `samples`: validation images, at least one. `shares`: fraction of the crops from each source (see `source_shares`).
    `config`: settings of the training. `cut`: pixels by which the network's output is smaller on each side (see
    `cut_of`). `teacher`: stored outputs of a teacher; None without distillation.

    Raises InputError if the teacher has no output for one of the samples.
    """
    area = sum(s.instances.size for s in samples)
    n = min(MAX_VALIDATION_CROPS, max(1, round(area / (config.size - 2 * cut) ** 2)))
    return Crops(samples, shares, config, cut, teacher, n, validation=True)


def batches(crops: Crops, batch: int, device: torch.device, first: int = 0) -> Iterator[tuple[Tensor, Targets]]:
    """Yield batches of images (b, 3, y, x) float32 in [0, 1] and their targets, on `device`.

    Crops are drawn in forked processes. From then on, OpenCV is limited to one thread in this process.

    `crops`: the crops, in order. `batch`: crops per batch; the last one may be smaller. `device`: device of the
    network. `first`: number of the first batch.

    Raises InputError if a teacher's output cannot be read.
    """
    # A forked worker that inherits OpenCV's running thread pool hangs when it first uses it.
    cv2.setNumThreads(1)
    loader = DataLoader(
        crops,
        batch_size=batch,
        sampler=range(first * batch, len(crops)),
        multiprocessing_context="fork",  # the images are not copied
        # On a CPU the network needs the cores; a GPU needs several workers to stay busy.
        num_workers=1 if device.type == "cpu" else max(1, min(8, (os.cpu_count() or 1) - 1)),
        prefetch_factor=4,
    )
    loaded = iter(loader)
    while True:
        try:
            image, *targets = next(loaded)
        except StopIteration:
            return
        except InputError as error:  # torch adds the worker's traceback; the last line is the original message
            message = str(error).strip().splitlines()[-1]
            raise InputError(message.removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")) from None
        scaled = image.to(device, memory_format=torch.channels_last).float() / 255
        yield scaled, Targets(*(t.to(device) for t in targets))


def _padding(shape: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Return the padding (before, after) of each axis that makes an image of this shape (y, x) as large as a crop."""
    missing = (max(0, size - side) for side in shape)
    return [(n // 2, n - n // 2) for n in missing]


def _padded(sample: Sample, size: int) -> Sample:
    """Return the sample, padded by mirroring to at least `size` × `size` pixels; instances are UNKNOWN there."""
    padding = _padding(sample.instances.shape, size)
    if not np.any(padding):
        return sample
    return replace(
        sample,
        image=np.pad(sample.image, [*padding, (0, 0)], mode="symmetric"),
        instances=np.pad(sample.instances, padding, constant_values=UNKNOWN),
        types=None if sample.types is None else np.pad(sample.types, padding),
    )


def _padded_planes(planes: NDArray[np.float16], size: int) -> NDArray[np.float16]:
    """Return a teacher's output (channel, y, x), padded with NaN to the size of its padded image."""
    padding = _padding(planes.shape[1:], size)
    return np.pad(planes, [(0, 0), *padding], constant_values=np.nan) if np.any(padding) else planes


def _inner(planes: NDArray[Any], margin: int) -> NDArray[Any]:
    """Return planes (…, y, x) without `margin` pixels on each side."""
    return planes[..., margin : planes.shape[-2] - margin, margin : planes.shape[-1] - margin]
