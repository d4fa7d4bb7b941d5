"""The training loop, top to bottom: crops → student → loss → step; at each epoch a validation and a checkpoint.

Needs torch, OpenCV and numba, but neither ray, zarr nor tiatoolbox. Crop i of the run depends on (seed, i) alone, so a
resumed run sees what an undisturbed one would have seen.
"""

from __future__ import annotations

import copy
import csv
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hover_batch.errors import InputError
from hover_batch.model.heads import Heads
from hover_batch.model.package import Package, find_package, load_network
from hover_batch.model.student import StudentArch, build_student
from hover_batch.taxonomy import CONSEP
from kd.augment import LABEL_MARGIN, random_view
from kd.config import TrainConfig
from kd.datasets import Sample, read_instance_folder
from kd.losses import Targets, student_loss
from kd.targets import hv_targets
from kd.validate import validate

CHECKPOINT = "checkpoint.pt"
LOG = "log.csv"


class Crops(Dataset[tuple[Tensor, ...]]):
    """Crop i, for every i: its source, image and augmentation are drawn from (seed, i)."""

    def __init__(self, samples: list[Sample], config: TrainConfig) -> None:
        self.by_source = {s: [x for x in samples if x.source == s] for s in config.sources}
        for source, found in self.by_source.items():
            if not found:
                raise InputError(f"--source {source}: no training image of it in {config.data}/dataset.csv")
        self.config = config
        shares = np.array(list(config.sources.values()))
        self.shares = shares / shares.sum()

    def __len__(self) -> int:
        return self.config.steps * self.config.batch

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng((self.config.seed, i))
        source = list(self.by_source)[rng.choice(len(self.shares), p=self.shares)]
        samples = self.by_source[source]
        # Larger images hold more distinct crops, and are drawn in proportion to their area.
        areas = np.array([s.instances.size for s in samples], float)
        sample = samples[rng.choice(len(samples), p=areas / areas.sum())]
        image, instances, types = random_view(sample, self.config.size, rng)
        inner = slice(LABEL_MARGIN, -LABEL_MARGIN)
        hv = hv_targets(instances)[:, inner, inner]
        return (
            torch.from_numpy(image).permute(2, 0, 1),
            torch.from_numpy((instances[inner, inner] > 0).astype(np.int64)),
            torch.from_numpy(np.ascontiguousarray(hv)),
            torch.from_numpy(types[inner, inner].astype(np.int64)),
            torch.tensor(sample.types is not None),
        )


def train(config: TrainConfig) -> nn.Module:
    """Train, or go on where the checkpoint in `config.out` stands; returns the averaged weights in a module.

    Raises InputError where the checkpoint there was made with other settings.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arch = StudentArch(config.encoder, len(CONSEP.classes))
    heads = Heads(arch.n_types)
    model = build_student(arch)
    before: dict[str, Any] = {}
    if config.init is not None:
        package = _start(config.init, config)
        model.load_state_dict(load_network(package).state_dict())
        before = dict(package.card.training)
    model.to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    config.out.mkdir(parents=True, exist_ok=True)
    first = _resume(config, model, average, optimizer)
    if first == config.steps:
        return average

    samples = read_instance_folder(config.data, "train", config.sources)
    crops = Crops(samples, config)
    validation = read_instance_folder(config.data, "val", config.sources)
    started, since, sums = time.monotonic(), first, dict[str, float]()
    for step, (image, targets) in enumerate(_batches(crops, config, first, device), start=first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        model.train()
        torch.manual_seed((config.seed << 32) + step)  # the encoder drops paths: what it drops is the step's, too
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = model(image)
        terms = student_loss(output.float(), targets, heads)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        _average(average, model, min(config.ema_decay, (1 + step) / (10 + step)))
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + float(term.detach())
        done = step + 1
        if done % config.epoch_steps == 0 or done == config.steps:
            n = done - since
            row = {"step": done, "s_per_step": (time.monotonic() - started) / n}
            row |= {name: total / n for name, total in sums.items()}
            # Saved first: whatever befalls the validation, the steps are kept.
            _save(config, done, model, average, optimizer, before)
            row |= validate(average, validation, device, CONSEP)
            _log(config.out / LOG, row)
            started, since, sums = time.monotonic(), done, {}
    return average


def _start(init: Path, config: TrainConfig) -> Package:
    """The package that training starts from. InputError where it is of another encoder or other classes."""
    package = find_package(str(init))
    if (package.card.encoder, package.card.taxonomy) != (config.encoder, CONSEP):
        raise InputError(f"--init {init}: its encoder or classes are others than those to be trained")
    return package


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _batches(crops: Crops, config: TrainConfig, first: int, device: torch.device) -> Iterator[tuple[Tensor, Targets]]:
    """Batches from step `first` on: image (b, 3, y, x) float32 in [0, 1] and its targets."""
    start = first * config.batch
    # The worker is forked: one that inherits a used pool of OpenCV's threads hangs as soon as it touches it.
    cv2.setNumThreads(1)
    loader = DataLoader(
        crops,
        batch_size=config.batch,
        sampler=range(start, len(crops)),
        num_workers=1,
        prefetch_factor=4,
    )
    for image, np_map, hv, tp, has_types in loader:
        scaled = image.to(device, memory_format=torch.channels_last).float() / 255
        yield scaled, Targets(np_map.to(device), hv.to(device), tp.to(device), has_types.to(device))


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's; counters and running statistics are averaged alike."""
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def _resume(config: TrainConfig, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    path = config.out / CHECKPOINT
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True, map_location="cpu")
    if saved["config"] != config.to_json():
        raise InputError(f"{path} was made with other settings; give another --out, or the same settings")
    model.load_state_dict(saved["model"])
    average.load_state_dict(saved["average"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def _save(
    config: TrainConfig,
    step: int,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    before: dict[str, Any],
) -> None:
    """Write the checkpoint. `before`: the training that made the weights which this one started from, for the card."""
    path = config.out / CHECKPOINT
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "config": config.to_json(),
            "step": step,
            "before": before,
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
        temporary,
    )
    os.replace(temporary, path)


def _log(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(row), extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow({k: round(v, 5) for k, v in row.items()})
    print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
