"""A network on annotated images, for a comparison of two: its scores, and what of these images it has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hover_batch.errors import InputError
from hover_batch.model.images import predict_image
from hover_batch.model.predict import Predictor
from hover_batch.nuclei.watershed import SobelConstants
from kd.data.datasets import read_data
from kd.data.pixel_size import check_pixel_size
from kd.evaluation.evaluate import evaluate_data
from kd.evaluation.leakage import leaks

FOLD = "test"


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
