"""Draw clusters at random: strata, a random order in each of them, and sample sizes.

A look is a point at which the sample is large enough to compute the estimate and decide whether to stop. The sample of
a look contains that of the previous one. Within a stratum, each is a simple random sample without replacement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FRACTIONS = (0.05, 0.10, 0.20, 0.40)
"""Fractions of the clusters that are drawn at each look. They are fixed before the first look, because the error
probability of the intervals is divided among the looks."""
MIN_CLUSTERS = 20
"""Smallest sample: variances of fewer clusters are too uncertain."""
BY_TISSUE, BY_STAIN = 2, 3
"""Number of parts by tissue area, and of strata by stain in each part. Strata differ by at most one cluster."""
MIN_PER_STRATUM = 2
"""Smallest sample of a stratum, for its variance."""


@dataclass(frozen=True, eq=False)
class Draw:
    """Random order of the clusters of a slide in their strata."""

    stratum: NDArray[np.int64]
    """Stratum of each cluster: (n,), from 0."""
    rank: NDArray[np.int64]
    """Place of each cluster in the random order of its stratum: (n,), from 0."""

    @property
    def looks(self) -> tuple[int, ...]:
        """Number of clusters in the sample of each look, increasing; empty if the slide is too small to be sampled.

        The numbers are FRACTIONS of all clusters, rounded up, but at least MIN_CLUSTERS; equal numbers are one look. A
        slide with fewer than 50 clusters is too small.
        """
        n = len(self.stratum)
        if FRACTIONS[-1] * n < MIN_CLUSTERS:
            return ()
        return tuple(sorted({max(MIN_CLUSTERS, math.ceil(share * n)) for share in FRACTIONS}))

    def sample(self, look: int) -> NDArray[np.int64]:
        """Return the indices (k,) int64 of the clusters of a look, in ascending order.

        k may be slightly larger than `looks[look]`, because the number of clusters in each stratum is rounded up, to at
        least MIN_PER_STRATUM.

        `look`: index of the look in `looks`.
        """
        sizes = np.bincount(self.stratum)
        wanted = np.ceil(self.looks[look] * sizes / len(self.stratum))
        return np.flatnonzero(self.rank < np.maximum(MIN_PER_STRATUM, wanted)[self.stratum])


def draw(tissue: NDArray[np.float64], stain: NDArray[np.float64], seed: int) -> Draw:
    """Divide n clusters into strata by tissue area and stain, and put each stratum in random order.

    The clusters are divided by tissue area into BY_TISSUE parts of equal numbers, and each part by stain into BY_STAIN
    strata; numbers differ by at most one. The same arguments give the same result.

    `tissue`, `stain`: tissue area and mean stain of each cluster, (n,) float64, in any unit; only their order matters.
    `seed`: seed of the random numbers.
    """
    stratum = np.zeros(len(tissue), np.int64)
    by_tissue = np.array_split(np.argsort(tissue, kind="stable"), BY_TISSUE)
    parts = [
        part for half in by_tissue for part in np.array_split(half[np.argsort(stain[half], kind="stable")], BY_STAIN)
    ]
    rank = np.zeros(len(tissue), np.int64)
    rng = np.random.default_rng(seed)
    for number, part in enumerate(parts):
        stratum[part] = number
        rank[rng.permutation(part)] = np.arange(len(part))
    return Draw(stratum, rank)
