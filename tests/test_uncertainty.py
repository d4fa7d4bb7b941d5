"""Calibrated probabilities and intervals of counts, compared with closed forms; what a card may hold."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from hover_batch.errors import PackageError
from hover_batch.model.card import Card
from hover_batch.model.package import find_package
from hover_batch.uncertainty import BetaScaling, CountError, Uncertainty

ERROR = CountError(mean=0.1, mean_variance=0.001, source=0.004, slide=0.003, field_mm2=0.002, unpaired=0.3, df=6)


def test_the_identity_and_a_shift_of_the_odds() -> None:
    p = np.array([0.01, 0.3, 0.9])
    np.testing.assert_allclose(BetaScaling(1, 1, 0).apply(p), p)
    shifted = BetaScaling(1, 1, math.log(2)).apply(p)
    np.testing.assert_allclose(shifted / (1 - shifted), 2 * p / (1 - p))


@given(st.floats(0, 5), st.floats(0, 5), st.floats(-5, 5), st.lists(st.floats(0, 1, width=32), min_size=2).map(sorted))
def test_a_calibration_keeps_the_order(a: float, b: float, c: float, p: list[float]) -> None:
    calibrated = BetaScaling(a, b, c).apply(np.array(p))
    assert ((calibrated >= 0) & (calibrated <= 1)).all() and (np.diff(calibrated) >= -1e-12).all()


def test_the_interval_of_a_slide_is_that_of_students_t() -> None:
    low, high = ERROR.interval([(1000, 0.5)]) or (0, 0)
    variance = 0.001 + 0.004 + 0.003 + 0.002 / 0.5 + 0.3 / 1000
    half = t.ppf(0.95, 6) * math.sqrt(variance)
    assert (low, high) == pytest.approx((1000 * math.exp(0.1 - half), 1000 * math.exp(0.1 + half)))


def test_a_larger_area_leaves_the_errors_of_slide_and_source() -> None:
    widths = [math.log(high / low) for low, high in (ERROR.interval([(n, n / 5000)]) for n in (50, 5000, 10**7))]
    assert widths[0] > widths[1] > widths[2]
    assert widths[2] == pytest.approx(2 * t.ppf(0.95, 6) * math.sqrt(0.008), rel=1e-3)


def test_slides_of_a_cohort_share_the_error_of_their_source() -> None:
    low, high = ERROR.interval([(10**6, 200.0)] * 400) or (0, 0)
    assert math.log(high / low) == pytest.approx(2 * t.ppf(0.95, 6) * math.sqrt(0.005), rel=1e-2)
    one, two = ERROR.interval([(10, 1.0)]), ERROR.interval([(10, 1.0), (0, None)])
    assert one == two


def test_without_nuclei_or_area_nothing_is_known() -> None:
    assert ERROR.interval([(0, 1.0)]) is None
    assert ERROR.interval([(10, None)]) is None and ERROR.interval([(10, 0.0), (5, 1.0)]) is None


def test_a_card_keeps_errors_and_refuses_others() -> None:
    card = replace(find_package("starter").card, uncertainty={}).to_json()
    assert "uncertainty" not in card
    measured = Uncertainty({"seg_score": BetaScaling(0.5, 1.5, -1.0)}, ERROR)
    stored = Card.from_json(card | {"uncertainty": measured.to_json()}).to_json()["uncertainty"]
    assert Uncertainty.from_json(stored) == measured
    scaling, error = {"a": 1, "b": 1, "c": 0}, ERROR.to_json()
    for wrong in (
        {"probabilities": {"area_um2": scaling}},
        {"probabilities": {"seg_score": scaling | {"a": -1}}},
        {"probabilities": {"seg_score": {"a": 1}}},
        {"probabilities": [1]},
        {"count": error | {"source": -0.1}},
        {"count": error | {"df": 0}},
        {"count": error | {"mean": float("nan")}},
        {"count": error | {"mean": "0"}},
        {"other": 1},
    ):
        with pytest.raises(PackageError, match="the card's uncertainty is invalid"):
            Card.from_json(card | {"uncertainty": wrong})
