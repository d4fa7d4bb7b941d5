"""Paired comparisons: the interval compared with theory and with a plain loop, and images that differ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hover_batch.errors import InputError
from kd.data.datasets import Sample
from kd.evaluation.paired import Baseline, compared, interval


def rows(*pq: float | None) -> list[dict[str, Any]]:
    return [{"id": f"s{i}", "sha256": f"{i}", "nuclei": i, "pq": value} for i, value in enumerate(pq)]


def baseline(**by_image: list[dict[str, Any]]) -> Baseline:
    return Baseline("old", "0" * 64, "fixed", 64, by_image)


def test_a_comparison_by_hand() -> None:
    old = baseline(tnbc=[*reversed(rows(0.5, 0.5, 0.5, None, 0.2))], monusac=rows(None), consep=rows(0.1))
    (pair,) = compared({"tnbc": rows(0.6, 0.4, 0.5, 0.3, 0.6), "monusac": rows(None)}, old)
    assert (pair.source, pair.images, pair.better, pair.worse) == ("tnbc", 4, 2, 1)
    assert (pair.new, pair.old) == pytest.approx((2.1 / 4, 1.7 / 4))
    assert pair.difference == pytest.approx(0.1)
    assert pair.low < 0 < pair.difference < pair.high
    json.dumps(pair.to_json(), allow_nan=False)


def test_images_without_pq_leave_nothing_to_compare() -> None:
    (pair,) = compared({"tnbc": rows(None, 0.5)}, baseline(tnbc=rows(0.5, None)))
    assert (pair.images, pair.better, pair.worse) == (0, 0, 0)
    assert pair.to_json()["difference"] is pair.to_json()["low"] is None


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    differences = np.random.default_rng(1).normal(0.02, 0.1, 60)
    rng = np.random.default_rng(5)
    means = sorted(np.mean([differences[i] for i in rng.integers(0, 60, 60)]) for _ in range(2000))
    low, high = interval(differences)
    assert (low, high) == pytest.approx((means[50], means[1949]), abs=0.003)
    assert (low, high) == interval(differences)
    spread = 1.96 * differences.std() / math.sqrt(60)
    assert (low, high) == pytest.approx((differences.mean() - spread, differences.mean() + spread), abs=0.003)


def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.evaluation.paired.RESAMPLES", 1000)
    rng = np.random.default_rng(2)
    covered = [low <= 0.02 <= high for low, high in (interval(rng.normal(0.02, 0.1, 50)) for _ in range(300))]
    assert 0.90 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize("at_once", [1, 7 * 999, 2**30])
def test_the_interval_does_not_depend_on_what_is_held_in_memory(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    differences = np.random.default_rng(3).normal(0, 1, 7)
    expected = interval(differences)
    monkeypatch.setattr("kd.evaluation.paired.AT_ONCE", at_once)
    assert interval(differences) == expected


@pytest.mark.parametrize("differences", [np.array([]), np.array([0.1])])
def test_less_than_two_images_have_no_interval(differences: np.ndarray) -> None:
    assert all(map(math.isnan, interval(differences)))


def sample(i: int, source: str = "tnbc", nuclei: int = 1) -> Sample:
    instances = np.zeros((4, 4), np.int32)
    instances[0, :nuclei] = np.arange(nuclei) + 7
    return Sample(f"s{i}", source, "", np.full((4, 4, 3), i, np.uint8), instances, None)


def row_of(s: Sample, nuclei: int = 1) -> dict[str, Any]:
    return {"id": s.id, "sha256": s.image_sha256, "nuclei": nuclei, "pq": 0.5}


def test_the_same_images_in_another_order_are_the_same() -> None:
    old = baseline(tnbc=[row_of(sample(2)), row_of(sample(1))], consep=[row_of(sample(3))])
    old.check([sample(1), sample(2), sample(9, "monusac")])


@pytest.mark.parametrize(
    "samples",
    [
        [sample(1)],
        [sample(1), sample(2), sample(3)],
        [sample(1), sample(2, nuclei=2)],
        [sample(1), sample(2), sample(3, "kumar")],
    ],
)
def test_other_images_or_annotations_are_refused(samples: list[Sample]) -> None:
    old = baseline(tnbc=[row_of(sample(1)), row_of(sample(2))])
    with pytest.raises(InputError, match="--against old: was scored on other images or annotations of (tnbc|kumar)"):
        old.check(samples)


@pytest.mark.parametrize(
    "by_image",
    [
        {"tnbc": 5},
        {"tnbc": [5]},
        {"tnbc": [{"id": "s1"}]},
        *({"tnbc": [row_of(sample(1)) | changed]} for changed in ({"pq": "0.5"}, {"pq": True}, {"nuclei": [1]})),
    ],
)
def test_a_file_without_the_scores_of_images_is_refused(tmp_path: Path, by_image: Any) -> None:
    texts = dict.fromkeys(("label", "sha256", "architecture", "data", "sobel_norm"), "x")
    cost = dict.fromkeys(("parameters", "patch", "macs_per_patch", "macs_per_kept_pixel"), 1)
    report = texts | {"folds": [], "min_area_px": 64, "sources": {}, "leakage": [], "cost": cost, "by_image": by_image}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(report))
    with pytest.raises(InputError, match=r"old\.json: its by_image lacks id, nuclei, pq, sha256"):
        Baseline.read(path)
