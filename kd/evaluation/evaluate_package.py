"""A network on annotated images, for a comparison of two: its scores, and what of these images it has seen."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hover_batch.config import InferSettings
from hover_batch.errors import InputError
from hover_batch.model.cost import Cost, cost_of
from hover_batch.model.images import batch_of, predict_image
from hover_batch.model.package import Package, find_package, load_network
from hover_batch.model.predict import Predictor, load_predictor
from hover_batch.nuclei.watershed import SobelConstants
from kd.data.datasets import read_data
from kd.data.pixel_size import check_pixel_size
from kd.evaluation.evaluate import evaluate_data
from kd.evaluation.leakage import Leak, leaks
from kd.evaluation.scores import SourceScores

FOLD = "test"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate_package` found."""

    label: str
    package: Package
    data: str
    """Name of the folder or cache."""
    folds: tuple[str, ...]
    precision: str
    scores: list[SourceScores]
    leaks: list[Leak]
    cost: Cost

    def write(self, path: Path) -> None:
        """Write a JSON file, as `kd evaluate --json` does."""
        card = self.package.card
        report = {
            "label": self.label,
            "model": card.name,
            "sha256": self.package.sha256,
            "architecture": f"{card.architecture} {card.encoder}".rstrip(),
            "data": self.data,
            "folds": list(self.folds),
            "sobel_norm": "fixed",
            "precision": self.precision,
            "sources": {s.source: s.to_json() for s in self.scores},
            "leakage": [leak.to_json() for leak in self.leaks],
            "cost": self.cost.to_json(),
        }
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", "utf-8")
        os.replace(temporary, path)


def evaluate_package(model: str, data: Path, *, folds: Sequence[str], label: str, threads: int = 0) -> Evaluation:
    """Score the package `model` on the images of `data` (as for `read_data`).

    Raises InputError if the folds hold no image, or the pixels are not of the package's size.
    """
    package = find_package(model, "package")
    check_pixel_size(package.card, f"package {model}")
    found = read_data(data, folds)
    if not found.samples:
        raise InputError(f"--fold {' '.join(folds)}: {data} has no such image")
    card, constants = package.card, SobelConstants.from_json(package.card.sobel)
    batch = batch_of(card, (sample.image.shape for sample in found.samples))
    predictor = load_predictor(package, InferSettings(threads=threads, batch=batch))
    return Evaluation(
        label=label,
        package=package,
        data=data.resolve().name,
        folds=tuple(folds),
        precision=predictor.precision,
        scores=evaluate_data(lambda image: predict_image(predictor, image), found, constants, card.taxonomy),
        leaks=leaks(card, found.samples),
        cost=cost_of(load_network(package), card),
    )


def judged(predictor: Predictor, constants: SobelConstants, data: Path) -> dict[str, Any]:
    """`sources`: the scores of each, as `kd evaluate --json` has them; `leakage`: what was seen, in words.

    InputError where there are no images of the fold, or their pixels are not the network's.
    """
    card = predictor.card
    check_pixel_size(card, card.name)
    found = read_data(data, [FOLD], None)
    if not found.samples:
        raise InputError(f"--truth {data}: holds no image of the fold {FOLD}")
    scores = evaluate_data(lambda image: predict_image(predictor, image), found, constants, card.taxonomy)
    return {
        "sources": {s.source: s.to_json() for s in scores},
        "leakage": [{"text": str(leak)} for leak in leaks(card, found.samples)],
    }
