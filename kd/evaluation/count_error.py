"""Fit the error of counts: the distribution of the ratio true ÷ predicted nuclei over sources, slides and fields.

For image i of slide j of source s, ln((true + ½) ÷ (predicted + ½)) = mean + source_s + slide_j + field_i + noise_i:

- source and slide have one variance each, because images of one laboratory, and of one slide, have similar errors;
- the variance of the field is inversely proportional to the area of the image, as for a mean over independent fields;
- the noise comes from missed and false nuclei, whose numbers are assumed to be Poisson distributed; its variance is
  (missed + false) ÷ (true · predicted).

The variances are estimated by restricted maximum likelihood (REML). With few sources, the variance of sources would
often be zero by chance, and the error of a cohort would vanish with the number of its slides. So the standard deviation
of sources has the prior of Chung et al. (2013, A nondegenerate penalized likelihood estimator for variance parameters
in multilevel models), a density proportional to it. This moves an estimate of zero by about one standard error, and
multiplies a variance that is known well by (sources - 1) / (sources - 2).

The interval of a new slide is that of random-effects meta-analysis (Higgins et al. 2009, A re-evaluation of
random-effects meta-analysis), but Student's t distribution has (sources - 1) degrees of freedom, those of a variance of
as many values. Theirs has one fewer, as a compromise. With the prior, at least 90 % of the simulated intervals contain
the true number of a slide, a field or a cohort (`tests/kd/test_count_error.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from hover_batch.uncertainty import CountError

MIN_SOURCES = 3
"""Smallest number of sources; with two, the 90 % interval would extend 6.3 standard deviations to each side, and
the prior would leave the likelihood without a maximum."""


@dataclass(frozen=True)
class CountedImage:
    """Numbers of nuclei in one annotated image."""

    source: str
    """Source of the image."""
    slide: str
    """Slide or patient; unique within its source. An image of an unknown slide counts as a slide of its own."""
    true: int
    """Number of annotated nuclei."""
    predicted: int
    """Number of predicted nuclei."""
    paired: int
    """Number of pairs of an annotated and a predicted nucleus."""
    mm2: float
    """Area in mm²."""

    @property
    def log_ratio(self) -> float:
        """Natural logarithm of (true + ½) / (predicted + ½). The ½ keeps it finite."""
        return math.log((self.true + 0.5) / (self.predicted + 0.5))

    @property
    def noise(self) -> float:
        """Poisson variance of `log_ratio`: (unpaired + 1) / ((true + ½)·(predicted + ½)).

        `unpaired` is the number of missed and false nuclei, true + predicted - 2·paired. Paired nuclei do not count,
        because they cancel. 1 is added because ½ is added to both counts.
        """
        unpaired = self.true + self.predicted - 2 * self.paired
        return (unpaired + 1) / ((self.true + 0.5) * (self.predicted + 0.5))

    def is_covered(self, error: CountError) -> bool | None:
        """True if the interval of `error` for this image contains its true number of nuclei, False if not.

        None if there is no interval, because no nucleus was predicted.
        """
        interval = error.interval([(self.predicted, self.mm2)])
        return None if interval is None else bool(interval[0] <= self.true <= interval[1])


def fit_count_error(images: Sequence[CountedImage]) -> CountError | None:
    """Return the error of the counts in `images`, for the intervals of counts on slides.

    None if the images with nuclei are from fewer than MIN_SOURCES (3) sources.

    If no slide has several images, the variances of fields and slides cannot be separated. Their sum is then assigned
    to the slides, so it does not decrease with the area.

    `images`: images in which all nuclei are annotated. Images with neither annotated nor predicted nuclei are not used.
    """
    images = [image for image in images if image.true or image.predicted]
    sources = list(dict.fromkeys(image.source for image in images))
    if len(sources) < MIN_SOURCES:
        return None
    y = np.array([image.log_ratio for image in images])
    noise = np.array([image.noise for image in images])
    per_mm2 = 1 / np.array([image.mm2 for image in images])
    same_source = _same(image.source for image in images)
    same_slide = _same((image.source, image.slide) for image in images)
    fields_known = same_slide.sum() > len(images)
    parts = [same_source, same_slide, np.diag(per_mm2)]
    total = max(float(np.var(y)), 1e-4)
    scale = np.array([total, total, total / float(np.median(per_mm2))])

    def deviance(scaled: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        variances = scaled * scale
        v = np.tensordot(variances, parts, 1) + np.diag(noise)
        inverse = np.linalg.inv(v)
        information = inverse.sum()
        projected = inverse - np.outer(inverse.sum(axis=0), inverse.sum(axis=1)) / information
        residual = projected @ y
        gradient = np.array([(projected * part).sum() - residual @ part @ residual for part in parts])
        gradient[0] -= 1 / variances[0]
        prior = math.log(variances[0])  # twice the logarithm of the standard deviation
        return float(np.linalg.slogdet(v)[1] + math.log(information) + y @ residual) - prior, gradient * scale

    bounds = [(1e-6, 20), (0, 20), (0, 20 if fields_known else 0)]
    starts = [np.array(start) for start in ((0.3, 0.3, 0.3), (0.05, 0.05, 0.8))]
    tries = [minimize(deviance, x, jac=True, method="L-BFGS-B", bounds=bounds) for x in starts]
    source, slide, field = min(tries, key=lambda found: float(found.fun)).x * scale
    inverse = np.linalg.inv(source * same_source + slide * same_slide + np.diag(field * per_mm2 + noise))
    return CountError(
        mean=float(inverse.sum(axis=0) @ y / inverse.sum()),
        mean_variance=float(1 / inverse.sum()),
        source=float(source),
        slide=float(slide),
        field_mm2=float(field),
        unpaired=_unpaired(images),
        df=len(sources) - 1,
    )


def _same(labels: Iterable[object]) -> NDArray[np.float64]:
    """Return (n, n) float64: 1 where the labels of two images are equal, else 0. `labels`: one for each image."""
    _, index = np.unique([str(label) for label in labels], return_inverse=True)
    return np.asarray(index[:, None] == index, np.float64)


def _unpaired(images: Sequence[CountedImage]) -> float:
    """Return the number of missed and false nuclei per predicted nucleus, averaged over sources."""
    by_source: dict[str, NDArray[np.int64]] = {}
    for image in images:
        numbers = np.array([image.true + image.predicted - 2 * image.paired, image.predicted])
        by_source[image.source] = by_source.get(image.source, np.zeros(2, np.int64)) + numbers
    return float(np.mean([unpaired / max(predicted, 1) for unpaired, predicted in by_source.values()]))
