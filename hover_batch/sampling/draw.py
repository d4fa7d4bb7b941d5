"""Draw clusters at random: strata, the order in each of them, and the numbers at which the sample is looked at.

The sample of a look contains that of the look before. Within a stratum, each sample is a simple random one without
replacement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FRACTIONS = (0.05, 0.10, 0.20, 0.40)
"""Shares of the clusters at which the sample is looked at. They are fixed before the first look, since the error of the
intervals is divided among them."""
MIN_CLUSTERS = 20
"""Smallest sample: variances of fewer clusters are too uncertain."""
BY_TISSUE, BY_STAIN = 2, 3
"""Number of strata by tissue area, and of those by stain in each of them; all have the same number of clusters."""
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
        """Numbers of clusters at which the sample is looked at; empty for a slide too small to be sampled."""
        n = len(self.stratum)
        if FRACTIONS[-1] * n < MIN_CLUSTERS:
            return ()
        return tuple(sorted({max(MIN_CLUSTERS, math.ceil(share * n)) for share in FRACTIONS}))

    def sample(self, look: int) -> NDArray[np.int64]:
        """Return the indices of the clusters of a look, sorted. `look`: its index in `looks`.

        They are slightly more than `looks` says, since each stratum's share is rounded up.
        """
        sizes = np.bincount(self.stratum)
        wanted = np.ceil(self.looks[look] * sizes / len(self.stratum))
        return np.flatnonzero(self.rank < np.maximum(MIN_PER_STRATUM, wanted)[self.stratum])


def draw(tissue: NDArray[np.float64], stain: NDArray[np.float64], seed: int) -> Draw:
    """Divide clusters into strata by their tissue area and stain, each (n,), and put each stratum in random order.

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
