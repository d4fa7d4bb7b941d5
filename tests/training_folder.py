"""Shared by tests of training: a tiny synthetic instance folder, and a teacher that knows the truth."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np

from hover_batch.taxonomy import CONSEP
from kd.training.targets import hv_targets


def write_folder(folder: Path, seed: int = 0) -> Path:
    """Dark discs on pink, typed by their colour, in two images of each split and of two sources."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, (source, split) in enumerate([(s, t) for s in ("consep", "tnbc") for t in ("train", "train", "val")]):
        image = np.full((160, 160, 3), (200, 180, 230), np.uint8)
        labels, types = np.zeros((160, 160), np.uint16), np.zeros((160, 160), np.uint8)
        for n in range(1, 13):
            centre = tuple(int(c) for c in rng.integers(8, 152, 2))
            code = int(rng.integers(1, 8))
            for array, value in ((image, (90 + 10 * code, 30, 80)), (labels, n), (types, code)):
                cv2.circle(array, centre, 9, value, -1)
        name = f"{source}_{i}"
        for kind, array in (("image", image), ("labels", labels), ("types", types)):
            cv2.imwrite(str(folder / f"{name}_{kind}.png"), array)
        typed = f"{name}_types.png" if source == "consep" else ""
        rows.append((name, f"{name}_image.png", f"{name}_labels.png", typed, source, "", split))
    with (folder / "dataset.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("sample_id", "image", "labels", "types", "source", "group", "split"), *rows])
    return folder


class Knows:
    """A teacher that knows the truth, and types for all nuclei. In place of what `kd teach` writes."""

    taxonomy = CONSEP
    sha256 = "0123"
    tta = 1
    card = {"name": "knows", "licence": "none", "training": {"saw": {"train": ["beef"]}}}

    def covers(self, sample):
        return True

    def logits(self, sample):
        nuclei = sample.instances > 0
        types = np.where(nuclei, sample.instances % 4 + 1, 0)
        hv = hv_targets(sample.instances)
        planes = [~nuclei, nuclei, *hv / 3, *(types == i for i in range(5))]
        return np.stack([3 * p.astype(np.float16) for p in planes])
