"""Weights of the classes by their rarity, from the pixels of the training data.

w_c = C · f_c^(-1/2) / Σ_k f_k^(-1/2), f_c being the share of the pixels that are of class c and C the number of
classes, so that the weights have the mean 1. A class without any pixel is left out of C and the sum, and has the
weight 1.

HoVer-UNet's released code has literals for PanNuke without saying where they come from; they fit this: in its six
weights of types the nuclei's classes have together the share of .167 of the pixels, the same as by its two of np.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hover_batch.model.heads import NP, Heads
from kd.data.datasets import Sample
from kd.training.crops import Teacher, targets_of
from kd.training.losses import UNKNOWN

FILE = "class_weights.json"

Weights = dict[str, dict[str, list[float]]]
"""Of `annotated` and, with a teacher, of `taught` pixels: the weights by branch, np and tp."""


def class_weights(samples: Sequence[Sample], n_types: int, teacher: Teacher | None, folder: Path) -> Weights:
    """The weights for the annotations and for a teacher's preferred classes; kept in `folder`, since a teacher's
    outputs take long to read. Pixels from which a branch learns nothing do not count."""
    digest = hashlib.sha256(f"{n_types} {teacher.sha256 if teacher else ''}".encode())
    for sample in samples:
        digest.update(sample.image_sha256.encode())
        digest.update(sample.instances.tobytes())
        digest.update(b"" if sample.types is None else sample.types.tobytes())
    key = digest.hexdigest()
    file = folder / FILE
    if file.is_file():
        held = json.loads(file.read_text())
        if held["data"] == key:
            return dict(held["weights"])
    weights = {"annotated": _annotated(samples, n_types)}
    if teacher is not None:
        weights["taught"] = _taught(samples, n_types, teacher)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({"data": key, "weights": weights}, indent=2) + "\n")
    os.replace(temporary, file)
    return weights


def by_rarity(counts: NDArray[np.int64]) -> list[float]:
    """The weights of classes that have so many pixels."""
    weights = np.ones(len(counts))
    present = counts > 0
    rarity = (counts[present] / counts.sum()) ** -0.5
    weights[present] = present.sum() * rarity / rarity.sum()
    return [float(w) for w in weights]


def _annotated(samples: Sequence[Sample], n_types: int) -> dict[str, list[float]]:
    nuclei, types = np.zeros(2, np.int64), np.zeros(n_types, np.int64)
    for sample in samples:
        has_nucleus, type_ids = targets_of(sample.instances, sample.types, sample.source)
        nuclei += np.bincount(has_nucleus[has_nucleus != UNKNOWN], minlength=2)
        types += np.bincount(type_ids[type_ids != UNKNOWN], minlength=n_types)
    return {"np": by_rarity(nuclei), "tp": by_rarity(types)}


def _taught(samples: Sequence[Sample], n_types: int, teacher: Teacher) -> dict[str, list[float]]:
    nuclei, types = np.zeros(2, np.int64), np.zeros(n_types, np.int64)
    for sample in samples:
        output = teacher.logits(sample)
        nuclei += np.bincount(output[NP].argmax(0).ravel(), minlength=2)
        types += np.bincount(output[Heads(n_types).tp].argmax(0).ravel(), minlength=n_types)
    return {"np": by_rarity(nuclei), "tp": by_rarity(types)}
