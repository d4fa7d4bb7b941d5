"""Search for the four Sobel constants of a model with the best panoptic quality on annotated images.

HoVerNet's reference implementation scales its Sobel maps by their minimum and maximum in the current window, so its
nuclei depend on the positions of windows. With constants they do not. Only one number in each direction matters: the
Sobel value above which a pixel is in the smooth interior of a nucleus and becomes a marker. (The scale only decides the
order of flooding: between 0.03 and 1 times the medians, PQ changes by 0.001.) The *cut* is this value divided by the
median, over images, of the window's minimum. The reference's cut is about -0.06; higher cuts split fewer nuclei.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.config import PostSettings
from hover_batch.errors import InputError
from hover_batch.metrics import DETECTION_RADIUS_UM, match_centroids, mean_defined, panoptic_quality
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.components import without_debris
from hover_batch.nuclei.image import instances_of
from hover_batch.nuclei.markers import MARKER_ENERGY
from hover_batch.nuclei.watershed import SobelConstants
from kd.data.datasets import MPP, Sample
from kd.evaluation.evaluate import MapsOf, centroids_and_types
from kd.evaluation.scores import plain
from kd.evaluation.variants import Parameters, extremes, from_stored, instances_by

CUTS = (-0.1, -0.05, 0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2)
"""Cuts to try."""
F_D_MARGIN = 0.005
"""Largest loss of mean F_d, compared with the cut of the best F_d, with which a cut may be chosen. PQ rewards good
outlines of detected nuclei and would choose a cut that merges one nucleus in ten, but tables need correct counts."""
OTHERS = (
    *(Parameters(nucleus=p) for p in (0.4, 0.45, 0.55, 0.6)),
    *(Parameters(sobel=size) for size in (15, 27)),
    *(Parameters(opening=diameter) for diameter in (0, 3, 7)),
)
"""Other values of HoVerNet's post-processing parameters to try. The marker threshold is not among them, because
changing it has the same effect as changing the cut."""

Planes = NDArray[np.uint8]
"""Stored np, h and v of an image, (3, y, x) uint8."""
Predicted = list[tuple[Sample, Planes]]
"""Samples with their predicted planes."""


@dataclass(frozen=True)
class Trial:
    """Scores of one setting of the post-processing, by source.

    F_d uses the pairs of `match_centroids`, because the pairs of HoVerNet's reference change abruptly with small
    differences.
    """

    norm: str
    """Scaling of the Sobel maps: fixed (constants), or window (extremes of each image, for comparison only)."""
    cut: float | None
    """Cut of the constants; None for window."""
    pq: dict[str, float]
    """Mean PQ over the images of a source."""
    f_d: dict[str, float]
    """F_d over all nuclei of a source."""
    count: dict[str, float]
    """Number of predicted nuclei divided by number of annotated nuclei."""

    @property
    def mean_pq(self) -> float:
        """Unweighted mean of PQ over the sources in which it is defined; NaN if there are none."""
        return mean_defined(self.pq.values())

    @property
    def mean_f_d(self) -> float:
        """Unweighted mean of F_d over the sources in which it is defined; NaN if there are none."""
        return mean_defined(self.f_d.values())


@dataclass(frozen=True)
class Calibration:
    """Result of a search for Sobel constants."""

    constants: SobelConstants
    """Chosen constants."""
    cut: float
    """Cut of the chosen constants."""
    medians: SobelConstants
    """Medians over the images of each image's extremes, which the cut refers to."""
    trials: tuple[Trial, ...]
    """Scores of all settings that were tried: first `window`, then each cut."""

    def to_json(self) -> dict[str, Any]:
        """Return `cut`, `medians` and `trials` as JSON values by name, for the card. NaN becomes None.

        `medians` has the keys h_min, h_max, v_min and v_max. `trials` is a list of dictionaries with the fields of
        `Trial`.

        The card stores the constants separately.
        """
        return {"cut": self.cut, "medians": self.medians.to_json(), "trials": [plain(asdict(t)) for t in self.trials]}


def predict_all(maps_of: MapsOf, samples: Iterable[Sample]) -> Predicted:
    """Run the model on the image of each sample. Return pairs of sample and planes, in order.

    The planes are the maps np, h and v, (3, y, x) uint8, in the quantisation that `MapLayout` describes.

    `maps_of`: function from an image (y, x, 3) uint8 RGB to its stored maps (plane, y, x) uint8 (see `MapLayout`).
    `samples`: annotated images.
    """
    stored = [MapLayout.NP, MapLayout.H, MapLayout.V]
    return [(s, np.ascontiguousarray(maps_of(s.image)[stored])) for s in samples]


def calibrate(maps_of: MapsOf, samples: Sequence[Sample], cuts: Sequence[float] = CUTS) -> Calibration:
    """Run the model on the images of `samples`, and return the Sobel constants that `search` finds on them.

    `maps_of`: function from an image (y, x, 3) uint8 RGB to its stored maps (see `MapLayout`). `samples`: annotated
    images, at least one. `cuts`: cuts to try, at least one (see `search`).

    Raises InputError if there are neither annotated nor predicted nuclei.
    """
    return search(predict_all(maps_of, samples), cuts)


