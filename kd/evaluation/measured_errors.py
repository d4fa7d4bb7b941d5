"""Measure the errors of a model on annotated images, for its card: those of its probabilities and of its counts.

A predicted nucleus is true if it is paired with an annotated one, one to one, at most DETECTION_RADIUS_UM apart. The
pairs are those of `match_centroids`, since a probability must depend on the nucleus and what is near it: with the pairs
of HoVerNet's reference, unpaired nuclei elsewhere in the image separate nuclei that are close to each other. Sources
that do not outline every nucleus are not used, not even for types, because their images do not show whether a predicted
nucleus is false.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.formatting import counted
from hover_batch.metrics import DETECTION_RADIUS_UM, match_centroids
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.components import Splitter
from hover_batch.nuclei.image import nuclei_of
from hover_batch.taxonomy import Taxonomy
from hover_batch.uncertainty import CALIBRATED, BetaScaling, Uncertainty
from kd.data.classes import fully_annotated, slide_of
from kd.data.samples import MPP, Sample
from kd.evaluation.count_error import MIN_SOURCES, CountedImage, fit_count_error
from kd.evaluation.evaluate import MapsOf, centroids_and_types
from kd.evaluation.frequencies import Outcomes, fit_scaling, reliability

MIN_IMAGES = 20
"""Smallest number of images for a calibration; notes mark sources with fewer, which say little about other images."""


@dataclass(frozen=True)
class PairedImage:
    """Predictions for one image, compared with its annotations."""

    count: CountedImage
    """Numbers of nuclei."""
    seg_score: NDArray[np.float64]
    """Score of each predicted nucleus: (n,)."""
    is_nucleus: NDArray[np.bool_]
    """Whether each predicted nucleus is paired: (n,)."""
    type_prob: NDArray[np.float64]
    """Probability of the predicted class of each paired nucleus with an annotated class: (m,); empty without types."""
    is_class: NDArray[np.bool_]
    """Whether the predicted class of each of these is correct: (m,)."""


def paired_images(
    maps_of: MapsOf, samples: Iterable[Sample], splitter: Splitter | None, taxonomy: Taxonomy
) -> list[PairedImage]:
    """Run the model on the images of `samples`, and pair predicted with annotated nuclei, image by image.

    Samples of sources that do not outline every nucleus are left out.

    `maps_of`: function from an image (y, x, 3) uint8 RGB to its stored maps (see `MapLayout`). `samples`: annotated
    images. `splitter`: post-processing of the model; None for HoVerNet's with Sobel maps scaled by the extremes of each
    image. `taxonomy`: classes of both the model and the samples.
    """
    n_types = len(taxonomy.classes)
    paired = []
    for sample in fully_annotated(samples):
        _, nuclei = nuclei_of(maps_of(sample.image), splitter, MapLayout(n_types))
        true_xy, true_types = centroids_and_types(sample, n_types)
        pairs = match_centroids(
            true_xy, np.stack([nuclei.centroid_x, nuclei.centroid_y], axis=1), DETECTION_RADIUS_UM / MPP
        )
        annotated, predicted = pairs.T
        typed = true_types[annotated] > 0
        paired.append(
            PairedImage(
                CountedImage(
                    source=sample.source,
                    slide=slide_of(sample),
                    true=len(true_xy),
                    predicted=len(nuclei),
                    paired=len(pairs),
                    mm2=sample.instances.size * MPP**2 / 1e6,
                ),
                nuclei.seg_score.astype(np.float64),
                np.isin(np.arange(len(nuclei)), predicted),
                nuclei.type_prob[predicted[typed]].astype(np.float64),
                nuclei.type_id[predicted[typed]] == true_types[annotated[typed]],
            )
        )
    return paired


def fit_scalings(images: Sequence[PairedImage]) -> dict[str, BetaScaling]:
    """Return the calibrations of the columns in CALIBRATED, by column, fitted on `images`.

    A column has no entry if `fit_scaling` returns None for it: it has fewer than MIN_NUCLEI (200) nuclei whose value is
    known to be right or wrong, or fewer than MIN_EACH (20) of either kind.
    """
    scalings = {name: fit_scaling(_outcomes(images, name)) for name in CALIBRATED}
    return {name: scaling for name, scaling in scalings.items() if scaling}


def fit_uncertainty(images: Sequence[PairedImage]) -> Uncertainty:
    """Return the calibrations and the count error for the card, fitted on `images`.

    A column's calibration is left out if `fit_scalings` does not return it. It is also left out if fewer than
    MIN_IMAGES (20) images have nuclei whose value is known to be right or wrong, because nuclei of one image are
    similar. The count error is None if the images with nuclei are from fewer than MIN_SOURCES (3) sources.
    """
    used = {name: sum(o.images for o in _outcomes(images, name)) for name in CALIBRATED}
    return Uncertainty(
        {name: scaling for name, scaling in fit_scalings(images).items() if used[name] >= MIN_IMAGES},
        fit_count_error([image.count for image in images]),
    )


def evidence(images: Sequence[PairedImage]) -> dict[str, Any]:
    """Test the calibrations and the count error on new sources. Return JSON values by source, for the card's metrics.

    For each source of `images`, they are fitted on all other sources and tested on this one. See `tried_on` for the
    entry of a source.
    """
    by_source: dict[str, Any] = {}
    for source in dict.fromkeys(image.count.source for image in images):
        own = [image for image in images if image.count.source == source]
        others = [image for image in images if image.count.source != source]
        by_source |= tried_on(own, others)
    return by_source


def tried_on(images: Sequence[PairedImage], fitted_on: Sequence[PairedImage]) -> dict[str, Any]:
    """Fit the calibrations and the count error on `fitted_on`, and evaluate them on `images`.

    Return JSON values by source of `images`, each with these keys:

    - `images`: number of its images;
    - the name of a column in CALIBRATED: reliability diagrams (see `Reliability.to_json`) `before` and `after`
      calibration; absent if no calibration could be fitted or the source has no nuclei to judge;
    - `covered`: number of images whose true count is in the interval, and `of`, number of images with an interval;
      absent if no count error could be fitted.

    Unlike `fit_uncertainty`, this needs no minimum number of images.
    """
    scalings, error = fit_scalings(fitted_on), fit_count_error([image.count for image in fitted_on])
    by_source: dict[str, Any] = {}
    for source in dict.fromkeys(image.count.source for image in images):
        own = [image for image in images if image.count.source == source]
        by_source[source] = {"images": len(own)}
        for name, scaling in scalings.items():
            for outcomes in _outcomes(own, name):
                diagrams = {"before": reliability(outcomes), "after": reliability(outcomes, scaling)}
                by_source[source][name] = {when: diagram.to_json() for when, diagram in diagrams.items()}
        if error is not None:
            hits = [hit for image in own if (hit := image.count.is_covered(error)) is not None]
            by_source[source] |= {"covered": sum(hits), "of": len(hits)}
    return by_source


def notes(fitted: Uncertainty, by_source: Mapping[str, Any]) -> list[str]:
    """Return lines for users: what could not be fitted, and how well the rest holds on each source.

    `fitted`: result of `fit_uncertainty`. `by_source`: result of `evidence`.
    """
    lines = [
        f"{name}: not calibrated; that needs {MIN_IMAGES} images in which all nuclei are outlined"
        + (", with types" if name == "type_prob" else "")
        for name in CALIBRATED
        if name not in fitted.probabilities
    ]
    if fitted.count is None:
        lines.append(f"count intervals: none; they need {MIN_SOURCES} sources that outline all nuclei")
    for source, found in by_source.items():
        few = f" ({counted(found['images'], 'image')}: few)" if found["images"] < MIN_IMAGES else ""
        for name in CALIBRATED:
            if name in found:
                before, after = found[name]["before"]["ece"], found[name]["after"]["ece"]
                fails = "; the calibration fails here" if after >= before else ""
                lines.append(f"{source}, by the other sources: {name}: ECE {before:.3f} → {after:.3f}{fails}{few}")
        if "of" in found:
            lines.append(
                f"{source}, by the other sources: {found['covered']} of {found['of']} counts are in their interval{few}"
            )
    return lines


def _outcomes(images: Sequence[PairedImage], column: str) -> list[Outcomes]:
    """Return the outcomes of a column in CALIBRATED, one for each source that has any."""
    found = []
    for source in dict.fromkeys(image.count.source for image in images):
        own = [image for image in images if image.count.source == source]
        pairs = [(i.seg_score, i.is_nucleus) if column == "seg_score" else (i.type_prob, i.is_class) for i in own]
        pairs = [(p, right) for p, right in pairs if len(p)]
        if pairs:
            probability, outcome = (np.concatenate(column) for column in zip(*pairs, strict=True))
            found.append(Outcomes(source, len(pairs), probability, outcome))
    return found
