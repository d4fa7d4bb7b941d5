"""Agreement of predicted with true nuclei: panoptic quality, AJI, Dice, detection and class F1.

Instance maps are (y, x) integer arrays, 0 = background, with arbitrary positive ids. All scores of two maps follow from
their joint histogram (pixels with true id t and predicted id p), computed in one pass over the pixels.

Averaging follows the reference implementation of HoVerNet: PQ, AJI and Dice are means over images; detections and
classes are counted over all images together (`PairCounts` add up). Scores of two maps without nuclei are undefined
(NaN), and `mean_defined` ignores them. PQ of a class follows PanNuke-metrics, where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

DETECTION_RADIUS_UM = 3.0
"""Maximum distance in µm of paired centroids: 12 px at 40× (Graham et al. 2019, section 4.3)."""


@dataclass(frozen=True)
class PanopticQuality:
    """Panoptic quality with its factors and the underlying counts; see `panoptic_quality`."""

    dq: float
    """Detection quality."""
    sq: float
    """Segmentation quality."""
    pq: float
    """Panoptic quality, DQ · SQ."""
    tp: int
    """Number of pairs."""
    fp: int
    """Number of unpaired predicted instances."""
    fn: int
    """Number of unpaired true instances."""
    iou_sum: float
    """Sum of IoU over the `tp` pairs."""


def panoptic_quality(true: NDArray[np.integer], pred: NDArray[np.integer]) -> PanopticQuality:
    """Return the PQ of two instance maps (y, x) without regard to types (Kirillov et al. 2019, equation 1).

    The result also has the factors and counts of PQ. Instances are paired if their IoU exceeds 0.5, so that each has at
    most one partner. DQ = TP / (TP + FP/2 + FN/2), SQ = mean IoU of the pairs (0 without pairs), PQ = DQ · SQ. Each
    lies between 0 and 1 (perfect); all three are NaN if both maps are empty. HoVerNet's reference implementation
    divides by TP + 1e-6 in SQ; here it is TP.

    `true`, `pred`: instance ids, 0 = background. ValueError for maps of different shapes.
    """
    overlap = _Overlap.of(true, pred)
    matched = overlap.iou[overlap.iou > 0.5]
    tp, iou_sum = len(matched), float(matched.sum())
    fp, fn = overlap.n_pred - tp, overlap.n_true - tp
    if tp + fp + fn == 0:
        return PanopticQuality(math.nan, math.nan, math.nan, 0, 0, 0, 0.0)
    dq = tp / (tp + 0.5 * fp + 0.5 * fn)
    sq = iou_sum / tp if tp else 0.0
    return PanopticQuality(dq, sq, dq * sq, tp, fp, fn, iou_sum)


def class_quality(
    true: NDArray[np.integer],
    pred: NDArray[np.integer],
    true_types: NDArray[np.integer],
    pred_types: NDArray[np.integer],
    type_id: int,
) -> float:
    """Return the PQ of the instances of the class `type_id`, 0 to 1 (perfect). All other instances count as background.

    NaN if no true instance has the class, even if it is predicted. PanNuke-metrics, where class PQ comes from, also
    counts false positives only in images that contain the class.

    `true`, `pred`: instance maps (y, x), 0 = background. `true_types` (n,), `pred_types` (m,): class ids of their
    instances, in ascending order of the instances' ids.

    ValueError if the numbers of types and instances differ, or the maps have different shapes.
    """
    true_of_class = _only(true, true_types == type_id)
    pred_of_class = _only(pred, pred_types == type_id)
    return panoptic_quality(true_of_class, pred_of_class).pq if true_of_class.any() else math.nan


def _only(instances: NDArray[np.integer], chosen: NDArray[np.bool_]) -> NDArray[np.integer]:
    """Return the map with only the `chosen` (n,) instances, in the order of their ids."""
    ids = np.unique(instances[instances > 0])
    if len(ids) != len(chosen):
        raise ValueError(f"types of {len(chosen)} instances, but the map holds {len(ids)}")
    chosen_ids = np.zeros(int(instances.max(initial=0)) + 1, bool)
    chosen_ids[ids[chosen]] = True
    return np.where(chosen_ids[instances], instances, 0)


def aji(true: NDArray[np.integer], pred: NDArray[np.integer]) -> float:
    """Return the aggregated Jaccard index of two instance maps (y, x) (Kumar et al. 2017, algorithm 1).

    Each true instance that overlaps predictions is paired with the one of highest IoU (if equal, the one with the
    larger intersection, then the one with the lower id, as in HoVerNet's reference). A prediction may be in several
    pairs. The index, from 0 to 1 (perfect), is the sum of the pairs' intersections, divided by the sum of their unions
    plus the areas of all unpaired instances. NaN if both maps are empty.

    `true`, `pred`: instance ids, 0 = background. ValueError for maps of different shapes.
    """
    overlap = _Overlap.of(true, pred)
    order = np.lexsort((overlap.pred_id, -overlap.intersection, -overlap.iou, overlap.true_id))
    paired_true, first = np.unique(overlap.true_id[order], return_index=True)
    best = order[first]  # of each true instance, its overlap with the best prediction
    paired_pred = np.unique(overlap.pred_id[best])
    unpaired_true_area = overlap.true_area.sum() - overlap.true_area[paired_true].sum()
    unpaired_pred_area = overlap.pred_area.sum() - overlap.pred_area[paired_pred].sum()
    total = overlap.union[best].sum() + unpaired_true_area + unpaired_pred_area
    return float(overlap.intersection[best].sum() / total) if total else math.nan


def dice(true: NDArray[np.integer], pred: NDArray[np.integer]) -> float:
    """Return the Dice score of the foregrounds of two instance maps (y, x), 2·|∩| / (|true| + |pred|) in pixels.

    The score is 1 for equal foregrounds, 0 for disjoint ones, and NaN if both maps are empty.

    `true`, `pred`: instance ids, 0 = background. ValueError for maps of different shapes.
    """
    _check_maps(true, pred)
    true_foreground, pred_foreground = true > 0, pred > 0
    total = int(true_foreground.sum()) + int(pred_foreground.sum())
    return 2 * int((true_foreground & pred_foreground).sum()) / total if total else math.nan


def mean_defined(scores: Iterable[float]) -> float:
    """Return the mean of the `scores` that are not NaN; NaN if there are none."""
    defined = [score for score in scores if not math.isnan(score)]
    return sum(defined) / len(defined) if defined else math.nan


@dataclass(frozen=True)
class _Overlap:
    """Joint histogram of two instance maps: one entry per pair of instances that share pixels."""

    true_id: NDArray[np.int64]
    pred_id: NDArray[np.int64]
    intersection: NDArray[np.int64]
    union: NDArray[np.int64]
    iou: NDArray[np.float64]
    true_area: NDArray[np.int64]
    """Area in pixels by id; 0 for the background."""
    pred_area: NDArray[np.int64]
    """Area in pixels by id; 0 for the background."""

    @property
    def n_true(self) -> int:
        """Number of true instances."""
        return int(np.count_nonzero(self.true_area))

    @property
    def n_pred(self) -> int:
        """Number of predicted instances."""
        return int(np.count_nonzero(self.pred_area))

    @classmethod
    def of(cls, true: NDArray[np.integer], pred: NDArray[np.integer]) -> _Overlap:
        """Count the pixels of two maps (y, x). ValueError for maps of different shapes."""
        _check_maps(true, pred)
        foreground = (true > 0) | (pred > 0)
        t, p = true[foreground].astype(np.int64), pred[foreground].astype(np.int64)
        shape = (int(t.max(initial=0)) + 1, int(p.max(initial=0)) + 1)
        joint = coo_matrix((np.ones(len(t), np.int64), (t, p)), shape).tocsr().tocoo()  # CSR sums duplicates
        rows, columns = (c.astype(np.int64) for c in joint.coords)
        true_area = np.bincount(rows, joint.data, minlength=1).astype(np.int64)
        pred_area = np.bincount(columns, joint.data, minlength=1).astype(np.int64)
        true_area[0] = pred_area[0] = 0
        both = (rows > 0) & (columns > 0)
        rows, columns, shared = rows[both], columns[both], joint.data[both]
        union = true_area[rows] + pred_area[columns] - shared
        return cls(rows, columns, shared, union, shared / union, true_area, pred_area)


def _check_maps(true: NDArray[np.integer], pred: NDArray[np.integer]) -> None:
    if true.shape != pred.shape:
        raise ValueError(f"instance maps of different shape: true {true.shape}, predicted {pred.shape}")


def match_centroids(true_xy: NDArray[np.floating], pred_xy: NDArray[np.floating], radius: float) -> NDArray[np.intp]:
    """Pair centroids one to one: as many pairs as possible at distances ≤ `radius`, with the least total distance.

    Return the pairs as an intp array (k, 2) of indices into `true_xy` and `pred_xy`, sorted by the first; (0, 2) if
    there are none.

    Pairs beyond the radius never count, so the assignment splits into the connected components of the graph of all
    pairs within the radius. Each is solved exactly by the Hungarian method. The total cost is nearly linear in the
    number of nuclei, so whole slides can be compared. For comparison with published results use `match_as_hovernet`.

    `true_xy` (n, 2), `pred_xy` (m, 2): positions (x, y), in the unit of `radius`.
    """
    n, m = len(true_xy), len(pred_xy)
    if n == 0 or m == 0:
        return np.empty((0, 2), np.intp)
    candidates = cKDTree(true_xy).sparse_distance_matrix(cKDTree(pred_xy), radius, output_type="ndarray")
    i, j, distance = candidates["i"], candidates["j"], candidates["v"]
    graph = coo_matrix((np.ones(len(i), bool), (i, n + j)), (n + m, n + m))
    component = connected_components(graph, directed=False)[1][i]
    # Sort by component, so that each is a slice start:end.
    order = np.argsort(component, kind="stable")
    i, j, distance = i[order], j[order], distance[order]
    starts = np.flatnonzero(np.diff(component[order], prepend=-1))
    ends = np.append(starts[1:], len(i))
    has_one_pair = ends - starts == 1  # most nuclei have exactly one candidate
    pairs = [np.stack([i[starts[has_one_pair]], j[starts[has_one_pair]]], axis=1)]
    for start, end in zip(starts[~has_one_pair], ends[~has_one_pair], strict=True):
        pairs.append(_assign(i[start:end], j[start:end], distance[start:end], radius))
    all_pairs = np.concatenate(pairs)
    return all_pairs[np.argsort(all_pairs[:, 0])]


def match_as_hovernet(true_xy: NDArray[np.floating], pred_xy: NDArray[np.floating], radius: float) -> NDArray[np.intp]:
    """Pair centroids as HoVerNet's reference implementation does, for comparison with published results.

    Return the pairs as an intp array (k, 2) of indices into `true_xy` and `pred_xy`, sorted by the first; (0, 2) if
    there are none.

    All centroids are assigned together by least total distance; then pairs beyond the radius are dropped. Unpaired
    nuclei affect that assignment, so there are sometimes fewer pairs than `match_centroids` finds, never more: on
    annotated tiles with noisy predictions, F_d is 1 to 4 points lower. The cost is cubic in the number of nuclei, so
    use it for tiles, not for slides.

    `true_xy` (n, 2), `pred_xy` (m, 2): positions (x, y), in the unit of `radius`.
    """
    distance = np.linalg.norm(np.asarray(true_xy, np.float64)[:, None] - np.asarray(pred_xy)[None], axis=2)
    rows, columns = linear_sum_assignment(distance)
    within = distance[rows, columns] <= radius
    return np.stack([rows[within], columns[within]], axis=1)


def _assign(i: NDArray[np.intp], j: NDArray[np.intp], distance: NDArray[np.float64], radius: float) -> NDArray[np.intp]:
    """Return the best pairs (k, 2) of one connected component, given by its edges (e,) and their lengths."""
    rows, row = np.unique(i, return_inverse=True)
    columns, column = np.unique(j, return_inverse=True)
    # Exceeds the total of any set of pairs within the radius, so that one more pair always wins.
    apart = (radius + 1) * (min(len(rows), len(columns)) + 1)
    cost = np.full((len(rows), len(columns)), apart, np.float64)
    cost[row, column] = distance
    a, b = linear_sum_assignment(cost)
    within = cost[a, b] < apart
    return np.stack([rows[a[within]], columns[b[within]]], axis=1)


@dataclass(frozen=True)
class PairCounts:
    """Counts of paired and unpaired nuclei by type. `+` adds the counts of several images."""

    table: NDArray[np.int64]
    """(n + 1, n + 1) int64: rows are true types 0 … n - 1, columns predicted types. The last row counts unpaired
    predicted nuclei, the last column unpaired true nuclei."""

    def __add__(self, other: PairCounts) -> PairCounts:
        return PairCounts(self.table + other.table)


def count_pairs(
    pairs: NDArray[np.intp], true_types: NDArray[np.integer], pred_types: NDArray[np.integer], n_types: int
) -> PairCounts:
    """Return the numbers of pairs and of unpaired nuclei, by their types.

    `pairs` (k, 2): indices of true and predicted nuclei, as `match_centroids` returns them. `true_types` (n,),
    `pred_types` (m,): type ids 0 … `n_types` - 1 of all nuclei; all 0 to count detections only. `n_types`: number of
    types.

    ValueError for other type ids.
    """
    for name, types in (("true", true_types), ("predicted", pred_types)):
        if len(types) and not 0 <= int(types.min()) <= int(types.max()) < n_types:
            raise ValueError(f"{name} types range from {types.min()} to {types.max()}, not within 0 … {n_types - 1}")
    true_index, pred_index = pairs[:, 0], pairs[:, 1]
    missed, extra = np.delete(true_types, true_index), np.delete(pred_types, pred_index)
    row = np.concatenate([true_types[true_index], missed, np.full(len(extra), n_types)]).astype(np.int64)
    column = np.concatenate([pred_types[pred_index], np.full(len(missed), n_types), extra]).astype(np.int64)
    side = n_types + 1
    table = np.bincount(row * side + column, minlength=side * side).reshape(side, side)
    return PairCounts(table)


@dataclass(frozen=True)
class DetectionScores:
    """Scores of detection, regardless of types, from 0 to 1; a score is NaN if its denominator is 0."""

    f1: float
    """F_d, the harmonic mean of precision and recall."""
    precision: float
    """Fraction of the predicted nuclei that are paired."""
    recall: float
    """Fraction of the true nuclei that are paired."""
    tp: int
    """Number of pairs."""
    fp: int
    """Number of unpaired predicted nuclei."""
    fn: int
    """Number of unpaired true nuclei."""


def detection_scores(counts: PairCounts) -> DetectionScores:
    """Return F_d = 2·TP / (2·TP + FP + FN) with precision and recall (Graham et al. 2019, section 4.3).

    Precision is TP / (TP + FP), recall is TP / (TP + FN). The result also has the counts. A score is NaN if its
    denominator is 0.

    `counts`: counts of one or more images; types are ignored.
    """
    table = counts.table
    tp = int(table[:-1, :-1].sum())
    fp = int(table[-1, :-1].sum())
    fn = int(table[:-1, -1].sum())
    return DetectionScores(
        f1=_ratio(2 * tp, 2 * tp + fp + fn),
        precision=_ratio(tp, tp + fp),
        recall=_ratio(tp, tp + fn),
        tp=tp,
        fp=fp,
        fn=fn,
    )


@dataclass(frozen=True)
class ClassScores:
    """F_c of one class and the underlying counts; see `class_scores`."""

    f1: float
    """F_c, 0 to 1; NaN if the class is neither present nor predicted."""
    tp: int
    """Pairs with this class on both sides."""
    fp: int
    """Pairs predicted as this class whose true class is another."""
    fn: int
    """Pairs of this class predicted as another."""
    fp_d: int
    """Unpaired predicted nuclei of this class."""
    fn_d: int
    """Unpaired true nuclei of this class."""


def class_scores(counts: PairCounts, type_id: int) -> ClassScores:
    """Return F_c = 2·TP_c / (2·TP_c + 2·FP_c + 2·FN_c + FP_d + FN_d) of one class (Graham et al. 2019, section 4.3).

    The result also has the counts. The weights 2, 2, 1, 1 and the counts follow the reference implementation: unpaired
    nuclei count only for their own class, and pairs with other classes on both sides (the paper's TN_c) do not count.

    `counts`: counts of one or more images. `type_id`: id of the class.
    """
    table = counts.table
    tp = int(table[type_id, type_id])
    fp = int(table[:-1, type_id].sum()) - tp
    fn = int(table[type_id, :-1].sum()) - tp
    fp_d, fn_d = int(table[-1, type_id]), int(table[type_id, -1])
    return ClassScores(_ratio(2 * tp, 2 * tp + 2 * fp + 2 * fn + fp_d + fn_d), tp, fp, fn, fp_d, fn_d)


def _ratio(part: int, total: int) -> float:
    return part / total if total else math.nan
