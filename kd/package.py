"""From a checkpoint to a model package: averaged weights in float16, calibrated, scored, and a card that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hover_batch.config import InferSettings
from hover_batch.errors import InputError, PackageError
from hover_batch.model.package import Card, save_package
from hover_batch.model.predict import Predictor
from hover_batch.model.student import StudentArch, build_student
from hover_batch.taxonomy import CONSEP
from kd.calibrate import calibrate
from kd.datasets import MPP, Sample, read_instance_folder
from kd.evaluate import evaluate
from kd.predict import predict_image

LICENCE = "CC BY-NC-SA 4.0, research only: trained on CoNSeP, MoNuSeg and TNBC"
TILE_IN, TILE_OUT = 320, 256
"""Sides of what a package reads and keeps: the margin of 32 px is one step of the deepest features."""
SPLITS = ("train", "val", "test")


def make_package(checkpoint: Path, data: Path, out: Path, threads: int = 0) -> str:
    """Write the package to `out`; returns lines that say how good it is.

    The Sobel constants are searched on the validation split of `data`. The scores in the card are those of the
    validation and the test split, computed with the weights as they are shipped.
    Raises InputError where there is no checkpoint, PackageError where a weight does not fit into float16.
    """
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint}: no such checkpoint; `hover-batch kd train` writes one")
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
    config = saved["config"]
    network = build_student(StudentArch(config["encoder"], len(CONSEP.classes)))
    network.load_state_dict(saved["average"])
    network.half().float()  # what is scored is what is shipped
    if not all(t.isfinite().all() for t in network.state_dict().values()):
        raise PackageError(f"{checkpoint}: a weight is too large for float16; the training has diverged")
    splits = {split: read_instance_folder(data, split, config["sources"]) for split in SPLITS}
    card = Card(
        name=out.stem,
        architecture="unet",
        encoder=config["encoder"],
        taxonomy=CONSEP,
        mpp=MPP,
        tile_in=TILE_IN,
        tile_out=TILE_OUT,
        sobel={},
        licence=LICENCE,
        training={
            "steps": saved["step"],
            "settings": config,
            "before": saved.get("before", {}),
            "data": {split: _contents(samples) for split, samples in splits.items()},
            "note": "CoNSeP's tiles are split by tile: patients may be shared between splits. MoNuSeg and TNBC have "
            "no types, so the type branch saw CoNSeP alone.",
        },
    )
    predictor = Predictor(network, card, InferSettings(threads=threads))

    def maps_of(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return predict_image(predictor, image)

    found = calibrate(maps_of, splits["val"])
    scores = {
        split: {s.source: s.to_json() for s in evaluate(maps_of, splits[split], found.constants, CONSEP)}
        for split in ("val", "test")
    }
    card = replace(
        card,
        sobel=found.constants.to_json(),
        metrics={**scores, "calibration": found.to_json(), "precision": predictor.precision},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_package(out, network, card)
    return "\n".join([str(out), *_lines(scores)])


def calibrated(network: nn.Module, card: Card, data: Path) -> Card:
    """The card with the Sobel constants that are best for `network` on the validation split of `data`, all sources.

    Raises InputError where there is no such image.
    """
    samples = read_instance_folder(data, "val", None)
    if not samples:
        raise InputError(f"--calibrate {data}: dataset.csv has no image of the split val")
    predictor = Predictor(network, card, InferSettings(batch=2))  # a HoVerNet's features are large
    found = calibrate(lambda image: predict_image(predictor, image), samples)
    how = {**found.to_json(), "data": _contents(samples), "precision": predictor.precision}
    return replace(card, sobel=found.constants.to_json(), metrics={**card.metrics, "calibration": how})


def _contents(samples: list[Sample]) -> dict[str, dict[str, int]]:
    """Images and nuclei by source."""
    contents: dict[str, dict[str, int]] = {}
    for sample in samples:
        entry = contents.setdefault(sample.source, {"images": 0, "nuclei": 0})
        entry["images"] += 1
        entry["nuclei"] += len(np.unique(sample.instances)) - 1
    return contents


def _lines(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    return [
        f"{split} {source}: PQ {s['pq']:.4f}  AJI {s['aji']:.4f}  Dice {s['dice']:.4f}  F_d {s['f_d']:.4f}"
        for split, by_source in scores.items()
        for source, s in by_source.items()
    ]
