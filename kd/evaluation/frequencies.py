"""Calibrate probabilities, so that they agree with frequencies, and measure how well they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from hover_batch.uncertainty import BetaScaling, log_odds_parts

MIN_NUCLEI = 200
"""Smallest number of nuclei to which a calibration is fitted."""
MIN_EACH = 20
"""Smallest number of nuclei with each of the two outcomes."""
BINS = 10
"""Number of bins in a reliability diagram; all have the same number of nuclei."""


@dataclass(frozen=True)
class Outcomes:
    """Probabilities and outcomes of predicted nuclei in the images of one source."""

    source: str
    """Source of the images."""
    images: int
    """Number of images."""
    probability: NDArray[np.float64]
    """Predicted probability of each nucleus: (n,)."""
    outcome: NDArray[np.bool_]
    """Whether each object is a nucleus, or its class is correct: (n,)."""


@dataclass(frozen=True)
class Reliability:
    """Reliability diagram of one source."""

    images: int
    """Number of images."""
    nuclei: int
    """Number of nuclei."""
    ece: float
    """Expected calibration error: mean absolute difference between `predicted` and `observed` over the bins, weighted
    by their numbers of nuclei; NaN without nuclei."""
    predicted: tuple[float, ...]
    """Mean probability in each bin."""
    observed: tuple[float, ...]
    """Frequency in each bin."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, rounded so that cards stay small.

        `ece` has four decimals, and is None without nuclei; the values of the bins have three.
        """
        return {
            name: [round(v, 3) for v in value] if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        } | {"ece": round(self.ece, 4) if self.nuclei else None}


def reliability(outcomes: Outcomes, scaling: BetaScaling | None = None) -> Reliability:
    """Return the reliability diagram of `outcomes`, after the calibration `scaling` if it is given.

    The bins have equal numbers of nuclei (Nguyen & O'Connor 2015), so that no bin depends on a few of them.
    """
    p = outcomes.probability if scaling is None else scaling.apply(outcomes.probability)
    order = np.argsort(p, kind="stable")
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    predicted = [float(p[part].mean()) for part in bins]
    observed = [float(outcomes.outcome[part].mean()) for part in bins]
    distances = [abs(a - b) * len(part) for a, b, part in zip(predicted, observed, bins, strict=True)]
    ece = sum(distances) / len(p) if len(p) else np.nan
    return Reliability(outcomes.images, len(p), ece, tuple(predicted), tuple(observed))


def fit_scaling(sources: Sequence[Outcomes]) -> BetaScaling | None:
    """Return the beta calibration with the highest likelihood for `sources`.

    Each source has the same weight, so that one with many nuclei does not dominate the others.

    None if there are fewer than MIN_NUCLEI (200) nuclei in all, or fewer than MIN_EACH (20) with one of the outcomes.
    """
    sources = [source for source in sources if len(source.outcome)]
    outcome = np.concatenate([source.outcome for source in sources] or [np.zeros(0, bool)])
    if len(outcome) < MIN_NUCLEI or min(outcome.sum(), (~outcome).sum()) < MIN_EACH:
        return None
    weight = np.concatenate([np.full(len(s.outcome), 1 / len(s.outcome) / len(sources)) for s in sources])
    log_p, minus_log_q = log_odds_parts(np.concatenate([source.probability for source in sources]))
    columns = np.stack([log_p, minus_log_q, np.ones_like(log_p)])

    def loss(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logit = x @ columns
        entropy = np.logaddexp(0, logit) - outcome * logit
        return float(weight @ entropy), columns @ (weight * (expit(logit) - outcome))

    found = minimize(loss, np.array([1.0, 1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(0, 50), (0, 50), (-50, 50)])
    a, b, c = (float(value) for value in found.x)
    return BetaScaling(a, b, c)