def search(predicted: Predicted, cuts: Sequence[float] = CUTS) -> Calibration:
    """Try each cut. Return the constants of the best one, with the scores of all.

    The best cut has the highest mean PQ among those whose mean F_d is at most F_D_MARGIN below the highest mean F_d. If
    several cuts are equally good, the lowest is chosen.

    `predicted`: result of `predict_all`, not empty. `cuts`: cuts to try, at least one. A cut is the Sobel value above
    which a pixel becomes a marker, as a multiple of the median, over images, of the Sobel map's minimum.

    Raises InputError if there are neither annotated nor predicted nuclei, because PQ is then undefined.
    """
    median_extremes = medians([SobelConstants.of_window(h, v) for _, (_, h, v) in predicted])
    window = trial(predicted, None, None)
    fixed = [trial(predicted, cut, constants_at(median_extremes, cut)) for cut in sorted(cuts)]
    best_f_d = max((t.mean_f_d for t in fixed), default=np.nan)
    allowed = [t for t in fixed if t.mean_f_d >= best_f_d - F_D_MARGIN]
    if not allowed or np.isnan(allowed[0].mean_pq):
        raise InputError(
            "calibration needs annotated nuclei, but neither annotations nor predictions have any; give other images"
        )
    best = max(allowed, key=lambda t: t.mean_pq)
    assert best.cut is not None  # only `window` has no cut
    return Calibration(constants_at(median_extremes, best.cut), best.cut, median_extremes, (window, *fixed))


def constants_at(medians: SobelConstants, cut: float) -> SobelConstants:
    """Return Sobel constants with which pixels become markers if their Sobel value is above a cut.

    In each direction, minimum and maximum are shifted by the same amount.

    `medians`: median extremes of the Sobel maps. `cut`: the Sobel value, as a multiple of the median minimum.
    """

    def shifted(low: float, high: float) -> tuple[float, float]:
        # Pixels become markers above new_low + (1 - MARKER_ENERGY) · (high - low), which shall be cut · low.
        new_low = cut * low - (1 - MARKER_ENERGY) * (high - low)
        return new_low, new_low + high - low

    return SobelConstants(*shifted(medians.h_min, medians.h_max), *shifted(medians.v_min, medians.v_max))


def medians(windows: Sequence[SobelConstants]) -> SobelConstants:
    """Return the median of each of the four constants over several images.

    `windows`: extremes of the Sobel maps of each image, at least one.
    """
    names = windows[0].to_json()
    return SobelConstants(**{name: float(np.median([w.to_json()[name] for w in windows])) for name in names})


def trial(predicted: Predicted, cut: float | None, constants: SobelConstants | None) -> Trial:
    """Return the scores of predictions that are post-processed with given Sobel constants, in the same way as slides.

    `predicted`: result of `predict_all`. `cut`: cut of the constants; it is only recorded. `constants`: Sobel
    constants. With None for both, the Sobel maps are scaled by the extremes of each image.
    """
    scores = _scores(predicted, lambda planes: instances_of(planes, constants))
    return Trial("window" if constants is None else "fixed", cut, *scores)


def try_others(predicted: Predicted, cut: float) -> dict[str, Trial]:
    """Return the scores with each of OTHERS at the cut `cut`, by a name such as "nucleus 0.4".

    The entry "as they are" has HoVerNet's own parameters, for comparison. All entries use the slow `instances_by`. The
    medians are computed for each Sobel kernel, because their values depend on its size.

    `predicted`: result of `predict_all`. `cut`: Sobel value of markers as a multiple of the median minimum (see
    `search`).
    """
    trials = {}
    standard = Parameters()
    for parameters in (standard, *OTHERS):
        windows = [extremes(from_stored(planes), parameters.sobel) for _, planes in predicted]
        constants = constants_at(medians(windows), cut)
        changed = [f"{name} {v:g}" for name, v in asdict(parameters).items() if v != getattr(standard, name)]
        name = changed[0] if changed else "as they are"
        trials[name] = Trial("fixed", cut, *_scores(predicted, partial(_instances_by, constants, parameters)))
    return trials


def _instances_by(constants: SobelConstants, parameters: Parameters, planes: Planes) -> NDArray[np.int32]:
    return without_debris(instances_by(from_stored(planes), constants, parameters), PostSettings.min_area_px)


def _scores(
    predicted: Predicted, instances: Callable[[Planes], NDArray[np.int32]]
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    pq: dict[str, list[float]] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for sample, planes in predicted:
        found = instances(planes)
        pq.setdefault(sample.source, []).append(panoptic_quality(sample.instances, found).pq)
        true_xy, _ = centroids_and_types(replace(sample, types=None), 1)
        pred_xy, _ = centroids_and_types(replace(sample, instances=found, types=None), 1)
        pairs = match_centroids(true_xy, pred_xy, DETECTION_RADIUS_UM / MPP)
        numbers = np.array([len(pairs), len(true_xy), len(pred_xy)])
        counts[sample.source] = counts.get(sample.source, np.zeros(3, np.int64)) + numbers
    f_d = {s: 2 * int(both) / int(true + pred) if true + pred else np.nan for s, (both, true, pred) in counts.items()}
    ratio = {s: int(pred) / int(true) if true else np.nan for s, (_, true, pred) in counts.items()}
    return {s: mean_defined(values) for s, values in pq.items()}, f_d, ratio
