"""What annotated images hold, counted as they pass: for the table that `kd prepare` prints, and its warnings."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from hover_batch.taxonomy import Taxonomy
from kd.data.classes import CODES
from kd.data.pieces import pieces_of
from kd.data.samples import Sample

PUBLISHED_FOLDS = {"pannuke": ("1", "2", "3")}
_LISTED = 5
"""Pictures in several folds that are named."""


@dataclass
class Part:
    """What one source has in one fold."""

    images: int = 0
    nuclei: int = 0
    by_class: Counter[int] = field(default_factory=Counter)
    """Nuclei by class id, 0 being those without a class; of images with annotated types, empty where there are none."""


class Findings:
    """Counts over samples whose types are of `taxonomy`."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self.parts: dict[tuple[str, str], Part] = defaultdict(Part)
        """By source and fold."""
        self.unread_types: list[str] = []
        """Sources whose types were left out."""
        self._odd: Counter[str] = Counter()
        self._folds_of_image: dict[str, dict[str, str]] = defaultdict(dict)
        """image_sha256 → the folds that it is in → its id there."""

    def add(self, sample: Sample) -> None:
        part = self.parts[sample.source, sample.fold]
        part.images += 1
        self._folds_of_image[sample.image_sha256][sample.fold] = sample.id
        pieces = pieces_of(sample.instances)
        part.nuclei += len(pieces)
        self._odd["nuclei are in several pieces"] += int((pieces > 1).sum())
        if sample.types is None:
            return
        inside = sample.instances > 0
        _, row = np.unique(sample.instances[inside], return_inverse=True)
        votes = np.zeros((len(pieces), len(self.taxonomy.classes)), np.int64)
        np.add.at(votes, (row, sample.types[inside]), 1)
        part.by_class.update(votes.argmax(axis=1).tolist())
        self._odd["nuclei have pixels of several classes"] += int(((votes > 0).sum(axis=1) > 1).sum())
        self._odd["typed pixels are on no nucleus"] += int(np.count_nonzero(sample.types[~inside]))

    def warnings(self) -> list[str]:
        """Sentences on what a user may want to mend; nothing of it is an error."""
        lines = [f"{n:,} {what}; kept as they are" for what, n in self._odd.items() if n]
        if self.unread_types:
            lines.append(
                f"the types of {', '.join(self.unread_types)} are left out, for what their codes mean is not known; "
                f"those of {', '.join(CODES)} are"
            )
        if unclassed := sum(part.by_class[0] for part in self.parts.values()):
            lines.append(f"{unclassed:,} nuclei are of none of the classes of {self.taxonomy.name}; their type is 0")
        shared = [folds for folds in self._folds_of_image.values() if len(folds) > 1]
        for folds in shared[:_LISTED]:
            listed = ", ".join(f"{fold}: {name}" for fold, name in folds.items())
            lines.append(f"the same picture is in several folds ({listed}), so that scores on it flatter")
        if len(shared) > _LISTED:
            lines.append(f"so are {len(shared) - _LISTED:,} more pictures")
        for source, published in PUBLISHED_FOLDS.items():
            there = {fold for name, fold in self.parts if name == source}
            if there and (missing := [fold for fold in published if fold not in there]):
                lines.append(f"{source} has no fold {', '.join(missing)}; its cross-validation needs all of them")
        folds_there = {fold for _, fold in self.parts}
        if "train" in folds_there and "val" not in folds_there:
            lines.append(
                "there is no fold val, on which training calibrates; --val makes one of CoNSeP's training tiles"
            )
        return lines
