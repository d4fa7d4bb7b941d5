"""Calibration of probabilities on simulated outcomes, and all errors together on real annotations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from truth_maps import maps_of_truth

from hover_batch.model.package import find_package
from hover_batch.nuclei.watershed import SobelConstants
from hover_batch.taxonomy import CONSEP
from kd.data.datasets import read_data
from kd.evaluation.frequencies import MIN_NUCLEI, Outcomes, fit_scaling, reliability
from kd.evaluation.measured_errors import evidence, fit_uncertainty, notes, paired_images, tried_on


def outcomes(n: int, seed: int, source: str = "a") -> Outcomes:
    """An overconfident model: the frequency of p is p² ÷ (p² + (1 - p)²), by whose inverse it is distorted."""
    random = np.random.default_rng(seed)
    frequency = random.uniform(0.05, 0.95, n)
    odds = (frequency / (1 - frequency)) ** 2
    return Outcomes(source, 5, odds / (1 + odds), random.random(n) < frequency)


def test_overconfidence_is_found_and_removed():
    scaling = fit_scaling([outcomes(20_000, 0), outcomes(5_000, 1, "b")])
    assert scaling is not None
    assert (scaling.a, scaling.b, scaling.c) == pytest.approx((0.5, 0.5, 0.0), abs=0.05)
    new = outcomes(20_000, 2)
    before, after = reliability(new), reliability(new, scaling)
    assert before.ece > 0.1 and after.ece < 0.02
    assert before.nuclei == 20_000 and len(before.predicted) == 10
    assert list(after.predicted) == sorted(after.predicted)


def test_each_source_has_the_same_weight():
    """A source with ten times the nuclei, all of which are right, does not decide alone."""
    right = Outcomes("many", 5, np.full(20_000, 0.8), np.ones(20_000, bool))
    wrong = Outcomes("few", 5, np.full(2_000, 0.8), np.zeros(2_000, bool))
    scaling = fit_scaling([right, wrong])
    assert scaling is not None and scaling.apply(np.array([0.8])) == pytest.approx(0.5, abs=0.01)


def test_too_few_nuclei_or_one_outcome_are_not_fitted():
    assert fit_scaling([]) is None
    assert fit_scaling([outcomes(MIN_NUCLEI - 1, 0)]) is None
    assert fit_scaling([Outcomes("a", 5, np.full(1000, 0.8), np.ones(1000, bool))]) is None


def test_errors_on_real_annotations(data: Path):
    """Maps made from the truth find nearly every nucleus; sources that outline only some nuclei are left out."""
    samples = read_data(data / "nuclei", ["val"], ["consep", "tnbc", "gbm40", "lgg_tcga", "monusac"]).samples
    chosen = [
        s for source in ("consep", "tnbc", "gbm40", "lgg_tcga", "monusac") for s in samples if s.source == source
    ][::2]
    constants = SobelConstants.from_json(find_package("starter").card.sobel)
    queue = [s for s in chosen if s.source != "monusac"]

    def maps_of(image: np.ndarray) -> np.ndarray:
        sample = queue.pop(0)
        types = (sample.instances > 0).astype(np.uint8) if sample.types is None else sample.types
        return maps_of_truth(sample.instances, types, len(CONSEP.classes))

    images = paired_images(maps_of, chosen, constants, CONSEP)
    assert {i.count.source for i in images} == {"consep", "tnbc", "gbm40", "lgg_tcga"}
    slides = {s: [i.count.slide for i in images if i.count.source == s] for s in ("tnbc", "gbm40", "lgg_tcga")}
    assert set(slides["tnbc"]) <= {"tnbc_patient_05", "tnbc_patient_10"} and set(slides["lgg_tcga"]) == {"TCGA-DU-8165"}
    assert len(set(slides["gbm40"])) == len(slides["gbm40"]) > 1, "its group is a fold, not a slide"
    for image in images:
        assert image.is_nucleus.sum() == image.count.paired
        assert image.count.paired > 0.8 * image.count.true
        assert (len(image.is_class) > 0) == (image.count.source == "consep")
        assert image.is_class.mean() > 0.95 if len(image.is_class) else True
    fitted = fit_uncertainty(images)
    assert fitted.probabilities == {} and fitted.count is not None and fitted.count.df == 3
    by_source = evidence(images)
    json.dumps(by_source, allow_nan=False)
    assert by_source["tnbc"]["of"] == by_source["tnbc"]["images"] == 4
    assert (
        by_source["tnbc"]
        == tried_on([i for i in images if i.count.source == "tnbc"], [i for i in images if i.count.source != "tnbc"])[
            "tnbc"
        ]
    )
    said = notes(fitted, by_source)
    assert "seg_score: not calibrated; that needs 20 images in which all nuclei are outlined" in said
    assert "tnbc, by the other sources: 4 of 4 counts are in their interval (4 images: few)" in said
    alone = [i for i in images if i.count.source == "tnbc"]
    assert "count intervals: none; they need 3 sources that outline all nuclei" in notes(fit_uncertainty(alone), {})
