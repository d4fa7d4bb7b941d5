"""Scores of a source from those of its images, averaged as the field does, each score its own way.

HoVerNet's: Dice, AJI, DQ, SQ, PQ are means over images; F_d and F_c count the nuclei of all images together.
PanNuke-metrics': bPQ and mPQ are means over the images of a tissue, then over the tissues; PQ of a class is the mean
over all images. They leave an image, or a class in an image, out where the annotation is empty; HoVerNet's PQ does so
only where the prediction is empty, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from hover_batch.metrics import PairCounts, class_scores, detection_scores, mean_defined
from hover_batch.taxonomy import Taxonomy
from kd.data.classes import PARTIAL


@dataclass(frozen=True)
class ImageScores:
    """Of one image. `pq_c`: by class in the order of their ids from 1 on, NaN where the image has none of the class;
    None where its types are not annotated. `sha256`: of the image, by which another evaluation knows it again."""

    id: str
    sha256: str
    tissue: str
    dice: float
    aji: float
    dq: float
    sq: float
    pq: float
    bpq: float
    pq_c: tuple[float, ...] | None
    pairs: PairCounts


@dataclass(frozen=True)
class TissueScores:
    """Means over the images of one tissue."""

    images: int
    bpq: float
    mpq: float


@dataclass(frozen=True)
class SourceScores:
    """Scores of one source; NaN where a score is undefined.

    Those of classes (`mpq`; `pq_c`, `f_c` by class name; `type_accuracy`) are of images with annotated types only, and
    NaN or empty where there are none. Of a source in PARTIAL only `recall` and `type_accuracy` are defined.
    """

    source: str
    classes: tuple[str, ...]
    images: int
    nuclei: int
    predicted: int
    dice: float
    aji: float
    dq: float
    sq: float
    pq: float
    bpq: float
    """Binary PQ as PanNuke-metrics has it: without images that have no nucleus, mean over tissues."""
    mpq: float
    """Multi-class PQ: mean over the classes of an image, its tissue's images, the tissues."""
    pq_c: dict[str, float]
    by_tissue: dict[str, TissueScores]
    """Images of no known tissue are under the empty name, one tissue among others."""
    f_d: float
    precision: float
    recall: float
    f_c: dict[str, float]
    type_accuracy: float
    """Share of the paired nuclei of known type whose type is right."""
    by_image: tuple[ImageScores, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for cards and reports, without those of images; what is undefined becomes None."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name != "by_image"}

    def images_to_json(self) -> list[dict[str, Any]]:
        """Rows with the id, hash, number of annotated nuclei, PQ, Dice and F_d of each image; None where undefined."""
        defined = self.source not in PARTIAL
        rows = []
        for image in self.by_image:
            counts = detection_scores(image.pairs)
            scores = {"pq": image.pq, "dice": image.dice, "f_d": counts.f1}
            rows.append(
                {"id": image.id, "sha256": image.sha256, "nuclei": counts.tp + counts.fn}
                | {name: plain(value) if defined else None for name, value in scores.items()}
            )
        return rows


def plain(value: Any) -> Any:
    """The value as JSON holds it; NaN becomes None."""
    if isinstance(value, dict):
        return {key: plain(held) for key, held in value.items()}
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, TissueScores):
        return plain(asdict(value))
    return None if isinstance(value, float) and math.isnan(value) else value


def pooled(source: str, images: Sequence[ImageScores], taxonomy: Taxonomy) -> SourceScores:
    """The scores of a source, of which there is one image at least."""
    counts = sum((i.pairs for i in images[1:]), images[0].pairs)
    detection = detection_scores(counts)
    typed = [i for i in images if i.pq_c is not None]
    f_c: dict[str, float] = {}
    pq_c: dict[str, float] = {}
    accuracy = math.nan
    if typed:
        types = sum((i.pairs for i in typed[1:]), typed[0].pairs)
        f_c = {c.name: class_scores(types, c.id).f1 for c in taxonomy.nuclei}
        pq_c = {c.name: mean_defined(i.pq_c[c.id - 1] for i in typed if i.pq_c) for c in taxonomy.nuclei}
        paired = types.table[1:-1, :-1]  # without those for which the taxonomy has no class
        accuracy = float(np.trace(paired[:, 1:]) / paired.sum()) if paired.any() else math.nan
    by_tissue = {
        tissue: _tissue([i for i in images if i.tissue == tissue]) for tissue in sorted({i.tissue for i in images})
    }
    scores = SourceScores(
        source=source,
        classes=tuple(c.name for c in taxonomy.nuclei),
        images=len(images),
        nuclei=detection.tp + detection.fn,
        predicted=detection.tp + detection.fp,
        dice=mean_defined(i.dice for i in images),
        aji=mean_defined(i.aji for i in images),
        dq=mean_defined(i.dq for i in images),
        sq=mean_defined(i.sq for i in images),
        pq=mean_defined(i.pq for i in images),
        bpq=mean_defined(t.bpq for t in by_tissue.values()),
        mpq=mean_defined(t.mpq for t in by_tissue.values()),
        pq_c=pq_c,
        by_tissue=by_tissue,
        f_d=detection.f1,
        precision=detection.precision,
        recall=detection.recall,
        f_c=f_c,
        type_accuracy=accuracy,
        by_image=tuple(images),
    )
    return scores if source not in PARTIAL else _of_partial(scores)


def _of_partial(scores: SourceScores) -> SourceScores:
    nan = math.nan
    return replace(
        scores, dice=nan, aji=nan, dq=nan, sq=nan, pq=nan, bpq=nan, mpq=nan, f_d=nan, precision=nan,
        pq_c={}, f_c={}, by_tissue={},
    )  # fmt: skip


def _tissue(images: Sequence[ImageScores]) -> TissueScores:
    bpq = mean_defined(i.bpq for i in images)
    return TissueScores(len(images), bpq, mean_defined(mean_defined(i.pq_c) for i in images if i.pq_c is not None))
