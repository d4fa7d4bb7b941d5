"""The four Sobel constants of a model, by search for the best panoptic quality on annotated images.

HoVerNet's reference scales its Sobel maps by the extremes of the window at hand, so that nuclei depend on where windows
fall. Constants do not. What matters of them is one number in each direction: the Sobel sum above which a pixel lies in
the calm inside of a nucleus, and marks it. (The scale behind it only orders the flooding: between 0.03 and 1 times the
medians PQ moves by 0.001.) As a share of the median over the images of the window's minimum, its deepest fall, this
is the *cut*. The reference's comes to about -0.06; a higher one divides less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.config import PostSettings
from hover_batch.errors import InputError
from hover_batch.metrics import DETECTION_RADIUS_UM, match_centroids, mean_defined, panoptic_quality
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.image import instances_of
from hover_batch.nuclei.markers import MARKER_ENERGY
from hover_batch.nuclei.watershed import SobelConstants, without_debris
from kd.data.datasets import MPP, Sample
from kd.evaluation.evaluate import MapsOf, true_nuclei
from kd.evaluation.variants import Numbers, extremes, from_stored, instances_by

CUTS = (-0.1, -0.05, 0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2)
F_D_MARGIN = 0.005
"""How much mean F_d a cut may cost against the best. PQ rewards the outlines of the nuclei that are found, and would
merge one in ten for it; counts are what tables are read for."""
OTHERS = (
    *(Numbers(nucleus=p) for p in (0.4, 0.45, 0.55, 0.6)),
    *(Numbers(sobel=size) for size in (15, 27)),
    *(Numbers(opening=diameter) for diameter in (0, 3, 7)),
)
"""What else the numbers of HoVerNet's post-processing might be. Its marker threshold is not among them: another one is
another cut."""

Planes = NDArray[np.uint8]
"""(3, y, x): np, h, v as stored."""
Predicted = list[tuple[Sample, Planes]]


@dataclass(frozen=True)
class Trial:
    """What one setting gives, by source: means over images of PQ; F_d and the count over all nuclei.

    F_d pairs as `match_centroids` does, since the assignment of HoVerNet's reference jumps with the numbers of both.
    """

    norm: str
    """fixed, or window: each image by its own extremes, as the reference does; for comparison, never chosen."""
    cut: float | None
    """None for window."""
    pq: dict[str, float]
    f_d: dict[str, float]
    count: dict[str, float]
    """Nuclei found for each one annotated."""

    @property
    def mean_pq(self) -> float:
        """Over the sources, each counting the same; likewise `mean_f_d`."""
        return mean_defined(self.pq.values())

    @property
    def mean_f_d(self) -> float:
        return mean_defined(self.f_d.values())


@dataclass(frozen=True)
class Calibration:
    """The chosen constants, the cut that made them, the medians that it is a share of, and all that was tried."""

    constants: SobelConstants
    cut: float
    medians: SobelConstants
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """The search, for the model card (the constants have a place of their own there)."""
        return {"cut": self.cut, "medians": self.medians.to_json(), "trials": [asdict(t) for t in self.trials]}


def predict_all(maps_of: MapsOf, samples: Iterable[Sample]) -> Predicted:
    """The network, once for each image; 3 bytes a pixel are kept."""
    stored = [MapLayout.NP, MapLayout.H, MapLayout.V]
    return [(s, np.ascontiguousarray(maps_of(s.image)[stored])) for s in samples]


def calibrate(maps_of: MapsOf, samples: Sequence[Sample], cuts: Sequence[float] = CUTS) -> Calibration:
    """`search` in what `maps_of` gives for the images of `samples`."""
    return search(predict_all(maps_of, samples), cuts)


def search(predicted: Predicted, cuts: Sequence[float] = CUTS) -> Calibration:
    """Of the cuts whose mean F_d is within F_D_MARGIN of the best, that of the best mean PQ; the lower among equals.

    Raises InputError where PQ is undefined because there is no nucleus at all.
    """
    middle = medians([SobelConstants.of_window(h, v) for _, (_, h, v) in predicted])
    window = trial(predicted, None, None)
    fixed = [trial(predicted, cut, placed(middle, cut)) for cut in sorted(cuts)]
    most = max((t.mean_f_d for t in fixed), default=np.nan)
    able = [t for t in fixed if t.mean_f_d >= most - F_D_MARGIN]
    if not able or np.isnan(able[0].mean_pq):
        raise InputError("calibration needs annotated nuclei: neither the images nor the predictions hold any")
    best = max(able, key=lambda t: t.mean_pq)
    assert best.cut is not None  # `fixed` holds no others
    return Calibration(placed(middle, best.cut), best.cut, middle, (window, *fixed))


def placed(medians: SobelConstants, cut: float) -> SobelConstants:
    """Constants as far apart as the medians, moved until the marker threshold lies at `cut` times the minimum."""

    def moved(low: float, high: float) -> tuple[float, float]:
        start = cut * low - (1 - MARKER_ENERGY) * (high - low)
        return start, start + high - low

    return SobelConstants(*moved(medians.h_min, medians.h_max), *moved(medians.v_min, medians.v_max))


def medians(windows: Sequence[SobelConstants]) -> SobelConstants:
    """The median of each constant."""
    names = windows[0].to_json()
    return SobelConstants(**{name: float(np.median([w.to_json()[name] for w in windows])) for name in names})


def trial(predicted: Predicted, cut: float | None, constants: SobelConstants | None) -> Trial:
    """Scores of the instances that slides would get; `constants` None: by each image's own extremes."""
    scores = _scores(predicted, lambda planes: instances_of(planes, constants))
    return Trial("window" if constants is None else "fixed", cut, *scores)


