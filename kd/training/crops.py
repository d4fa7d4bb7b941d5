"""Crops of annotated images, in batches. Crop i depends on (seed, i) alone, so that a resumed run sees what an
undisturbed one would have seen, whatever the number of workers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

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
from kd.training.augment import LABEL_MARGIN, random_view
from kd.training.config import TrainConfig
from kd.training.losses import UNKNOWN, Targets
from kd.training.targets import hv_targets

OUTPUTS_KEPT = 32
"""Teacher outputs of whole images that a worker holds; one of 1000² pixels and 9 channels takes 18 MB."""
MAX_VALIDATION_CROPS = 256


class Teacher(Protocol):
    """What `kd teach` has written: a teacher's output for every image."""

    @property
    def taxonomy(self) -> Taxonomy: ...
    @property
    def sha256(self) -> str:
        """Of the teacher's package."""

    @property
    def card(self) -> Mapping[str, Any]: ...
    @property
    def tta(self) -> int: ...
    def covers(self, sample: Sample) -> bool:
        """Whether there is an output for the image, sound or not."""

    def logits(self, sample: Sample) -> NDArray[np.float16]:
        """(c, y, x) of the whole image, as `hover_batch.model.heads` lays out; InputError where absent or harmed."""


def open_teacher(path: Path, taxonomy: Taxonomy) -> Teacher:
    """The teacher's outputs in a folder. InputError where its classes are others than the data's."""
    from kd.teaching.teacher_cache import TeacherCache  # needs zarr, which training without a teacher does not

    cache = TeacherCache.open(path)
    if cache.taxonomy.classes != taxonomy.classes:
        raise InputError(
            f"--teacher {path}: its classes are those of {cache.taxonomy.name}, the data's those of {taxonomy.name}; "
            "teach by a teacher of the data's classes"
        )
    return cache


def source_shares(config: TrainConfig, samples: Sequence[Sample]) -> dict[str, float]:
    """Share of the crops that each source gives, in their order, with a sum of 1.

    As configured, else all in proportion to their area. InputError where a source has no image.
    """
    areas: dict[str, float] = {}
    for sample in samples:
        areas[sample.source] = areas.get(sample.source, 0.0) + sample.instances.size
    configured = dict(sorted((config.sources or {}).items()))  # crops must not depend on the order of --source
    given = configured or areas
    for source in given:
        if source not in areas:
            raise InputError(f"--source {source}: no training image of it in {config.data}")
    if not given:
        there = ", ".join(folds_of(config.data))
        raise InputError(f"--fold {' '.join(config.train_folds)}: {config.data} has no such image; it has {there}")
    return {source: share / sum(given.values()) for source, share in given.items()}


class Crops(Dataset[tuple[Tensor, ...]]):
    """Crop i, for every i below `n`: its source, image and view are drawn from (seed, i, …).

    An item: image (3, y, x) uint8 and, of its central part `cut` pixels narrower on each side, np, hv, tp as in
    `Targets`, and with a teacher its output (c, y, x). An image smaller than a crop is mirrored beyond its edges, and
    nothing is learnt there.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        shares: Mapping[str, float],
        config: TrainConfig,
        cut: int,
        teacher: Teacher | None,
        n: int,
        validation: bool = False,
    ) -> None:
        self.samples, self.config, self.cut, self.n = samples, config, cut, n
        self.seed: tuple[int, ...] = (1,) if validation else ()
        self.kind = "none" if validation else config.augmentation
        rows = {source: [i for i, s in enumerate(samples) if s.source == source] for source in shares}
        self.rows = [found for found in rows.values() if found]
        held = np.array([shares[source] for source, found in rows.items() if found])
        self.shares = held / held.sum()
        # Larger images hold more distinct crops, and are drawn in proportion to their area.
        areas = [np.array([samples[row].instances.size for row in rows], float) for rows in self.rows]
        self.odds = [area / area.sum() for area in areas]
        if teacher is not None and (untaught := [s for s in samples if not teacher.covers(s)]):
            raise InputError(
                f"--teacher {config.teacher}: no output for {len(untaught)} of {len(samples)} images, the first "
                f"{untaught[0].id}; run `hover-batch kd teach` on these images first"
            )
        self.outputs = None if teacher is None else lru_cache(OUTPUTS_KEPT)(lambda i: teacher.logits(samples[i]))
        self.padded = [_padded(sample, config.size) for sample in samples]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng((self.config.seed, i, *self.seed))
        k = rng.choice(len(self.shares), p=self.shares)
        row = self.rows[k][rng.choice(len(self.rows[k]), p=self.odds[k])]
        sample = self.padded[row]
        outputs = None if self.outputs is None else _padded_planes(self.outputs(row), self.config.size)
        view = random_view(sample, self.config.size, rng, self.kind, outputs)
        margin = LABEL_MARGIN + self.cut
        instances = _inner(view.instances, margin)
        nuclei, types = targets_of(
            instances, None if sample.types is None else _inner(view.types, margin), sample.source
        )
        item = (
            torch.from_numpy(view.image).permute(2, 0, 1),
            torch.from_numpy(nuclei),
            torch.from_numpy(np.ascontiguousarray(_inner(hv_targets(view.instances), margin))),
            torch.from_numpy(types),
        )
        if view.planes is None:
            return item
        return (*item, torch.from_numpy(np.ascontiguousarray(_inner(view.planes, self.cut))))


def targets_of(
    instances: NDArray[np.int32], types: NDArray[np.uint8] | None, source: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What the branches np and tp can learn from annotations, both (y, x): as `Targets` has them.

    instances (y, x), UNKNOWN beyond the image; types (y, x), 0 on nuclei without a class, or None. Where a source
    outlines only some of the nuclei, the rest of its pixels is not background: it teaches the classes of those alone.
    """
    partial = source in PARTIAL
    nuclei = np.full(instances.shape, UNKNOWN, np.int64) if partial else np.sign(instances).astype(np.int64)
    if types is None:
        return nuclei, np.full(instances.shape, UNKNOWN, np.int64)
    typed = (types > 0) if partial else (types > 0) | (instances == 0)
    return nuclei, np.where(typed & (instances != UNKNOWN), types.astype(np.int64), UNKNOWN)


