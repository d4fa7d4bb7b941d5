"""Compute class weights for the cross-entropies: rare classes of the training data have larger weights.

w_c = C · f_c^(-1/2) / Σ_k f_k^(-1/2), where f_c is the fraction of pixels with class c and C the number of classes; the
weights have the mean 1. Classes without pixels have the weight 1 and are left out of C and of the sum.

HoVer-UNet's released code has constants for PanNuke whose origin it does not state. They fit this formula: solved for
the pixel fractions, both its six weights of tp and its two of np give nuclei 16.7 % of the pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hover_batch.files import read_json, write_atomically
from hover_batch.model.heads import NP, Heads
from kd.data.datasets import Sample
from kd.teaching.teacher_cache import TeacherCache
from kd.training.crops import targets_of
from kd.training.losses import UNKNOWN

FILE = "class_weights.json"
"""Name of the file in which the weights are cached."""

Weights = dict[str, dict[str, list[float]]]
"""`annotated` and, with a teacher, `taught` → branch (np, tp) → one weight per class, by class id."""


def class_weights(samples: Sequence[Sample], n_types: int, teacher: TeacherCache | None, folder: Path) -> Weights:
    """Return the class weights from the annotations (`annotated`) and, with a teacher, from its predictions (`taught`).

    Both map `np` and `tp` to a list with one weight per class id. Pixels that a branch does not learn from are not
    counted. The result is cached in `folder`/class_weights.json, because reading a teacher's outputs takes a long time.
    It is computed again if the file is corrupted, or the samples, the number of classes, the teacher's package or its
    `tta` have changed.

    `samples`: training images. `n_types`: number of classes, background included. `teacher`: stored outputs; None
    without distillation. `folder`: existing folder of the training.

    Raises InputError if a teacher's output is missing or corrupted, OSError if the file cannot be read or written.
    """
    digest = hashlib.sha256(f"{n_types} {(teacher.sha256, teacher.tta) if teacher else ''}".encode())
    for sample in samples:
        digest.update(sample.image_sha256.encode())
        digest.update(sample.instances.tobytes())
        digest.update(b"" if sample.types is None else sample.types.tobytes())
    key = digest.hexdigest()
    file = folder / FILE
    cached = read_json(file) or {}
    if cached.get("data") == key and isinstance(cached.get("weights"), dict):
        return dict(cached["weights"])
    weights = {"annotated": _weights((targets_of(s.instances, s.types, s.source) for s in samples), n_types)}
    if teacher is not None:
        outputs = map(teacher.logits, samples)
        weights["taught"] = _weights(((o[NP].argmax(0), o[Heads(n_types).tp].argmax(0)) for o in outputs), n_types)
    write_atomically(file, json.dumps({"data": key, "weights": weights}, indent=2) + "\n")
    return weights


def by_rarity(counts: NDArray[np.int64]) -> list[float]:
    """Return the weight of each class, C·f_c^(-1/2) / Σ_k f_k^(-1/2), where f_c is its fraction of the pixels.

    C is the number of classes with pixels, over which the sum runs. A class without pixels has the weight 1.

    `counts` (class,) int64: number of pixels of each class.
    """
    weights = np.ones(len(counts))
    present = counts > 0
    rarity = (counts[present] / counts.sum()) ** -0.5
    weights[present] = present.sum() * rarity / rarity.sum()
    return [float(w) for w in weights]


def _weights(pixels: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]], n_types: int) -> dict[str, list[float]]:
    """Return the weights of both branches. `pixels`: of each image, those in a nucleus, and class ids; or UNKNOWN."""
    nuclei, types = np.zeros(2, np.int64), np.zeros(n_types, np.int64)
    for has_nucleus, type_ids in pixels:
        nuclei += np.bincount(has_nucleus[has_nucleus != UNKNOWN], minlength=2)
        types += np.bincount(type_ids[type_ids != UNKNOWN], minlength=n_types)
    return {"np": by_rarity(nuclei), "tp": by_rarity(types)}
