"""Limits of a model card, computed from annotated images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hover_batch.errors import PackageError
from hover_batch.model.card import Card
from hover_batch.model.package import find_package
from kd.data.samples import Sample
from kd.evaluation.slide_limits import slide_limits


def sample(number: int, side: int) -> Sample:
    """A purple square nucleus of `side` pixels on white."""
    image, instances = np.full((64, 64, 3), 255, np.uint8), np.zeros((64, 64), np.int32)
    image[:side, :side], instances[:side, :side] = (120, 60, 150), 1
    return Sample(id=str(number), source="made", group="", image=image, instances=instances, types=None)


def test_limits_lie_round_what_the_images_show() -> None:
    limits = slide_limits([sample(i, 16 + i % 2 * 8) for i in range(20)])
    low, high = limits["area_um2"]
    assert low == pytest.approx(16 / 1.5) and high == pytest.approx(36 * 1.5)
    assert 0 < limits["h_od"][0] < limits["h_od"][1] and limits["e_od"][0] == 0
    assert slide_limits([sample(i, 16) for i in range(19)]) == {}


def test_a_card_keeps_limits_and_refuses_others() -> None:
    card = replace(find_package("starter").card, limits={}).to_json()
    assert "limits" not in card
    limits = {"area_um2": [10, 90.5]}
    assert Card.from_json(card | {"limits": limits}).to_json()["limits"] == limits
    for wrong in ({"area_um2": 3}, {"area_um2": [1, "2"]}, {"area_um2": [1, float("inf")]}):
        with pytest.raises(PackageError, match="limits of 'area_um2'"):
            Card.from_json(card | {"limits": wrong})
