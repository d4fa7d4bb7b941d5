"""PanNuke-metrics' averages compared with an implementation from its definition, on real annotations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from truth_maps import maps_of_truth

from hover_batch.metrics import count_pairs
from hover_batch.nuclei.image import instances_of
from hover_batch.taxonomy import CONSEP
from kd.data.datasets import Sample, read_data
from kd.evaluation.evaluate import evaluate
from kd.evaluation.scores import ImageScores, pooled
from kd.training.validate import TYPICAL

N = len(CONSEP.classes)


def crop(sample: Sample, y: int, x: int, tissue: str) -> Sample:
    part = slice(y, y + 250), slice(x, x + 250)
    arrays = {name: np.ascontiguousarray(getattr(sample, name)[part]) for name in ("image", "instances", "types")}
    return replace(sample, id=f"{sample.id} {y} {x}", tissue=tissue, **arrays)


@pytest.fixture(scope="module")
def crops(data: Path) -> list[Sample]:
    """Of two tissues, one of them with three images of four; and one of them without any nucleus."""
    tiles = read_data(data / "nuclei", ["val"], ["consep"]).samples
    found = [
        crop(tiles[2], 0, 0, "b"),
        crop(tiles[3], 500, 0, "a"),
        crop(tiles[2], 500, 750, "b"),
        crop(tiles[3], 250, 500, "b"),
    ]
    empty = {name: np.zeros_like(getattr(found[0], name)) for name in ("instances", "types")}
    return [*found, replace(found[0], tissue="a", **empty)]


def predicted(sample: Sample, seed: int) -> np.ndarray:
    """Maps of the annotation moved by 3 pixels; a quarter of the nuclei is lost, another changes its class."""
    rng = np.random.default_rng(seed)
    ids = np.unique(sample.instances)[1:]
    fate = np.zeros(int(sample.instances.max()) + 1)
    fate[ids] = rng.random(len(ids))
    instances = np.where(fate[sample.instances] < 0.25, 0, sample.instances)
    turned = np.where(fate[sample.instances] > 0.75, sample.types % (N - 1) + 1, sample.types)
    types = np.where(instances > 0, turned, 0).astype(np.uint8)
    if not len(ids):  # a false alarm where nothing is
        instances[20:40, 20:40], types[20:40, 20:40] = 1, 2
    return maps_of_truth(np.roll(instances, 3, 1).astype(np.int32), np.roll(types, 3, 1), N)


def slow_quality(true: list[np.ndarray], pred: list[np.ndarray]) -> float:
    """PQ of two lists of masks."""
    ious = [np.logical_and(t, p).sum() / np.logical_or(t, p).sum() for t in true for p in pred if (t & p).any()]
    good = [iou for iou in ious if iou > 0.5]
    return sum(good) / (len(true) / 2 + len(pred) / 2)


def masks(instances: np.ndarray, types: np.ndarray, kind: int | None) -> list[np.ndarray]:
    """Of the instances whose pixels are mostly of this class; of all for None."""
    each = [instances == i for i in np.unique(instances)[1:]]
    return [m for m in each if kind is None or np.bincount(types[m]).argmax() == kind]


def test_as_pannuke_metrics_has_it(crops: list[Sample]) -> None:
    maps = {s.id + s.tissue: predicted(s, seed) for seed, s in enumerate(crops)}
    queue = list(maps.values())
    (got,) = evaluate(lambda image: queue.pop(0), crops, TYPICAL, CONSEP)

    quality = np.full((len(crops), N), math.nan)  # column 0: whatever the class
    for row, (sample, planes) in enumerate(zip(crops, maps.values(), strict=True)):
        found, kinds = instances_of(planes[:3], TYPICAL), planes[3 : 3 + N].argmax(0)
        for column, kind in enumerate([None, *range(1, N)]):
            true = masks(sample.instances, sample.types, kind)
            if true:  # an empty annotation does not count, whatever is predicted
                quality[row, column] = slow_quality(true, masks(found, kinds, kind))
    of_image = [np.nanmean(row[1:]) if not np.isnan(row).all() else math.nan for row in quality]
    tissues = {t: [i for i, s in enumerate(crops) if s.tissue == t] for t in "ab"}
    bpq = {t: np.nanmean(quality[rows, 0]) for t, rows in tissues.items()}
    mpq = {t: np.nanmean([of_image[i] for i in rows]) for t, rows in tissues.items()}

    assert 0.2 < got.mpq < got.bpq < 0.9  # the damage shows
    assert np.isnan(quality[:, 1:]).sum() > N - 1  # some class is missing beside those of the empty image
    for c in CONSEP.nuclei:
        assert got.pq_c[c.name] == pytest.approx(np.nanmean(quality[:, c.id]), abs=1e-12)
    assert list(got.by_tissue) == ["a", "b"] and got.by_tissue["b"].images == 3
    for tissue, scores in got.by_tissue.items():
        assert (scores.bpq, scores.mpq) == pytest.approx((bpq[tissue], mpq[tissue]), abs=1e-12)
    assert got.bpq == pytest.approx(np.mean(list(bpq.values())), abs=1e-12)
    assert got.mpq == pytest.approx(np.mean(list(mpq.values())), abs=1e-12)
    assert got.pq < got.bpq  # HoVerNet's counts the false alarm


def image_scores(tissue: str, bpq: float, pq_c: tuple[float, ...] | None, types: list[int]) -> ImageScores:
    every = np.array(types)
    pairs = count_pairs(np.stack([np.arange(len(types))] * 2, axis=1), every, np.full(len(types), 1), N)
    return ImageScores("x", "0", tissue, 1.0, 1.0, 1.0, 1.0, 1.0, bpq, pq_c, pairs)


def test_f_as_hovernet_has_it(crops: list[Sample]) -> None:
    """Counted nucleus by nucleus, over all images, from the definition in the paper (section 4.3)."""
    maps = [predicted(s, seed) for seed, s in enumerate(crops)]
    queue = list(maps)
    (got,) = evaluate(lambda image: queue.pop(0), crops, TYPICAL, CONSEP)
    paired, missed, invented = [], [], []
    for sample, planes in zip(crops, maps, strict=True):
        true = nuclei(sample.instances, sample.types)
        pred = nuclei(instances_of(planes[:3], TYPICAL), planes[3 : 3 + N].argmax(0))
        apart = np.array([[math.dist(t[0], p[0]) for p in pred] for t in true]).reshape(len(true), len(pred))
        pairs = [(i, j) for i, j in zip(*linear_sum_assignment(apart), strict=True) if apart[i, j] <= 12]
        paired += [(true[i][1], pred[j][1]) for i, j in pairs]
        missed += [t[1] for i, t in enumerate(true) if i not in {p[0] for p in pairs}]
        invented += [p[1] for j, p in enumerate(pred) if j not in {p[1] for p in pairs}]
    assert got.f_d == pytest.approx(len(paired) / (len(paired) + len(missed) / 2 + len(invented) / 2))
    assert len(paired) > 150 and len(missed) > 50 and len(invented) > 0
    for c in CONSEP.nuclei:
        right = sum(t == p == c.id for t, p in paired)
        wrong = sum((t == c.id) != (p == c.id) for t, p in paired)
        alone = missed.count(c.id) + invented.count(c.id)
        assert got.f_c[c.name] == pytest.approx(2 * right / (2 * right + 2 * wrong + alone))


def nuclei(instances: np.ndarray, types: np.ndarray) -> list[tuple[tuple[float, float], int]]:
    """Centroid and class of each instance."""
    found = []
    for i in np.unique(instances)[1:]:
        ys, xs = np.nonzero(instances == i)
        found.append(((ys.mean(), xs.mean()), int(np.bincount(types[ys, xs]).argmax())))
    return found


def test_tissues_count_the_same_and_untyped_images_not_for_classes() -> None:
    nan = math.nan
    images = [
        image_scores("skin", 0.4, (0.2, nan, nan, 0.6), [1, 4]),
        image_scores("skin", 0.8, (0.4, nan, 0.0, nan), [1, 3]),
        image_scores("lung", 0.2, None, [0, 0]),
    ]
    got = pooled("made up", images, CONSEP)
    assert got.bpq == pytest.approx((0.6 + 0.2) / 2)
    assert got.mpq == pytest.approx((0.4 + 0.2) / 2)  # lung has none
    assert (got.pq_c["miscellaneous"], got.pq_c["epithelial"]) == pytest.approx((0.3, 0.0))
    assert math.isnan(got.pq_c["inflammatory"])
    plain = got.to_json()
    assert plain["by_tissue"]["lung"] == {"images": 1, "bpq": 0.2, "mpq": None}
    assert plain["classes"] == [c.name for c in CONSEP.nuclei]


def test_nuclei_without_a_class_do_not_count_for_its_accuracy() -> None:
    got = pooled("made up", [image_scores("", 1.0, (1.0, 1.0, 1.0, 1.0), [0, 1, 2])], CONSEP)
    assert got.type_accuracy == pytest.approx(1 / 2)
