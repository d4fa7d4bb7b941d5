"""Estimate a density from a stratified random sample of clusters.

The density is the combined ratio estimator of the number of nuclei per tissue area (Cochran, Sampling Techniques, 3rd
ed. 1977, 6.11). Its variance is the usual linearisation with finite-population correction. Its interval is that of
Student's t; the degrees of freedom are Satterthwaite's (Cochran, 5.4), since one stratum may have most of the variance.
The error probability ERROR is divided equally among the looks (Bonferroni), so that the last interval contains the
density of the whole slide in about 90 % of all draws, whichever look is the last.

If a few clusters hold many of the nuclei, most small samples have too few of those, and with them too low a variance: a
run would stop just when its estimate is too low. So the upper end is that of Johnson (1978, Modified t tests and
confidence intervals for asymmetrical populations), which is further away if counts are skewed; the lower end is not
moved. The sample's own skewness would be too low as well, so the skewness of a stratum is taken as SKEWNESS times the
coefficient of variation of its clusters.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

MIN_CLUSTERS_WITH = 10
"""Smallest number of clusters with nuclei for an interval: with fewer, counts are too skewed for Student's t."""
SKEWNESS = 3.0
"""Skewness of the counts of clusters, divided by their coefficient of variation: that of a lognormal distribution with
a small coefficient. It is 2 for a gamma and 1 for a Poisson distribution."""
ERROR = 0.10
"""Largest probability that the final interval of a slide does not contain the density of the whole slide."""


@dataclass(frozen=True)
class Density:
    """Estimated number of nuclei per mm² of tissue, with its interval."""

    per_mm2: float
    """Estimate."""
    low: float | None
    """Lower end of the interval, at least 0; None if too few clusters have such nuclei for an interval."""
    high: float | None
    """Upper end of the interval; None as for `low`."""

    def is_within(self, share: float) -> bool:
        """Return whether the interval lies within ± `share` of the estimate; False if there is no interval.

        Only the upper end is compared, because the lower end is never further from the estimate.

        `share`: fraction of the estimate, such as 0.05 for 5 %.
        """
        return self.high is not None and self.high - self.per_mm2 <= share * self.per_mm2

    def to_json(self) -> dict[str, float | None]:
        """Return the density as a JSON object with the keys `per_mm2`, `low` and `high`."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Sample:
    """Clusters of a slide that are drawn up to a look (see `hover_batch.sampling.draw`)."""

    look: int
    """Number of the look, from 0."""
    looks: int
    """Number of looks, among which the error probability is divided."""
    tissue_mm2: NDArray[np.float64]
    """Tissue area of each cluster of the sample: (n,)."""
    stratum: NDArray[np.int64]
    """Stratum of each cluster of the sample: (n,), from 0. Each stratum has at least two of them."""
    clusters: NDArray[np.int64]
    """Number of all clusters of the slide in each stratum: (stratum,)."""
    tiles: int
    """Number of tiles of the whole slide."""

    def density(self, counts: NDArray[np.integer]) -> Density:
        """Return the estimated density of the whole slide, in nuclei per mm² of tissue, with its interval.

        There is no interval if fewer than MIN_CLUSTERS_WITH clusters have nuclei. It has no width if, in each stratum,
        all clusters are drawn, or all drawn clusters differ equally from the count that the estimate predicts for their
        tissue. The estimate is 0 if the sample has no tissue.

        `counts`: number of nuclei in each cluster of the sample, (n,) integers.
        """
        drawn = np.bincount(self.stratum, minlength=len(self.clusters))
        weight = (self.clusters / drawn)[self.stratum]
        area = float(weight @ self.tissue_mm2)
        density = float(weight @ counts) / area if area else 0.0
        if np.count_nonzero(counts) < MIN_CLUSTERS_WITH:
            return Density(density, None, None)
        residual = counts - density * self.tissue_mm2
        mean = np.bincount(self.stratum, residual) / drawn
        variance = np.bincount(self.stratum, (residual - mean[self.stratum]) ** 2) / (drawn - 1)
        of_strata = self.clusters * (self.clusters - drawn) * variance / drawn
        of_total = float(of_strata.sum())
        if not of_total:  # all clusters of a stratum are alike
            return Density(density, density, density)
        freedom = of_total**2 / float(np.sum(of_strata**2 / (drawn - 1)))
        quantile = float(t.ppf(1 - ERROR / self.looks / 2, freedom))
        mean_count = np.maximum(np.bincount(self.stratum, counts), 1) / drawn
        third = of_strata * (self.clusters - 2 * drawn) / drawn * SKEWNESS * variance / mean_count
        skewness = max(0.0, float(third.sum()) / of_total**1.5)
        error = math.sqrt(of_total) / area
        moved = skewness * (1 + 2 * quantile**2) / 6
        return Density(density, max(0.0, density - quantile * error), density + (quantile + moved) * error)