def training_crops(
    samples: Sequence[Sample], shares: Mapping[str, float], config: TrainConfig, cut: int, teacher: Teacher | None
) -> tuple[Crops, int]:
    """The crops of the whole run, and how many steps an epoch has."""
    area = sum(s.instances.size for s in samples)
    epoch_steps = config.epoch_steps or max(1, round(area / (config.size - 2 * cut) ** 2 / config.batch))
    steps = config.steps or config.epochs * epoch_steps
    return Crops(samples, shares, config, cut, teacher, steps * config.batch), epoch_steps


def validation_crops(
    samples: Sequence[Sample], shares: Mapping[str, float], config: TrainConfig, cut: int, teacher: Teacher | None
) -> Crops:
    """As many crops as cover the area of the images once, up to MAX_VALIDATION_CROPS; always the same, as they are."""
    area = sum(s.instances.size for s in samples)
    n = min(MAX_VALIDATION_CROPS, max(1, round(area / (config.size - 2 * cut) ** 2)))
    return Crops(samples, shares, config, cut, teacher, n, validation=True)


def batches(crops: Crops, batch: int, device: torch.device, first: int = 0) -> Iterator[tuple[Tensor, Targets]]:
    """Batches from number `first` on: image (b, 3, y, x) float32 in [0, 1] and its targets."""
    # The worker is forked: one that inherits a used pool of OpenCV's threads hangs as soon as it touches it.
    cv2.setNumThreads(1)
    loader = DataLoader(
        crops,
        batch_size=batch,
        sampler=range(first * batch, len(crops)),
        multiprocessing_context="fork",  # the images are not copied
        # On the CPU the network wants the cores; a GPU wants to be fed.
        num_workers=1 if device.type == "cpu" else max(1, min(8, (os.cpu_count() or 1) - 1)),
        prefetch_factor=4,
    )
    crops_of = iter(loader)
    while True:
        try:
            image, *targets = next(crops_of)
        except StopIteration:
            return
        except InputError as error:  # torch puts the worker's traceback into the message: its last line is ours
            said = str(error).strip().splitlines()[-1]
            raise InputError(said.removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")) from None
        scaled = image.to(device, memory_format=torch.channels_last).float() / 255
        yield scaled, Targets(*(t.to(device) for t in targets))


def _padding(shape: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Return by how many pixels an image of this shape (y, x) is padded at its ends to be as large as a crop."""
    missing = (max(0, size - side) for side in shape)
    return [(n // 2, n - n // 2) for n in missing]


def _padded(sample: Sample, size: int) -> Sample:
    """The image mirrored beyond its edges to at least `size` pixels a side, its instances UNKNOWN there."""
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
    """A teacher's output (c, y, x), NaN beyond its edges, as `_padded` pads its image."""
    padding = _padding(planes.shape[1:], size)
    return np.pad(planes, [(0, 0), *padding], constant_values=np.nan) if np.any(padding) else planes


def _inner(planes: NDArray[Any], margin: int) -> NDArray[Any]:
    """Of (…, y, x), without `margin` pixels on each side."""
    return planes[..., margin : planes.shape[-2] - margin, margin : planes.shape[-1] - margin]
