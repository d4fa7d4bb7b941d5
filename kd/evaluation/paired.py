"""Two models on the same images: the difference of their PQ, image by image, with a bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.errors import InputError
from kd.data.classes import PARTIAL
from kd.data.samples import Sample
from kd.evaluation.scores import plain
from kd.evaluation.tables import read_runs

RESAMPLES = 10_000
LEVEL = 0.95
AT_ONCE = 2**20
"""Draws that are held in memory together."""

Key = tuple[str, str, int]
"""What makes an annotated image the same: its id, its pixels, and the number of its nuclei."""
ImageRow = Mapping[str, Any]
"""As `SourceScores.images_to_json` gives it."""
COLUMNS = {"id", "sha256", "nuclei", "pq"}
"""Those that are compared."""
ByImage = Mapping[str, Sequence[ImageRow]]
"""By source."""


@dataclass(frozen=True)
class Baseline:
    """What a model is compared with: another one's scores, and the settings that they were found with."""

    name: str
    sha256: str
    sobel_norm: str
    min_area_px: int
    by_image: ByImage

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """From what `kd evaluate --json` wrote. InputError where it is something else."""
        (run,) = read_runs([path])
        held = run.report
        for rows in held["by_image"].values():
            if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= COLUMNS for row in rows):
                raise InputError(
                    f"{path}: its by_image lacks {', '.join(sorted(COLUMNS))}; run `kd evaluate --json` again"
                )
        return cls(run.label, held["sha256"], held["sobel_norm"], held["min_area_px"], held["by_image"])

    def check(self, samples: Iterable[Sample]) -> None:
        """InputError where these, without the sources in PARTIAL, are not the images that were scored."""
        wanted: dict[str, set[Key]] = {}
        for sample in samples:
            if sample.source not in PARTIAL:
                nuclei = len(np.unique(sample.instances[sample.instances > 0]))
                wanted.setdefault(sample.source, set()).add((sample.id, sample.image_sha256, nuclei))
        for source, keys in wanted.items():
            if other := len(
                keys ^ {(row["id"], row["sha256"], row["nuclei"]) for row in self.by_image.get(source, ())}
            ):
                raise InputError(
                    f"--against {self.name}: was scored on other images or annotations of {source} ({other} are not in "
                    "both); give the --data, --fold and --source of then, or its package"
                )


@dataclass(frozen=True)
class Paired:
    """Mean PQ of two models on the images of one source where both are defined. NaN where there is none.

    `low`, `high`: LEVEL interval of the difference, by resampling images; NaN for fewer than two. `better`, `worse`:
    images on which the new model has the higher PQ, or the lower.
    """

    source: str
    images: int
    new: float
    old: float
    difference: float
    low: float
    high: float
    better: int
    worse: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None."""
        return {name: plain(value) for name, value in asdict(self).items()}


def compared(new: ByImage, baseline: Baseline) -> list[Paired]:
    """Compare PQ on the same images, source by source, without those in PARTIAL, which have none."""
    return [_compared(source, rows, baseline.by_image[source]) for source, rows in new.items() if source not in PARTIAL]


def _compared(source: str, ours: Sequence[ImageRow], theirs: Sequence[ImageRow]) -> Paired:
    old_of = {row["id"]: row["pq"] for row in theirs}
    pairs = [(row["pq"], old_of[row["id"]]) for row in ours if None not in (row["pq"], old_of[row["id"]])]
    new, old = np.array(pairs, np.float64).reshape(-1, 2).T
    difference = new - old
    low, high = interval(difference)
    return Paired(
        source=source,
        images=len(pairs),
        new=_mean(new),
        old=_mean(old),
        difference=_mean(difference),
        low=low,
        high=high,
        better=int((difference > 0).sum()),
        worse=int((difference < 0).sum()),
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan


def interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `differences` (n,), the same at each call; NaN for n < 2."""
    n = len(differences)
    if n < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    sizes = np.diff([*range(0, RESAMPLES, max(1, AT_ONCE // n)), RESAMPLES])
    means = np.concatenate([differences[rng.integers(0, n, (size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
