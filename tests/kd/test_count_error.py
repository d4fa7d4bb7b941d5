"""The error of counts: variances and coverage on simulated sources whose variances are known."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import norm

from kd.evaluation.count_error import CountedImage, fit_count_error

SOURCE, SLIDE, FIELD_MM2 = 0.01, 0.005, 0.00005
DESIGN = [(4, 1, 0.0625), (2, 2, 0.03), (1, 5, 0.016), (3, 3, 0.016), (5, 1, 0.0625), (4, 5, 0.0073), (2, 4, 0.016)]
"""Slides, images of each, and their area in mm², by source: like those of the annotated images."""


def image(random, source: int, slide: int, mm2: float, log_ratio: float) -> CountedImage:
    """Misses and false nuclei are Poisson; the expected true and predicted numbers have the ratio exp(log_ratio)."""
    true = random.uniform(3000, 8000) * mm2
    predicted = true / np.exp(log_ratio + random.normal(0, np.sqrt(FIELD_MM2 / mm2)))
    shared = 0.85 * min(true, predicted)
    paired, missed, false = (int(random.poisson(rate)) for rate in (shared, true - shared, predicted - shared))
    return CountedImage(str(source), str(slide), paired + missed, paired + false, paired, mm2)


def simulated(random, variance=SOURCE) -> list[CountedImage]:
    images = []
    for source, (slides, fields, mm2) in enumerate(DESIGN):
        of_source = random.normal(0, np.sqrt(variance))
        for slide in range(slides):
            of_slide = of_source + random.normal(0, np.sqrt(SLIDE))
            images += [image(random, source, slide, mm2, of_slide) for _ in range(fields)]
    return images


def test_nine_of_ten_slides_of_new_sources_are_covered_and_the_variances_are_found():
    random = np.random.default_rng(0)
    hits: list[bool | None] = []
    found = []
    for _ in range(30):
        error = fit_count_error(simulated(random))
        assert error is not None and error.df == len(DESIGN) - 1
        found.append((error.source, error.slide, error.field_mm2))
        for mm2 in (0.0625, 20.0):
            for _ in range(50):
                log_ratio = random.normal(0, np.sqrt(SOURCE + SLIDE))
                hits.append(image(random, 99, 0, mm2, log_ratio).is_covered(error))
    print(np.mean(np.array(hits, bool)))
    assert 0.9 <= np.mean(np.array(hits, bool)) <= 0.95
    source, slide, field = np.mean(found, axis=0)
    assert 1.1 * SOURCE < source < 1.5 * SOURCE, "the prior makes it larger: by 6 / 5 if it were measured exactly"
    assert slide == pytest.approx(SLIDE, rel=0.4)
    assert field == pytest.approx(FIELD_MM2, rel=0.4)


def test_without_several_images_of_a_slide_no_variance_shrinks_with_the_area():
    random = np.random.default_rng(1)
    images = [replace(one, slide=str(i)) for i, one in enumerate(simulated(random))]
    error = fit_count_error(images)
    assert error is not None and error.field_mm2 == 0 and error.slide > 0


@pytest.mark.parametrize("variance", [0.0, 0.002, SOURCE])
def test_nine_of_ten_cohorts_of_new_sources_are_covered(variance):
    """The error of a cohort is that of its source: it must not vanish with the number of slides."""
    random = np.random.default_rng(3)
    covered = []
    for _ in range(25):
        error = fit_count_error(simulated(random, variance))
        assert error is not None and error.mean_variance >= error.source / len(DESIGN)
        low, high = np.log(error.interval([(10**5, 20.0)] * 100)) - np.log(10**7)
        spread = np.sqrt(variance + SLIDE / 100)
        covered.append(norm.cdf(high / spread) - norm.cdf(low / spread))
    print(variance, np.mean(covered))
    assert np.mean(covered) >= 0.9


def test_sources_of_equal_means_still_have_a_variance_which_grows_with_their_distance():
    """Neither zero nor all of the variance of slides, and no step in between."""
    random = np.random.default_rng(5)
    centred = [
        (image(random, source, slide, 0.05, log_ratio), source % 2)
        for source in range(6)
        for slide, log_ratio in enumerate((-0.4, 0.4))
        for _ in range(3)
    ]
    found = []
    for apart in np.linspace(0, 0.6, 7):
        images = [replace(one, true=round(one.true * np.exp(odd * apart))) for one, odd in centred]
        error = fit_count_error(images)
        assert error is not None and error.slide > 0.1
        found.append(error.source)
    assert 0.005 < found[0] < 0.1
    assert all(before < after < 2 * before for before, after in pairwise(found))


def test_few_sources_or_empty_images_give_no_error():
    images = simulated(np.random.default_rng(2))
    assert fit_count_error([one for one in images if one.source in ("0", "1")]) is None
    empty = [CountedImage(str(source), "a", 0, 0, 0, 0.01) for source in range(9)]
    assert fit_count_error(empty) is None
    assert fit_count_error([*images, *empty]) == fit_count_error(images)


def test_only_nuclei_that_one_side_has_are_noise():
    same = CountedImage("a", "b", 100, 100, 100, 0.01)
    assert same.noise == pytest.approx(1 / 100.5**2)
    assert replace(same, paired=90).noise == pytest.approx(21 / 100.5**2)
