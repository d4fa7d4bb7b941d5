"""Average the scores of a source over its images, as in the publications that define them.

As in HoVerNet (Graham et al. 2019), Dice, AJI, DQ, SQ and PQ are means over images, and F_d and F_c count the nuclei of
all images together. As in PanNuke-metrics (Gamper et al. 2020), bPQ and mPQ are means over the images of a tissue, then
over the tissues, and PQ of a class is the mean over all images. PanNuke-metrics leaves out images, and classes in an
image, without annotated nuclei; HoVerNet's PQ leaves out an image only if it has no predicted nuclei either.
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
    """Scores of one image; NaN if a score is undefined."""

    id: str
    """Id of the image."""
    sha256: str
    """`Sample.image_sha256`, which identifies the image in other evaluations."""
    tissue: str
    """Tissue; empty if unknown."""
    dice: float
    """Dice coefficient of the foreground."""
    aji: float
    """Aggregated Jaccard index."""
    dq: float
    """Detection quality."""
    sq: float
    """Segmentation quality."""
    pq: float
    """Panoptic quality, DQ × SQ."""
    bpq: float
    """PQ; NaN if there are no annotated nuclei."""
    pq_c: tuple[float, ...] | None
    """PQ of each class from id 1 on, NaN if the image has no nucleus of the class; None if types are not annotated."""
    pairs: PairCounts
    """Counts of paired and unpaired nuclei by class."""


@dataclass(frozen=True)
class TissueScores:
    """Mean scores over the images of one tissue."""

    images: int
    """Number of images."""
    bpq: float
    """Binary PQ."""
    mpq: float
    """Multi-class PQ."""


@dataclass(frozen=True)
class SourceScores:
    """Scores of one source; NaN if a score is undefined.

    Scores of classes (`mpq`, `pq_c`, `f_c`, `type_accuracy`) are computed from images with annotated types only;
    without any, they are NaN or empty. For sources in PARTIAL only `recall` and `type_accuracy` are defined.
    """

    source: str
    """Name of the source."""
    classes: tuple[str, ...]
    """Names of the classes that are scored."""
    images: int
    """Number of images."""
    nuclei: int
    """Number of annotated nuclei."""
    predicted: int
    """Number of predicted nuclei."""
    dice: float
    """Dice coefficient of the foreground, mean over images."""
    aji: float
    """Aggregated Jaccard index, mean over images."""
    dq: float
    """Detection quality, mean over images."""
    sq: float
    """Segmentation quality, mean over images."""
    pq: float
    """Panoptic quality, mean over images."""
    bpq: float
    """Binary PQ of PanNuke-metrics: mean over the images of a tissue that have nuclei, then over tissues."""
    mpq: float
    """Multi-class PQ of PanNuke-metrics: mean over the classes of an image, then the images of a tissue, then
    tissues."""
    pq_c: dict[str, float]
    """PQ by class name, mean over images."""
    by_tissue: dict[str, TissueScores]
    """Scores by tissue; images of unknown tissue are one tissue with an empty name."""
    f_d: float
    """F1 score of detection, over all nuclei."""
    precision: float
    """Precision of detection, over all nuclei."""
    recall: float
    """Recall of detection, over all nuclei."""
    f_c: dict[str, float]
    """F1 score of classification by class name, over all nuclei."""
    type_accuracy: float
    """Fraction of the paired nuclei with an annotated class whose predicted class is correct."""
    by_image: tuple[ImageScores, ...]
    """Scores of each image."""

    def to_json(self) -> dict[str, Any]:
        """Return all fields except `by_image` as JSON values by name, for cards and reports; NaN becomes None.

        `by_tissue` has a dictionary of `images`, `bpq` and `mpq` for each tissue.
        """
        return {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name != "by_image"}

    def images_to_json(self) -> list[dict[str, Any]]:
        """Return one dictionary of JSON values per image, with the keys id, sha256, nuclei, pq, dice and f_d.

        `nuclei` is the number of annotated nuclei. pq, dice and f_d are None where they are undefined, and for sources
        in PARTIAL.
        """
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
    """Return `value` as a JSON value: a tuple becomes a list, TissueScores a dictionary, and NaN None.

    The values of dictionaries are converted in the same way; the elements of tuples and lists are not converted.
    """
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, TissueScores):
        return plain(asdict(value))
    return None if isinstance(value, float) and math.isnan(value) else value


def shown(value: float | str | None) -> str:
    """Return a score with four decimals, a number or a text as it is, and – for None and NaN."""
    if plain(value) is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def pooled(source: str, images: Sequence[ImageScores], taxonomy: Taxonomy) -> SourceScores:
    """Return the scores of a source, computed from the scores of its images.

    Dice, AJI, DQ, SQ, PQ and the PQ of each class are means over images. bPQ and mPQ are means over the images of a
    tissue, then over the tissues. F_d, precision, recall, F_c and the accuracy of types count the nuclei of all images
    together. Undefined scores are left out of means.

    For sources in PARTIAL, only `recall` and `type_accuracy` are defined.

    `source`: name of the source. `images`: scores of its images, at least one. `taxonomy`: classes in which they are
    scored.
    """
    pairs = sum((i.pairs for i in images[1:]), images[0].pairs)
    detection = detection_scores(pairs)
    typed = [i for i in images if i.pq_c is not None]
    f_c: dict[str, float] = {}
    pq_c: dict[str, float] = {}
    accuracy = math.nan
    if typed:
        typed_pairs = sum((i.pairs for i in typed[1:]), typed[0].pairs)
        f_c = {c.name: class_scores(typed_pairs, c.id).f1 for c in taxonomy.nuclei}
        pq_c = {c.name: mean_defined(i.pq_c[c.id - 1] for i in typed if i.pq_c) for c in taxonomy.nuclei}
        paired = typed_pairs.table[1:-1, :-1]  # without nuclei for which the taxonomy has no class
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
        **{name: mean_defined(getattr(i, name) for i in images) for name in ("dice", "aji", "dq", "sq", "pq")},
        **{name: mean_defined(getattr(t, name) for t in by_tissue.values()) for name in ("bpq", "mpq")},
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
