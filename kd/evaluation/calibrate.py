"""Search for the four Sobel constants of a model that give the best panoptic quality on annotated images.

HoVerNet's reference scales its Sobel maps by the extremes of the current window, so its nuclei depend on the position
of windows. With constants they do not. What matters is one number in each direction: the Sobel sum above which a pixel
is in the smooth inside of a nucleus and becomes a marker. (The scale itself only orders the flooding: between 0.03 and
1 times the medians, PQ changes by 0.001.) The *cut* is this number as a share of the median, over the images, of the
window's minimum. The reference's cut is about -0.06; a higher one splits fewer nuclei.
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
"""Loss of mean F_d, against the best cut, up to which a cut may be chosen. PQ rewards good outlines of the nuclei that
are found, and alone would choose a cut that merges one in ten; but the counts matter most in the tables."""
OTHERS = (
    *(Numbers(nucleus=p) for p in (0.4, 0.45, 0.55, 0.6)),
    *(Numbers(sobel=size) for size in (15, 27)),
    *(Numbers(opening=diameter) for diameter in (0, 3, 7)),
)
"""Other values for the numbers of HoVerNet's post-processing. The marker threshold is not among them, because changing
it is the same as changing the cut."""

Planes = NDArray[np.uint8]
"""(3, y, x): np, h, v as stored."""
Predicted = list[tuple[Sample, Planes]]


@dataclass(frozen=True)
class Trial:
    """Scores of one setting by source: PQ as mean over images; F_d and the count over all nuclei.

    F_d pairs as `match_centroids` does, since the pairs of HoVerNet's reference change abruptly with small differences.
    """

    norm: str
    """fixed, or window: each image by its own extremes, like the reference; for comparison only, never chosen."""
    cut: float | None
    """None for window."""
    pq: dict[str, float]
    f_d: dict[str, float]
    count: dict[str, float]
    """Nuclei found divided by nuclei annotated."""

    @property
    def mean_pq(self) -> float:
        """Unweighted mean over the sources."""
        return mean_defined(self.pq.values())

    @property
    def mean_f_d(self) -> float:
        """Unweighted mean over the sources."""
        return mean_defined(self.f_d.values())


@dataclass(frozen=True)
class Calibration:
    """The chosen constants, their cut, the medians that it is a share of, and all trials."""

    constants: SobelConstants
    cut: float
    medians: SobelConstants
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the search for the model card, which holds the constants in another place."""
        return {"cut": self.cut, "medians": self.medians.to_json(), "trials": [asdict(t) for t in self.trials]}


def predict_all(maps_of: MapsOf, samples: Iterable[Sample]) -> Predicted:
    """Return each sample with its stored np, h and v (3, y, x) uint8, predicted by `maps_of`."""
    stored = [MapLayout.NP, MapLayout.H, MapLayout.V]
    return [(s, np.ascontiguousarray(maps_of(s.image)[stored])) for s in samples]


def calibrate(maps_of: MapsOf, samples: Sequence[Sample], cuts: Sequence[float] = CUTS) -> Calibration:
    """Predict the images of `samples` by `maps_of`, then `search`."""
    return search(predict_all(maps_of, samples), cuts)


def search(predicted: Predicted, cuts: Sequence[float] = CUTS) -> Calibration:
    """Choose the cut of the best mean PQ among those whose mean F_d is within F_D_MARGIN of the best.

    Of equal cuts the lowest is chosen. Raises InputError if there is no nucleus at all, which leaves PQ undefined.
    """
    middle = medians([SobelConstants.of_window(h, v) for _, (_, h, v) in predicted])
    window = trial(predicted, None, None)
    fixed = [trial(predicted, cut, placed(middle, cut)) for cut in sorted(cuts)]
    most = max((t.mean_f_d for t in fixed), default=np.nan)
    allowed = [t for t in fixed if t.mean_f_d >= most - F_D_MARGIN]
    if not allowed or np.isnan(allowed[0].mean_pq):
        raise InputError(
            "calibration needs annotated nuclei, but neither the images nor the predictions hold any; give other images"
        )
    best = max(allowed, key=lambda t: t.mean_pq)
    assert best.cut is not None  # only a window has no cut
    return Calibration(placed(middle, best.cut), best.cut, middle, (window, *fixed))


def placed(medians: SobelConstants, cut: float) -> SobelConstants:
    """Return constants as far apart as the medians, shifted so that the marker threshold is `cut` times the minimum."""

    def moved(low: float, high: float) -> tuple[float, float]:
        start = cut * low - (1 - MARKER_ENERGY) * (high - low)
        return start, start + high - low

    return SobelConstants(*moved(medians.h_min, medians.h_max), *moved(medians.v_min, medians.v_max))


def medians(windows: Sequence[SobelConstants]) -> SobelConstants:
    """Return the median of each constant."""
    names = windows[0].to_json()
    return SobelConstants(**{name: float(np.median([w.to_json()[name] for w in windows])) for name in names})


def trial(predicted: Predicted, cut: float | None, constants: SobelConstants | None) -> Trial:
    """Score the instances that a slide would get; `constants` None: by each image's own extremes."""
    scores = _scores(predicted, lambda planes: instances_of(planes, constants))
    return Trial("window" if constants is None else "fixed", cut, *scores)


def try_others(predicted: Predicted, cut: float) -> dict[str, Trial]:
    """Try OTHERS at this cut, and HoVerNet's own numbers by the same slow steps; keys are such as 'nucleus 0.4'.

    Medians are computed anew for each Sobel kernel, because its sums differ.
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
