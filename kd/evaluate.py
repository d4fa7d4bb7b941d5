"""Scores of a network on annotated images, by source: Dice, AJI, PQ, detection and class F1.

Everything is computed from stored maps (`hover_batch.model.heads.MapLayout`), by the post-processing that slides go
through, so that these are the scores of what users get.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.config import PostSettings
from hover_batch.metrics import (
    DETECTION_RADIUS_UM,
    PairCounts,
    aji,
    class_scores,
    count_pairs,
    detection_scores,
    dice,
    match_as_hovernet,
    mean_defined,
    panoptic_quality,
)
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.measure import measure
from hover_batch.nuclei.watershed import SobelConstants, instance_map, without_debris
from hover_batch.taxonomy import Taxonomy
from kd.datasets import MPP, Sample

MapsOf = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""RGB (y, x, 3) uint8 → the stored maps (plane, y, x) uint8 of the same pixels."""


@dataclass(frozen=True)
class SourceScores:
    """Scores of one source. Dice, AJI, DQ, SQ, PQ: means over its images; F_d, F_c: all its nuclei counted together.

    NaN where a score is undefined; `f_c` (by class name) and `type_accuracy` are of images with annotated types only,
    `f_c` is empty and `type_accuracy` NaN where there are none.
    """

    source: str
    images: int
    nuclei: int
    predicted: int
    dice: float
    aji: float
    dq: float
    sq: float
    pq: float
    f_d: float
    precision: float
    recall: float
    f_c: dict[str, float]
    type_accuracy: float
    """Share of the paired nuclei whose type is right."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for cards and reports; what is undefined becomes None."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return None if isinstance(value, float) and math.isnan(value) else value

        return {name: plain(value) for name, value in asdict(self).items()}


def evaluate(
    maps_of: MapsOf, samples: Iterable[Sample], constants: SobelConstants | None, taxonomy: Taxonomy
) -> list[SourceScores]:
    """Score the maps that `maps_of` gives for each sample's image, source by source in the order of appearance.

    `constants`: of the Sobel maps, or None to normalise each image by its own extremes, as the reference does.
    """
    by_source: dict[str, list[_ImageScores]] = {}
    for sample in samples:
        scores = _score(sample, maps_of(sample.image), constants, taxonomy)
        by_source.setdefault(sample.source, []).append(scores)
    return [_pool(source, images, taxonomy) for source, images in by_source.items()]


def instances_of(planes: NDArray[np.uint8], constants: SobelConstants | None) -> NDArray[np.int32]:
    """The instances (y, x) of stored np, h and v (3, y, x) that a run with default settings reports."""
    return without_debris(instance_map(planes[0], planes[1], planes[2], constants), PostSettings.min_area_px)


@dataclass(frozen=True)
class _ImageScores:
    dice: float
    aji: float
    dq: float
    sq: float
    pq: float
    pairs: PairCounts
    typed: bool


def _score(
    sample: Sample, maps: NDArray[np.uint8], constants: SobelConstants | None, taxonomy: Taxonomy
) -> _ImageScores:
    layout = MapLayout(len(taxonomy.classes))
    found = instances_of(maps[[layout.NP, layout.H, layout.V]], constants)
    nuclei = measure(found, maps, layout)
    true_xy, true_types = true_nuclei(sample, layout.n_types)
    pred_xy = np.stack([nuclei.centroid_x, nuclei.centroid_y], axis=1)
    pairs = match_as_hovernet(true_xy, pred_xy, DETECTION_RADIUS_UM / MPP)
    quality = panoptic_quality(sample.instances, found)
    return _ImageScores(
        dice=dice(sample.instances, found),
        aji=aji(sample.instances, found),
        dq=quality.dq,
        sq=quality.sq,
        pq=quality.pq,
        pairs=count_pairs(pairs, true_types, nuclei.type_id, layout.n_types),
        typed=sample.types is not None,
    )


def true_nuclei(sample: Sample, n_types: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Centroids (n, 2) x, y, pixel centres at +0.5, and types (n,) of the annotated nuclei, in the order of their ids.

    The type is that of most pixels, the lower among equals; 0 where the sample annotates none.
    """
    ys, xs = np.nonzero(sample.instances)
    ids, row = np.unique(sample.instances[ys, xs], return_inverse=True)
    area = np.bincount(row)
    xy = np.stack([np.bincount(row, xs) / area, np.bincount(row, ys) / area], axis=1) + 0.5
    if sample.types is None:
        return xy, np.zeros(len(ids), np.int64)
    votes = np.bincount(row * n_types + sample.types[ys, xs], minlength=len(ids) * n_types)
    return xy, votes.reshape(len(ids), n_types).argmax(axis=1)


def _pool(source: str, images: list[_ImageScores], taxonomy: Taxonomy) -> SourceScores:
    counts = sum((i.pairs for i in images[1:]), images[0].pairs)
    detection = detection_scores(counts)
    typed = [i.pairs for i in images if i.typed]
    f_c, accuracy = {}, math.nan
    if typed:
        types = sum(typed[1:], typed[0])
        f_c = {c.name: class_scores(types, c.id).f1 for c in taxonomy.nuclei}
        paired = types.table[:-1, :-1]
        accuracy = float(np.trace(paired) / paired.sum()) if paired.any() else math.nan
    return SourceScores(
        source=source,
        images=len(images),
        nuclei=detection.tp + detection.fn,
        predicted=detection.tp + detection.fp,
        dice=mean_defined(i.dice for i in images),
        aji=mean_defined(i.aji for i in images),
        dq=mean_defined(i.dq for i in images),
        sq=mean_defined(i.sq for i in images),
        pq=mean_defined(i.pq for i in images),
        f_d=detection.f1,
        precision=detection.precision,
        recall=detection.recall,
        f_c=f_c,
        type_accuracy=accuracy,
    )
