"""Score a network on annotated images, by source: Dice, AJI, PQ, detection and class F1.

Scores are computed from stored maps (`hover_batch.model.heads.MapLayout`) with the post-processing of slides, so they
are valid for the tables that `segment` writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hover_batch.config import PostSettings
from hover_batch.errors import InputError
from hover_batch.metrics import (
    DETECTION_RADIUS_UM,
    aji,
    class_quality,
    count_pairs,
    dice,
    match_as_hovernet,
    panoptic_quality,
)
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.components import Splitter
from hover_batch.nuclei.image import nuclei_of, types_by_id
from hover_batch.nuclei.measure import Nuclei
from hover_batch.taxonomy import Taxonomy
from kd.data.datasets import Data, Sample
from kd.evaluation.remap import Remap, remaps_of
from kd.evaluation.scores import ImageScores, SourceScores, pooled
from kd.evaluation.shifts import UNCHANGED, Shift

MapsOf = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""Function from an image (y, x, 3) uint8 RGB to the stored maps (plane, y, x) uint8 of the same pixels."""

MOST_DISTANCES = 10**8
"""Largest number of annotated × predicted nuclei of an image; their distances take 3 GB, and minutes to assign."""


def evaluate(
    maps_of: MapsOf,
    samples: Iterable[Sample],
    splitter: Splitter | None,
    taxonomy: Taxonomy,
    *,
    min_area_px: int = PostSettings.min_area_px,
    shift: Shift = UNCHANGED,
) -> list[SourceScores]:
    """Return the scores of predicted maps, by source in the order of appearance.

    `maps_of`: function from an image (y, x, 3) uint8 RGB to its predicted maps (plane, y, x) uint8 (see `MapLayout`).
    `samples`: annotated images. `splitter`: post-processing of the maps; None for HoVerNet's with Sobel maps scaled by
    the extremes of each image. `taxonomy`: classes of both the samples and the maps. `min_area_px`: number of pixels
    below which predicted nuclei are dropped. `shift`: change that is applied to the image and annotations of each
    sample before prediction; scores are computed at the pixel size after it.

    Raises InputError if the product of the numbers of annotated and predicted nuclei in an image is above
    MOST_DISTANCES.
    """
    by_source: dict[str, list[ImageScores]] = {}
    layout = MapLayout(len(taxonomy.classes))
    for sample in samples:
        shifted = shift.apply(sample)
        instances, nuclei = nuclei_of(maps_of(shifted.image), splitter, layout, min_area_px)
        by_source.setdefault(sample.source, []).append(_score(shifted, instances, nuclei, taxonomy, shift.mpp))
    return [pooled(source, images, taxonomy) for source, images in by_source.items()]


def evaluate_data(
    maps_of: MapsOf,
    data: Data,
    splitter: Splitter | None,
    model: Taxonomy,
    *,
    min_area_px: int = PostSettings.min_area_px,
    shift: Shift = UNCHANGED,
) -> list[SourceScores]:
    """Return the scores by source, as `evaluate` does, for a model whose classes may differ from those of the data.

    Each source is scored in the classes that data and model have in common (see `kd.evaluation.remap`).

    `maps_of`: function from an image to maps in the classes of the model. `data`: annotated images. `splitter`:
    post-processing of the maps; None for HoVerNet's with Sobel maps scaled by the extremes of each image. `model`:
    classes of the model. `min_area_px`: number of pixels below which predicted nuclei are dropped. `shift`: change that
    is applied to each sample before prediction.

    Raises InputError if the common classes of a source are unknown (this is checked before the model runs), or if an
    image has too many nuclei to pair (see `evaluate`).
    """
    remaps = remaps_of(data, model)
    scores = []
    for source, remap in remaps.items():
        samples = (remap.sample(s) for s in data.samples if s.source == source)
        scores += evaluate(
            partial(_remapped, maps_of, remap),
            samples,
            splitter,
            remap.taxonomy,
            min_area_px=min_area_px,
            shift=shift,
        )
    return scores


def _remapped(maps_of: MapsOf, remap: Remap, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return remap.maps(maps_of(image))


def _score(sample: Sample, found: NDArray[np.int32], nuclei: Nuclei, taxonomy: Taxonomy, mpp: float) -> ImageScores:
    """Return the scores of one image.

    `found`: predicted instances (y, x); `nuclei`: their measurements; `mpp`: pixel size of the sample in µm.
    """
    n_types = len(taxonomy.classes)
    true_xy, true_types = centroids_and_types(sample, n_types)
    pred_xy = np.stack([nuclei.centroid_x, nuclei.centroid_y], axis=1)
    if len(true_xy) * len(pred_xy) > MOST_DISTANCES:
        raise InputError(
            f"{sample.id} of {sample.source}: {len(true_xy):,} annotated nuclei and {len(pred_xy):,} predicted ones "
            "are too many for HoVerNet's pairing, which needs all distances at once; cut the image into tiles"
        )
    pairs = match_as_hovernet(true_xy, pred_xy, DETECTION_RADIUS_UM / mpp)
    quality = panoptic_quality(sample.instances, found)
    pq_c = None
    if sample.types is not None:
        types = types_by_id(found, nuclei)
        pq_c = tuple(class_quality(sample.instances, found, true_types, types, c.id) for c in taxonomy.nuclei)
    return ImageScores(
        id=sample.id,
        sha256=sample.image_sha256,
        tissue=sample.tissue,
        dice=dice(sample.instances, found),
        aji=aji(sample.instances, found),
        dq=quality.dq,
        sq=quality.sq,
        pq=quality.pq,
        bpq=quality.pq if len(true_xy) else math.nan,
        pq_c=pq_c,
        pairs=count_pairs(pairs, true_types, nuclei.type_id, n_types),
    )


def centroids_and_types(sample: Sample, n_types: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return centroids (n, 2) float64 as x, y and types (n,) int64 of the nuclei in a sample, sorted by id.

    Centroids are in pixels, with pixel centres at +0.5. The type is the class of most pixels, the lower class id if
    several are equal; 0 if the sample has no types.

    `sample`: annotated image. `n_types`: number of classes, background included.
    """
    ys, xs = np.nonzero(sample.instances)
    ids, nucleus = np.unique(sample.instances[ys, xs], return_inverse=True)
    area = np.bincount(nucleus)
    xy = np.stack([np.bincount(nucleus, xs) / area, np.bincount(nucleus, ys) / area], axis=1) + 0.5
    if sample.types is None:
        return xy, np.zeros(len(ids), np.int64)
    pixels = np.bincount(nucleus * n_types + sample.types[ys, xs], minlength=len(ids) * n_types)
    return xy, pixels.reshape(len(ids), n_types).argmax(axis=1)
