"""Compare two models in pairs: the difference of their PQ on the same images, with a bootstrap interval."""

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
"""Number of bootstrap samples."""
LEVEL = 0.95
"""Coverage of the interval."""
AT_ONCE = 2**20
"""Number of draws that are in memory at once."""

Key = tuple[str, str, int]
"""Identity of an annotated image: its id, the hash of its pixels, and its number of annotated nuclei."""
ImageRow = Mapping[str, Any]
"""Scores of one image, as from `SourceScores.images_to_json`."""
COLUMNS = {"id", "sha256", "nuclei", "pq"}
"""Keys that a row must have for a comparison."""
ByImage = Mapping[str, Sequence[ImageRow]]
"""Source → scores of its images."""


@dataclass(frozen=True)
class Baseline:
    """Scores of another model to compare with, and the settings that they were computed with."""

    name: str
    """Label of the evaluation."""
    sha256: str
    """Hash of the package (`Package.sha256`)."""
    sobel_norm: str
    """Scaling of the Sobel maps: fixed or window."""
    min_area_px: int
    """Smallest area in pixels of a predicted nucleus."""
    by_image: ByImage
    """Scores of each image, by source."""

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Read the scores from the file `path`, which `kd evaluate --json` wrote.

        Raises InputError if the file cannot be read, is not such a file, or lacks the scores of single images.
        """
        (run,) = read_runs([path])
        report = run.report
        for rows in report["by_image"].values():
            if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
                raise InputError(
                    f"{path}: its by_image lacks {', '.join(sorted(COLUMNS))}; run `kd evaluate --json` again"
                )
        return cls(run.label, report["sha256"], report["sobel_norm"], report["min_area_px"], report["by_image"])

    def check(self, samples: Iterable[Sample]) -> None:
        """Check that the baseline was scored on the same annotated images as those in `samples`, source by source.

        Images are compared by id, hash and number of nuclei. Only sources of `samples` that are not in PARTIAL are
        checked, because the others have no PQ.

        Raises InputError if the images or annotations of a source differ.
        """
        given: dict[str, set[Key]] = {}
        for sample in samples:
            if sample.source not in PARTIAL:
                nuclei = len(np.unique(sample.instances[sample.instances > 0]))
                given.setdefault(sample.source, set()).add((sample.id, sample.image_sha256, nuclei))
        for source, keys in given.items():
            scored = {(row["id"], row["sha256"], row["nuclei"]) for row in self.by_image.get(source, ())}
            if keys != scored:
                raise InputError(
                    f"--against {self.name}: was scored on other images or annotations of {source} "
                    f"({len(keys ^ scored)} are not in both); give the --data, --fold and --source of that evaluation, "
                    "or compare with the package"
                )


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not row.keys() >= COLUMNS:
        return False
    plain = isinstance(row["id"], str) and isinstance(row["sha256"], str) and type(row["nuclei"]) is int
    return plain and (row["pq"] is None or (type(row["pq"]) in (int, float) and 0 <= row["pq"] <= 1))


@dataclass(frozen=True)
class Paired:
    """Comparison of two models on the images of one source for which both have a PQ."""

    source: str
    """Name of the source."""
    images: int
    """Number of images."""
    new: float
    """Mean PQ of the new model; NaN without images."""
    old: float
    """Mean PQ of the baseline; NaN without images."""
    difference: float
    """Mean of new - old; NaN without images."""
    low: float
    """Lower end of the interval of the difference (see `interval`); NaN for fewer than two images."""
    high: float
    """Upper end of the interval."""
    better: int
    """Number of images on which the new model has the higher PQ."""
    worse: int
    """Number of images on which the new model has the lower PQ."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; NaN becomes None."""
        return {name: plain(value) for name, value in asdict(self).items()}


def compared(new: ByImage, baseline: Baseline) -> list[Paired]:
    """Return the comparison of a model with `baseline` for each source that is not in PARTIAL.

    Sources in PARTIAL have no PQ.

    `new`: scores of the model's images, by source. `baseline`: scores of the same images, as `Baseline.check` ensures.
    """
    return [_compared(source, rows, baseline.by_image[source]) for source, rows in new.items() if source not in PARTIAL]


def _compared(source: str, new_rows: Sequence[ImageRow], old_rows: Sequence[ImageRow]) -> Paired:
    old_of = {row["id"]: row["pq"] for row in old_rows}
    pairs = [(row["pq"], old_of[row["id"]]) for row in new_rows if None not in (row["pq"], old_of[row["id"]])]
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
    """Return the ends (low, high) of the bootstrap interval of the mean of `differences` (n,); NaN for n < 2.

    It is the percentile interval with the coverage LEVEL (0.95), from RESAMPLES (10,000) samples with a fixed seed.
    """
    n = len(differences)
    if n < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    resamples_at_once = max(1, AT_ONCE // n)
    means = []
    for done in range(0, RESAMPLES, resamples_at_once):
        drawn = rng.integers(0, n, (min(resamples_at_once, RESAMPLES - done), n))
        means.append(differences[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
