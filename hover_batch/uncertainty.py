"""Errors of a model, measured on annotated images: calibrated probabilities, and intervals of numbers of nuclei.

The model card stores them (`hover_batch.model.card.Card.uncertainty`); `kd.evaluation` fits them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONFIDENCE = 0.9
"""Probability that an interval contains the true number."""
CALIBRATED = ("seg_score", "type_prob")
"""Columns of the table of nuclei that can be calibrated."""
_EPSILON = 1e-6
"""Smallest distance of a probability from 0 and 1; closer ones are moved, so that logarithms are finite."""


def calibrated_column(name: str) -> str:
    """Return the name of the column with the calibrated values of the column `name`, such as type_prob_calibrated."""
    return f"{name}_calibrated"


class _Numbers:
    """Base of dataclasses whose fields are finite numbers; those of type int are degrees of freedom, at least 1."""

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Return the object whose `to_json` returned `data`. ValueError if `data` is malformed or out of range."""
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # subclasses are dataclasses
        if not isinstance(data, Mapping) or sorted(data) != sorted(names):
            raise ValueError(f"must have the entries {', '.join(names)}")
        if not all(type(v) in (int, float) and math.isfinite(v) for v in data.values()):
            raise ValueError("must have finite numbers")
        return cls(**data)

    def to_json(self) -> dict[str, float]:
        """Return the fields as JSON values by name."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # subclasses are dataclasses


@dataclass(frozen=True)
class BetaScaling(_Numbers):
    """Beta calibration (Kull et al. 2017): logit(frequency) = a · ln p - b · ln(1 - p) + c.

    ValueError if a or b is negative.
    """

    a: float
    """Weight of ln p; at least 0, so that calibration does not change the order of nuclei."""
    b: float
    """Weight of -ln(1 - p), at least 0."""
    c: float
    """Constant term."""

    def __post_init__(self) -> None:
        if min(self.a, self.b) < 0:
            raise ValueError("a and b must not be negative")

    def apply(self, p: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the calibrated values of the probabilities `p`, as float64 of the same shape, from 0 to 1."""
        from scipy.special import expit

        log_p, minus_log_q = log_odds_parts(p)
        return expit(self.a * log_p + self.b * minus_log_q + self.c)


def log_odds_parts(p: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return ln p and -ln(1 - p), each float64 of the shape of `p`. Their sum is logit(p).

    `p`: probabilities of any shape. Those closer to 0 or 1 than 1e-6 are moved to that distance, so that both results
    are finite.
    """
    import numpy as np

    inside = np.clip(np.asarray(p, np.float64), _EPSILON, 1 - _EPSILON)
    return np.log(inside), -np.log1p(-inside)


@dataclass(frozen=True, kw_only=True)
class CountError(_Numbers):
    """Distribution of ln(true ÷ counted nuclei) for a slide from a new source: mean, and variance by origin.

    ValueError if a variance is negative or `df` is below 1.
    """

    mean: float
    """Mean over sources; multiply a count by exp(mean) to correct it."""
    mean_variance: float
    """Squared standard error of the mean."""
    source: float
    """Variance between sources: laboratory, stain, scanner, tissue. Slides of one source share it."""
    slide: float
    """Variance between slides of a source. It does not decrease with the area."""
    field_mm2: float
    """Variance between fields of a slide × area of a field in mm²."""
    unpaired: float
    """Missed and false nuclei per counted nucleus: their number varies as in a Poisson distribution."""
    df: int
    """Degrees of freedom of Student's t distribution: sources - 1."""

    def __post_init__(self) -> None:
        if min(self.mean_variance, self.source, self.slide, self.field_mm2, self.unpaired) < 0 or self.df < 1:
            raise ValueError("variances must not be negative, and df must be at least 1")

    def own_variance(self, nuclei: int, tissue_mm2: float) -> float:
        """Return the variance of ln(true ÷ counted nuclei) of one slide within its source.

        It is the sum of the variance between slides, the variance between fields, and the Poisson variance.

        `nuclei`: number of counted nuclei, above 0. `tissue_mm2`: area in mm² that was searched, above 0.
        """
        return self.slide + self.field_mm2 / tissue_mm2 + self.unpaired / nuclei

    def interval(
        self, slides: Sequence[tuple[int, float | None]], confidence: float = CONFIDENCE
    ) -> tuple[float, float] | None:
        """Return the prediction interval (low, high) of the true number of nuclei in slides of one new source.

        The slides share the error of their source; their own errors are independent. The result is None if no nuclei
        were counted, or if the area of a slide with nuclei is 0 or unknown.

        `slides`: number of counted nuclei, and area of tissue in mm², of each slide; None for an unknown area.
        `confidence`: probability, between 0 and 1, that the interval contains the true number.
        """
        from scipy.special import stdtrit

        total = sum(nuclei for nuclei, _ in slides)
        if not total:
            return None
        variance = self.mean_variance + self.source
        for nuclei, tissue_mm2 in slides:
            if nuclei:
                if not tissue_mm2:
                    return None
                variance += (nuclei / total) ** 2 * self.own_variance(nuclei, tissue_mm2)
        half = float(stdtrit(self.df, (1 + confidence) / 2)) * math.sqrt(variance)
        return total * math.exp(self.mean - half), total * math.exp(self.mean + half)


@dataclass(frozen=True)
class Uncertainty:
    """Measured errors of a model, valid only with the default post-processing, with which they were measured."""

    probabilities: Mapping[str, BetaScaling]
    """Calibrations by the name of the column (see CALIBRATED). seg_score: probability that an object is a nucleus;
    type_prob: probability that the class of a true nucleus is correct."""
    count: CountError | None
    """Error of the number of all nuclei; None if it was not measured."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the object whose `to_json` returned `data`, which may come from an untrusted file.

        ValueError if `data` is malformed.
        """
        probabilities = data.get("probabilities", {})
        if not data.keys() <= {"probabilities", "count"} or not isinstance(probabilities, Mapping):
            raise ValueError("must have the entries probabilities and count")
        if unknown := sorted(map(str, probabilities.keys() - {*CALIBRATED})):
            raise ValueError(f"{unknown[0]:.40}: only {' and '.join(CALIBRATED)} can be calibrated")
        return cls(
            {name: BetaScaling.from_json(values) for name, values in probabilities.items()},
            CountError.from_json(data["count"]) if "count" in data else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the errors as JSON values; those that were not measured have no entry.

        The keys are `probabilities` (for each column, an object with the numbers `a`, `b` and `c` of its BetaScaling)
        and `count` (an object with the fields of CountError).
        """
        values: dict[str, Any] = {}
        if self.probabilities:
            values["probabilities"] = {name: scaling.to_json() for name, scaling in self.probabilities.items()}
        return values if self.count is None else {**values, "count": self.count.to_json()}
