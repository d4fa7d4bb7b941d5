"""Scores compared with slow versions of their definitions, on real annotations and perturbed copies."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from hover_batch.metrics import (
    PairCounts,
    aji,
    class_quality,
    class_scores,
    count_pairs,
    detection_scores,
    dice,
    match_as_hovernet,
    match_centroids,
    mean_defined,
    panoptic_quality,
)

TILES = ("consep_train_03", "consep_train_14")


def slow_pq(true, pred):
    """(dq, sq, pq, tp, fp, fn), from all overlapping pairs of instances, pixel by pixel."""
    ious, met = [], set()
    true_ids, pred_ids = set(np.unique(true)) - {0}, set(np.unique(pred)) - {0}
    for t in true_ids:
        mask = true == t
        for p in set(np.unique(pred[mask])) - {0}:
            other = pred == p
            iou = np.logical_and(mask, other).sum() / np.logical_or(mask, other).sum()
            if iou > 0.5:
                ious.append(iou)
                assert t not in met
                met.add(t)
    tp = len(ious)
    fp, fn = len(pred_ids) - tp, len(true_ids) - tp
    dq = tp / (tp + fp / 2 + fn / 2)
    sq = sum(ious) / tp if tp else 0.0
    return dq, sq, dq * sq, tp, fp, fn


def slow_aji(true, pred):
    """Algorithm 1 of Kumar et al. 2017: intersections C and unions U, then the areas of the unused predictions."""
    c = u = 0
    used = set()
    for t in sorted(set(np.unique(true)) - {0}):
        mask = true == t
        best, best_iou = None, 0.0
        for p in sorted(set(np.unique(pred[mask])) - {0}):
            other = pred == p
            inter, union = np.logical_and(mask, other).sum(), np.logical_or(mask, other).sum()
            if inter / (union + 1e-6) > best_iou:
                best, best_iou = (p, inter, union), inter / (union + 1e-6)
        if best is None:
            u += mask.sum()
        else:
            used.add(best[0])
            c += best[1]
            u += best[2]
    for p in set(np.unique(pred)) - {0} - used:
        u += (pred == p).sum()
    return c / u


def damage(true, rng):
    """A realistic prediction: some nuclei missed, shifted, merged, split, and some false positives."""
    pred = np.zeros_like(true)
    next_id = 7
    for t in rng.permutation(np.setdiff1d(np.unique(true), [0])):
        ys, xs = np.nonzero(true == t)
        fate = rng.random()
        if fate < 0.15:
            continue
        if fate < 0.55:
            dy, dx = rng.integers(-4, 5, 2)
            ys, xs = np.clip(ys + dy, 0, true.shape[0] - 1), np.clip(xs + dx, 0, true.shape[1] - 1)
        if fate > 0.9:
            pred[ys, xs] = np.where(xs < xs.mean(), next_id, next_id + 3)
            next_id += 6
        elif fate > 0.82:
            pred[ys, xs] = max(next_id - 3, 7)  # merged with the one before
        else:
            pred[ys, xs] = next_id
            next_id += 3
    for _ in range(10):
        y, x = rng.integers(0, true.shape[0] - 12), rng.integers(0, true.shape[1] - 12)
        pred[y : y + 12, x : x + 9] = next_id
        next_id += 3
    return pred


@pytest.fixture(scope="module", params=TILES)
def true_map(request, data: Path):
    """A quarter of a CoNSeP tile; ids have gaps, as cut maps have."""
    labels = cv2.imread(str(data / "nuclei" / "labels" / f"{request.param}.png"), cv2.IMREAD_UNCHANGED)
    return labels[:500, 250:750].astype(np.int32)


@pytest.mark.parametrize("seed", [1, 2])
def test_real_tiles_agree_with_the_definitions(true_map, seed):
    pred = damage(true_map, np.random.default_rng(seed))
    got = panoptic_quality(true_map, pred)
    dq, sq, pq, tp, fp, fn = slow_pq(true_map, pred)
    assert (got.tp, got.fp, got.fn) == (tp, fp, fn)
    assert tp > 20 and fp > 5 and fn > 5  # the damage shows on every side
    assert (got.dq, got.sq, got.pq) == pytest.approx((dq, sq, pq), abs=1e-12)
    assert got.iou_sum == pytest.approx(sq * tp)
    assert aji(true_map, pred) == pytest.approx(slow_aji(true_map, pred), abs=1e-12)
    a, b = true_map > 0, pred > 0
    assert dice(true_map, pred) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-12)


@pytest.mark.parametrize("name", TILES)
def test_quality_of_a_class_is_that_of_its_instances_alone(data: Path, name):
    """Types as annotated; a fifth of the predicted ones is redrawn."""
    true, types = (
        cv2.imread(str(data / "nuclei" / kind / f"{name}.png"), cv2.IMREAD_UNCHANGED)[300:600, 300:600].astype(np.int32)
        for kind in ("labels", "types")
    )
    rng = np.random.default_rng(4)
    pred = damage(true, rng)
    true_ids, pred_ids = np.setdiff1d(np.unique(true), [0]), np.setdiff1d(np.unique(pred), [0])
    true_types = np.array([np.bincount(types[true == i]).argmax() for i in true_ids])
    pred_types = np.array([np.bincount(types[pred == i], minlength=8).argmax() for i in pred_ids])
    pred_types = np.where(rng.random(len(pred_ids)) < 0.2, rng.integers(1, 8, len(pred_ids)), pred_types)
    seen = 0
    for c in range(1, 8):
        ours = np.zeros_like(true), np.zeros_like(pred)
        for instances, ids, kinds, alone in ((true, true_ids, true_types, 0), (pred, pred_ids, pred_types, 1)):
            for i, kind in zip(ids, kinds, strict=True):
                if kind == c:
                    ours[alone][instances == i] = i
        got = class_quality(true, pred, true_types, pred_types, c)
        if ours[0].any():
            assert got == pytest.approx(slow_pq(*ours)[2], abs=1e-12)
            seen += got > 0
        else:  # even where it is predicted
            assert math.isnan(got)
    assert seen >= 2


def test_a_wrong_number_of_types_is_refused():
    with pytest.raises(ValueError, match="types of 1 instances, but the map holds 2"):
        class_quality(np.array([[3, 0, 9]]), np.array([[0, 0, 0]]), np.array([1]), np.array([], int), 1)


small_maps = arrays(np.uint16, (6, 7), elements=st.sampled_from([0, 0, 1, 2, 5]))


@given(small_maps, small_maps)
@settings(max_examples=200)
def test_small_maps_agree_with_the_definitions(true, pred):
    if not true.any() and not pred.any():
        assert math.isnan(panoptic_quality(true, pred).pq)
        return
    got = panoptic_quality(true, pred)
    assert (got.dq, got.sq, got.pq, got.tp, got.fp, got.fn) == pytest.approx(slow_pq(true, pred), abs=1e-12)
    assert aji(true, pred) == pytest.approx(slow_aji(true, pred), abs=1e-12)


def test_ids_do_not_matter(true_map):
    pred = damage(true_map, np.random.default_rng(3))
    names = np.zeros(pred.max() + 1, np.int32)
    ids = np.setdiff1d(np.unique(pred), [0])
    names[ids] = np.random.default_rng(0).permutation(len(ids)) * 5 + 100_000
    renamed, as_it_was = panoptic_quality(true_map, names[pred]), panoptic_quality(true_map, pred)
    assert (renamed.tp, renamed.fp, renamed.fn) == (as_it_was.tp, as_it_was.fp, as_it_was.fn)
    assert renamed.pq == pytest.approx(as_it_was.pq)
    assert aji(true_map, names[pred]) == pytest.approx(aji(true_map, pred))


def test_perfect_prediction(true_map):
    n = len(np.unique(true_map)) - 1
    got = panoptic_quality(true_map, true_map)
    assert (got.dq, got.sq, got.pq, got.tp, got.fp, got.fn, got.iou_sum) == (1, 1, 1, n, 0, 0, n)
    assert aji(true_map, true_map) == 1
    assert dice(true_map, true_map) == 1


def test_all_missed_and_all_false_positive(true_map):
    empty = np.zeros_like(true_map)
    n = len(np.unique(true_map)) - 1
    missed, invented = panoptic_quality(true_map, empty), panoptic_quality(empty, true_map)
    assert (missed.pq, missed.sq, missed.tp, missed.fp, missed.fn) == (0, 0, 0, 0, n)
    assert (invented.pq, invented.sq, invented.tp, invented.fp, invented.fn) == (0, 0, 0, n, 0)
    for score in (aji, dice):
        assert score(true_map, empty) == 0
        assert score(empty, true_map) == 0


def test_scores_of_two_empty_maps_are_undefined():
    empty = np.zeros((5, 5), np.int32)
    got = panoptic_quality(empty, empty)
    assert (got.tp, got.fp, got.fn, got.iou_sum) == (0, 0, 0, 0)
    assert all(math.isnan(x) for x in (got.dq, got.sq, got.pq, aji(empty, empty), dice(empty, empty)))
    assert mean_defined([math.nan, 0.5, 1.0]) == 0.75
    assert math.isnan(mean_defined([math.nan]))


def test_iou_of_exactly_one_half_is_not_paired():
    true = np.array([[1, 1, 1, 0]])
    pred = np.array([[0, 1, 1, 1]])
    assert panoptic_quality(true, pred).tp == 0
    assert aji(true, pred) == 0.5


def test_one_prediction_over_two_nuclei_counts_twice_in_aji_but_never_in_pq():
    true = np.array([[1, 1, 1, 1, 2, 2]])
    pred = np.full((1, 6), 9)
    got = panoptic_quality(true, pred)
    assert (got.tp, got.fp, got.fn) == (1, 0, 1)
    assert got.iou_sum == pytest.approx(4 / 6)
    assert aji(true, pred) == pytest.approx((4 + 2) / (6 + 6))


@pytest.mark.parametrize("score", [panoptic_quality, aji, dice])
def test_different_shapes_are_refused(score):
    with pytest.raises(ValueError, match=r"true \(4, 4\), predicted \(4, 5\)"):
        score(np.zeros((4, 4), int), np.zeros((4, 5), int))


def exhaustive_best(true_xy, pred_xy, radius):
    """(pairs, total distance) of the best matching, by trying every one."""
    distance = np.linalg.norm(true_xy[:, None] - pred_xy[None], axis=2)
    n, m = distance.shape
    if n > m:
        distance, n, m = distance.T, m, n
    best = (0, 0.0)
    for columns in itertools.permutations(range(m), n):
        d = distance[range(n), columns]
        d = d[d <= radius]
        if (len(d), -d.sum()) > (best[0], -best[1]):
            best = (len(d), float(d.sum()))
    return best


points = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=0, max_size=5)


@given(points, points, st.sampled_from([1.0, 3.0, 5.0]))
@settings(max_examples=200)
def test_matching_is_optimal(true, pred, radius):
    true_xy, pred_xy = np.array(true, float).reshape(-1, 2), np.array(pred, float).reshape(-1, 2)
    pairs = match_centroids(true_xy, pred_xy, radius)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    assert (np.diff(pairs[:, 0]) > 0).all()
    distance = np.linalg.norm(true_xy[pairs[:, 0]] - pred_xy[pairs[:, 1]], axis=1)
    assert (distance <= radius).all()
    n, total = exhaustive_best(true_xy, pred_xy, radius)
    assert len(pairs) == n
    assert distance.sum() == pytest.approx(total)


def centroids(instances):
    """(n, 2) x, y of every instance, one by one."""
    return np.array([np.argwhere(instances == i).mean(axis=0)[::-1] for i in np.unique(instances)[1:]])


@pytest.mark.parametrize("seed", [1, 2])
def test_components_give_the_assignment_of_the_whole_matrix(true_map, seed):
    rng = np.random.default_rng(seed)
    true_xy = centroids(true_map)
    kept = true_xy[rng.random(len(true_xy)) < 0.85]
    pred_xy = np.concatenate([kept + rng.normal(0, 5, kept.shape), rng.uniform(0, 500, (25, 2))])
    pairs = match_centroids(true_xy, pred_xy, 12)
    distance = np.linalg.norm(true_xy[:, None] - pred_xy[None], axis=2)
    cost = np.where(distance <= 12, distance, 1e6)
    rows, columns = linear_sum_assignment(cost)
    within = cost[rows, columns] <= 12
    assert pairs.tolist() == np.stack([rows[within], columns[within]], axis=1).tolist()


@pytest.mark.parametrize("seed", [1, 2])
def test_never_fewer_pairs_than_the_reference(true_map, seed):
    true_xy, pred_xy = centroids(true_map), centroids(damage(true_map, np.random.default_rng(seed)))
    assert len(match_as_hovernet(true_xy, pred_xy, 12)) <= len(match_centroids(true_xy, pred_xy, 12))


def test_nuclei_far_away_change_the_reference_alone():
    true_xy, pred_xy = np.array([[0, 0], [100, 0]]), np.array([[10, 0], [-100, 0]])
    assert match_centroids(true_xy, pred_xy, 12).tolist() == [[0, 0]]
    assert match_as_hovernet(true_xy, pred_xy, 12).tolist() == []  # 100 + 90 is less than 10 + 200


def test_whole_numbers_do_not_round_the_distances():
    assert match_centroids(np.array([[0, 0]]), np.array([[2, 2], [2, 1]]), 12).tolist() == [[0, 1]]


def test_matching_a_slide_is_quick():
    rng = np.random.default_rng(0)
    true_xy = rng.uniform(0, 20_000, (200_000, 2))
    pred_xy = np.concatenate([true_xy[:180_000] + rng.normal(0, 2, (180_000, 2)), rng.uniform(0, 20_000, (20_000, 2))])
    assert len(match_centroids(true_xy, pred_xy, 12)) > 180_000


def counts(true_types, pred_types, pairs, n_types=4):
    pairs = np.array(pairs, np.intp).reshape(-1, 2)
    return count_pairs(pairs, np.array(true_types, int), np.array(pred_types, int), n_types)


def test_scores_by_hand():
    # true 1 1 1 2 3, predicted 1 2 1 1: pairs (1,1) (1,2) (2,1); unpaired: true 1 and 3, predicted 1
    got = counts([1, 1, 1, 2, 3], [1, 2, 1, 1], [(0, 0), (1, 1), (3, 2)])
    detection = detection_scores(got)
    assert (detection.tp, detection.fp, detection.fn) == (3, 1, 2)
    assert detection.f1 == pytest.approx(6 / 9)
    assert (detection.precision, detection.recall) == pytest.approx((3 / 4, 3 / 5))
    one = class_scores(got, 1)
    assert (one.tp, one.fp, one.fn, one.fp_d, one.fn_d) == (1, 1, 1, 1, 1)
    assert one.f1 == pytest.approx(2 / (2 + 2 + 2 + 1 + 1))
    assert class_scores(got, 2).f1 == 0
    assert class_scores(got, 3).f1 == 0
    assert math.isnan(class_scores(got, 0).f1)


def test_scores_without_nuclei():
    nothing = counts([], [], [])
    assert math.isnan(detection_scores(nothing).f1)
    missed = detection_scores(counts([1, 2], [], []))
    assert (missed.f1, missed.recall, missed.fn) == (0, 0, 2)
    assert math.isnan(missed.precision)


def test_counts_of_images_add_up():
    first = counts([1, 2], [2, 2, 3], [(0, 0), (1, 2)])
    second = counts([3], [3], [(0, 0)])
    both = counts([1, 2, 3], [2, 2, 3, 3], [(0, 0), (1, 2), (2, 3)])
    assert isinstance(first + second, PairCounts)
    assert ((first + second).table == both.table).all()


def test_random_scores_agree_with_the_definition():
    rng = np.random.default_rng(5)
    true_types, pred_types = rng.integers(1, 5, 300), rng.integers(1, 5, 280)
    pairs = np.stack([rng.permutation(300)[:200], rng.permutation(280)[:200]], axis=1)
    got = count_pairs(pairs, true_types, pred_types, 5)
    partner, taken = dict(pairs.tolist()), set(pairs[:, 1].tolist())
    for c in range(1, 5):
        tp = sum(true_types[i] == c and pred_types[j] == c for i, j in pairs)
        fp = sum(true_types[i] != c and pred_types[j] == c for i, j in pairs)
        fn = sum(true_types[i] == c and pred_types[j] != c for i, j in pairs)
        fn_d = sum(true_types[i] == c for i in range(300) if i not in partner)
        fp_d = sum(pred_types[j] == c for j in range(280) if j not in taken)
        assert class_scores(got, c).f1 == pytest.approx(2 * tp / (2 * tp + 2 * fp + 2 * fn + fp_d + fn_d))


def test_types_out_of_range_are_refused():
    with pytest.raises(ValueError, match="predicted types range from 2 to 4, not within 0 … 3"):
        counts([1], [2, 4], [])
