"""Times of a model: medians of three, of a tile only if an image is as large."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import kd.evaluation.timing
from kd.evaluation.timing import RUNS, TILE, timed


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> Any:
    patches = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(kd.evaluation.timing, "seconds_per_patch", lambda network, card: next(patches))
    monkeypatch.setattr(kd.evaluation.timing, "on_device", lambda network, device: network)
    return SimpleNamespace(device=torch.device("cpu"), card=None, precision="bf16", runtime="openvino")


def test_the_median_of_three_runs_on_the_first_image_that_is_large_enough(predictor: Any) -> None:
    seen, waits = [], iter([0.06, 0.0, 0.02])

    def nuclei_of(image: np.ndarray) -> None:
        seen.append(image)
        time.sleep(next(waits))

    large = np.random.default_rng(0).integers(0, 256, (TILE + 200, TILE, 3)).astype(np.uint8)
    found = timed(torch.nn.Identity(), predictor, nuclei_of, [large[:900], large, large[::-1]])
    assert found["seconds_per_patch"] == 2
    assert len(seen) == RUNS and all(np.array_equal(image, large[:TILE]) for image in seen)
    assert found["seconds_per_tile"] == sorted(found["tile_runs"])[1] >= 0.02
    assert found["tile_runs"][0] >= 0.06
    assert found["timed_on"].endswith("patches in float32, the tile in bf16 by openvino")


def test_no_image_is_large_enough(predictor: Any) -> None:
    found = timed(torch.nn.Identity(), predictor, print, [np.zeros((TILE, TILE - 1, 3), np.uint8)])
    assert (found["seconds_per_tile"], found["tile_runs"]) == (None, [])