def try_others(predicted: Predicted, cut: float) -> dict[str, Trial]:
    """Trials of OTHERS at this cut, and of HoVerNet's own numbers by the same slow steps: 'nucleus 0.5', ….

    Another Sobel kernel has other sums: its medians are its own.
    """
    found = {}
    standard = Numbers()
    for numbers in (standard, *OTHERS):
        maps = [from_stored(planes) for _, planes in predicted]
        constants = placed(medians([extremes(m, numbers.sobel) for m in maps]), cut)

        def instances(
            planes: Planes, numbers: Numbers = numbers, constants: SobelConstants = constants
        ) -> NDArray[np.int32]:
            return without_debris(instances_by(from_stored(planes), constants, numbers), PostSettings.min_area_px)

        changed = [f"{n} {v:g}" for n, v in asdict(numbers).items() if v != getattr(standard, n)]
        found[changed[0] if changed else "as they are"] = Trial("fixed", cut, *_scores(predicted, instances))
    return found


def _scores(
    predicted: Predicted, instances: Callable[[Planes], NDArray[np.int32]]
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    pq: dict[str, list[float]] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for sample, planes in predicted:
        found = instances(planes)
        pq.setdefault(sample.source, []).append(panoptic_quality(sample.instances, found).pq)
        true_xy, _ = true_nuclei(replace(sample, types=None), 1)
        pred_xy, _ = true_nuclei(replace(sample, instances=found, types=None), 1)
        pairs = match_centroids(true_xy, pred_xy, DETECTION_RADIUS_UM / MPP)
        numbers = np.array([len(pairs), len(true_xy), len(pred_xy)])
        counts[sample.source] = counts.get(sample.source, np.zeros(3, np.int64)) + numbers
    f_d = {s: 2 * int(both) / int(true + pred) if true + pred else np.nan for s, (both, true, pred) in counts.items()}
    ratio = {s: int(pred) / int(true) if true else np.nan for s, (_, true, pred) in counts.items()}
    return {s: mean_defined(values) for s, values in pq.items()}, f_d, ratio
