"""Count annotated images and find irregularities, for the table and the warnings of `kd prepare`."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from hover_batch.formatting import counted
from hover_batch.taxonomy import Taxonomy
from kd.data.pieces import pieces_of
from kd.data.samples import Sample

PUBLISHED_FOLDS = {"pannuke": ("1", "2", "3")}
"""Folds of sources with a published cross-validation."""
_LISTED = 5
"""Largest number of images in several folds that are listed by name."""


@dataclass
class Part:
    """Counts of one source in one fold."""

    images: int = 0
    """Number of images."""
    nuclei: int = 0
    """Number of nuclei."""
    by_class: Counter[int] = field(default_factory=Counter)
    """Number of nuclei by class id, 0 = without a class; only for images with annotated types."""


class Findings:
    """Counts and irregularities of samples. `taxonomy`: classes of their types."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self.parts: dict[tuple[str, str], Part] = defaultdict(Part)
        """Counts by (source, fold)."""
        self.notes: list[str] = []
        """Sentences of the layouts about what was not read."""
        self._irregular: Counter[str] = Counter()
        """Description of an irregularity → how often it occurs."""
        self._folds_of_image: dict[str, dict[str, str]] = defaultdict(dict)
        """image_sha256 → fold → the image's id there."""

    def add(self, sample: Sample) -> None:
        """Add `sample` to the counts, and look for irregularities in it.

        A nucleus has the class of most of its pixels; if several classes have the same number, the one with the lowest
        id.
        """
        part = self.parts[sample.source, sample.fold]
        part.images += 1
        self._folds_of_image[sample.image_sha256][sample.fold] = sample.id
        pieces = pieces_of(sample.instances)
        part.nuclei += len(pieces)
        self._irregular["nuclei in several pieces"] += int((pieces > 1).sum())
        if sample.types is None:
            return
        inside = sample.instances > 0
        _, nucleus = np.unique(sample.instances[inside], return_inverse=True)
        pixels = np.zeros((len(pieces), len(self.taxonomy.classes)), np.int64)
        np.add.at(pixels, (nucleus, sample.types[inside]), 1)
        part.by_class.update(pixels.argmax(axis=1).tolist())
        self._irregular["nuclei with pixels of several classes"] += int(((pixels > 0).sum(axis=1) > 1).sum())
        self._irregular["typed pixels outside nuclei"] += int(np.count_nonzero(sample.types[~inside]))

    def warnings(self) -> list[str]:
        """Return one line for each irregularity or note that a user may want to act on. None of them is an error.

        Of the images that are in several folds, the first five are named, and the others are counted.
        """
        lines = [f"{what}: {n:,}; not changed" for what, n in self._irregular.items() if n]
        lines += self.notes
        lines += [
            f"{source}, fold {fold}: no nucleus in the whole fold ({counted(part.images, 'image')}); check the labels"
            for (source, fold), part in self.parts.items()
            if not part.nuclei
        ]
        if unclassed := sum(part.by_class[0] for part in self.parts.values()):
            lines.append(f"{unclassed:,} nuclei have none of the classes of {self.taxonomy.name}; their type is 0")
        shared = [id_by_fold for id_by_fold in self._folds_of_image.values() if len(id_by_fold) > 1]
        for id_by_fold in shared[:_LISTED]:
            listed = ", ".join(f"{fold}: {name}" for fold, name in id_by_fold.items())
            lines.append(f"the same image is in several folds ({listed}); its scores are too good; keep it in one")
        if len(shared) > _LISTED:
            lines.append(f"{len(shared) - _LISTED:,} more images are in several folds")
        for source, published in PUBLISHED_FOLDS.items():
            present = {fold for name, fold in self.parts if name == source}
            if present and (missing := [fold for fold in published if fold not in present]):
                lines.append(f"{source} has no fold {', '.join(missing)}; its cross-validation needs all three")
        folds = {fold for _, fold in self.parts}
        if "train" in folds and "val" not in folds:
            lines.append(
                "there is no fold val, which training needs for validation; --val takes it from CoNSeP's tiles, and a "
                "QuPath folder may have a subfolder val"
            )
        return lines
