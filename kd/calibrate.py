"""The four Sobel constants of a model, by search for the best panoptic quality on annotated images.

HoVerNet's reference scales its Sobel maps by the extremes of the window at hand, so that nuclei depend on where windows
fall. Constants do not; and as what the extremes of a window are good for is only to be near those of training, others
may be better. The search starts from the medians of the images' extremes and tries multiples of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.errors import InputError
from hover_batch.metrics import mean_defined, panoptic_quality
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.watershed import SobelConstants
from kd.datasets import Sample
from kd.evaluate import MapsOf, instances_of

SCALES = (1.0, 0.6, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05)

Planes = NDArray[np.uint8]
"""(3, y, x): np, h, v as stored."""


@dataclass(frozen=True)
class Trial:
    """One setting of the search and the PQ that it gives."""

    norm: str
    """fixed, or window: each image by its own extremes, as the reference does; for comparison, never chosen."""
    scale: float | None
    """Multiple of the medians; None for window."""
    pq: dict[str, float]
    """By source: the mean over its images."""
    mean: float
    """Over the sources, each counting the same."""


@dataclass(frozen=True)
class Calibration:
    """The chosen constants, the scale that made them, and all that was tried."""

    constants: SobelConstants
    scale: float
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """The search, for the model card (the constants have a place of their own there)."""
        return {"scale": self.scale, "trials": [asdict(t) for t in self.trials]}


def calibrate(maps_of: MapsOf, samples: Sequence[Sample], scales: Sequence[float] = SCALES) -> Calibration:
    """Search the constants that give the best mean PQ over the sources of `samples`.

    The network runs once per image; 3 bytes per pixel are kept. At equal PQ the larger scale is taken: it is nearer
    to what the reference does. Raises InputError where PQ is undefined because there is no nucleus at all.
    """
    layout = MapLayout
    predicted: list[tuple[Sample, Planes]] = []
    for sample in samples:
        maps = maps_of(sample.image)
        predicted.append((sample, maps[[layout.NP, layout.H, layout.V]]))
    middle = _medians([SobelConstants.of_window(h, v) for _, (_, h, v) in predicted])
    window = _trial(predicted, None, None)
    fixed = {s: _trial(predicted, s, scaled(middle, s)) for s in sorted(scales, reverse=True)}
    best = max(fixed, key=lambda s: fixed[s].mean)
    if np.isnan(fixed[best].mean):
        raise InputError("calibration needs annotated nuclei: neither the images nor the predictions hold any")
    return Calibration(scaled(middle, best), best, (window, *fixed.values()))


def scaled(constants: SobelConstants, scale: float) -> SobelConstants:
    """All four times `scale`."""
    return SobelConstants(**{name: value * scale for name, value in constants.to_json().items()})


def _medians(windows: Sequence[SobelConstants]) -> SobelConstants:
    names = windows[0].to_json()
    return SobelConstants(**{name: float(np.median([w.to_json()[name] for w in windows])) for name in names})


def _trial(predicted: Iterable[tuple[Sample, Planes]], scale: float | None, constants: SobelConstants | None) -> Trial:
    scores: dict[str, list[float]] = {}
    for sample, planes in predicted:
        pq = panoptic_quality(sample.instances, instances_of(planes, constants)).pq
        scores.setdefault(sample.source, []).append(pq)
    by_source = {source: mean_defined(values) for source, values in scores.items()}
    norm = "window" if constants is None else "fixed"
    return Trial(norm, scale, by_source, mean_defined(by_source.values()))
