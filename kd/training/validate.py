"""Validate quickly during training: the loss on fixed crops, scores by source on parts of images, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hover_batch.metrics import mean_defined
from hover_batch.model.architectures.hovernet import HoVerNet
from hover_batch.model.architectures.micronet import KEPT, MicroNet, by_tiles
from hover_batch.model.architectures.micronet import SIDE as SIDE_OF_MICRONET
from hover_batch.model.heads import MapLayout
from hover_batch.model.predict import quantise
from hover_batch.nuclei.components import Splitter
from hover_batch.nuclei.image import instances_of
from hover_batch.nuclei.watershed import SobelConstants
from hover_batch.taxonomy import Taxonomy
from kd.data.classes import PARTIAL
from kd.data.datasets import Sample
from kd.evaluation.evaluate import MapsOf, evaluate
from kd.panels import Image, outlined, panel
from kd.teaching.teacher_cache import TeacherCache
from kd.training.augment import LABEL_MARGIN
from kd.training.crops import Crops, batches
from kd.training.losses import Loss
from kd.training.precision import training_autocast

SIDE = 512
"""Side in pixels of the scored central part of each image."""
SCORED = 64
"""Largest number of scored images per source, evenly spaced among all."""
EXAMPLES, EXAMPLE_SIDE = 4, 256
"""Number of rows of the picture, and the side of its images in pixels."""

TYPICAL = SobelConstants(h_min=-1.191e11, h_max=7.051e10, v_min=-1.17e11, v_max=6.913e10)
"""Sobel constants of the starter, used until `kd.evaluation.calibrate` has found those of the trained network."""


@torch.inference_mode()
def validation_loss(model: nn.Module, crops: Crops, loss: Loss, batch: int, device: torch.device) -> float:
    """Return the mean of the entry `loss` over the batches of `crops`; lower is better.

    In this process, torch's random seed is set to 0, and OpenCV is limited to one thread.

    `model`: network in evaluation mode, on `device`. `crops`: crops of the validation images. `loss`: its loss.
    `batch`: crops per batch. `device`: device of the network.

    Raises InputError if a teacher's output cannot be read.
    """
    torch.manual_seed(0)  # for the proposals that Mask R-CNN draws
    losses = [loss.of_batch(model, image, targets)["loss"] for image, targets in batches(crops, batch, device)]
    return float(torch.stack(losses).double().mean())


def validate(
    model: nn.Module,
    samples: Sequence[Sample],
    device: torch.device,
    taxonomy: Taxonomy,
    splitter: Splitter = TYPICAL,
) -> dict[str, float]:
    """Return scores from 0 to 1 by name, for the log.

    The names are `val_pq_<source>`, `val_dice_<source>` and `val_f_d_<source>`; sources in PARTIAL have
    `val_recall_<source>` instead. Sources with annotated types also have `val_f_c_<source>`, the mean F_c over the
    classes. A score is NaN if it is undefined.

    The central SIDE × SIDE (512 × 512) pixels of at most SCORED (64) images per source are scored; smaller images are
    cropped to multiples of 32 pixels. The network sees mirrored pixels around this part.

    `model`: network in evaluation mode, on `device`. `samples`: validation images. `device`: device of the network.
    `taxonomy`: classes of both the network and the samples. `splitter`: post-processing of the maps.

    Raises InputError if an image has too many nuclei to pair.
    """
    maps_of = maps_by(model, device, taxonomy)
    chosen: list[Sample] = []
    for source in dict.fromkeys(s.source for s in samples):
        chosen += _spread([s for s in samples if s.source == source], SCORED)
    row: dict[str, float] = {}
    for scores in evaluate(maps_of, [_central(s, SIDE) for s in chosen], splitter, taxonomy):
        names = ("recall",) if scores.source in PARTIAL else ("pq", "dice", "f_d")
        row |= {f"val_{name}_{scores.source}": getattr(scores, name) for name in names}
        if scores.f_c:
            row[f"val_f_c_{scores.source}"] = mean_defined(scores.f_c.values())
    return row


def examples(
    model: nn.Module,
    samples: Sequence[Sample],
    device: torch.device,
    taxonomy: Taxonomy,
    teacher: TeacherCache | None,
    splitter: Splitter = TYPICAL,
) -> Image:
    """Return a picture (y, x, 3) uint8 RGB with one row for each of up to EXAMPLES images.

    Its columns are the central EXAMPLE_SIDE × EXAMPLE_SIDE pixels of the image, the annotations, the teacher's
    prediction if there is a teacher, and the network's prediction. A smaller image is cropped to multiples of 32
    pixels. The images are evenly spaced in `samples`. The network sees mirrored pixels around the centre.

    `model`: network in evaluation mode, on `device`. `samples`: validation images, at least one. `device`: device of
    the network. `taxonomy`: classes of the network, the samples and the teacher. `teacher`: stored outputs; None
    without a teacher. `splitter`: post-processing of the maps.

    Raises InputError if a teacher's output is missing or corrupted.
    """
    maps_of = maps_by(model, device, taxonomy)
    layout = MapLayout(len(taxonomy.classes))

    def drawn(image: Image, maps: NDArray[np.uint8]) -> Image:
        found = instances_of(maps[[layout.NP, layout.H, layout.V]], splitter)
        return outlined(image, found, maps[layout.tp].argmax(0).astype(np.uint8), taxonomy)

    rows = []
    for sample in _spread(samples, EXAMPLES):
        part = _central(sample, EXAMPLE_SIDE)
        row = [part.image, outlined(part.image, part.instances, part.types, taxonomy)]
        if teacher is not None:
            logits = teacher.logits(sample)[(..., *_centre(sample, EXAMPLE_SIDE))].astype(np.float32)
            rgb = torch.from_numpy(part.image).permute(2, 0, 1)
            row.append(drawn(part.image, quantise(torch.from_numpy(logits)[None], rgb[None], layout)[0].numpy()))
        row.append(drawn(part.image, maps_of(part.image)))
        rows.append(row)
    return panel(["image", "annotated", *(["teacher"] if teacher else []), "network"], rows)


def maps_by(model: nn.Module, device: torch.device, taxonomy: Taxonomy) -> MapsOf:
    """Return a function from images (y, x, 3) uint8 RGB to the stored maps that a network predicts.

    The stored maps are (plane, y, x) uint8 (see `MapLayout`). The sides of the images must be multiples of 32. The
    network sees mirrored pixels around them.

    `model`: network in evaluation mode, on `device`. `taxonomy`: its classes.
    """
    layout = MapLayout(len(taxonomy.classes))
    forward = partial(by_tiles, model) if isinstance(model, MicroNet) else model

    @torch.inference_mode()
    def maps_of(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        margins = [_margin(model, side) for side in image.shape[:2]]
        mirrored = np.pad(image, [(margin, margin) for margin in margins] + [(0, 0)], mode="reflect")
        rgb, padded = (torch.from_numpy(a).to(device).permute(2, 0, 1).unsqueeze(0) for a in (image, mirrored))
        with training_autocast(device):
            output = forward(padded.float().div(255).contiguous(memory_format=torch.channels_last)).float()
        height, width = image.shape[:2]
        top, left = (output.shape[2] - height) // 2, (output.shape[3] - width) // 2
        return quantise(output[..., top : top + height, left : left + width], rgb, layout)[0].cpu().numpy()

    return maps_of


def _margin(model: nn.Module, side: int) -> int:
    """Return the margin in pixels that the network needs around an image with this side, a multiple of 32 pixels."""
    if isinstance(model, MicroNet):
        return (SIDE_OF_MICRONET - KEPT + -side % KEPT) // 2
    if not isinstance(model, HoVerNet):
        return LABEL_MARGIN
    arch = model.arch
    wide = side + arch.shrink
    return (wide + (arch.excess - wide) % 8 - side) // 2


def _spread(samples: Sequence[Sample], n: int) -> list[Sample]:
    """Return up to `n` of the samples, evenly spaced."""
    n = min(n, len(samples))
    return [samples[i * len(samples) // n] for i in range(n)]


def _centre(sample: Sample, side: int) -> tuple[slice, slice]:
    height, width = (min(side, extent // 32 * 32) for extent in sample.instances.shape)
    y, x = (sample.instances.shape[0] - height) // 2, (sample.instances.shape[1] - width) // 2
    return slice(y, y + height), slice(x, x + width)


def _central(sample: Sample, side: int) -> Sample:
    part = _centre(sample, side)
    return replace(
        sample,
        image=np.ascontiguousarray(sample.image[part]),
        instances=np.ascontiguousarray(sample.instances[part]),
        types=None if sample.types is None else np.ascontiguousarray(sample.types[part]),
    )
