"""Learning rate schedules: warm-up and cosine, plateau and early stopping, and resuming both."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kd.training.config import TrainConfig
from kd.training.schedule import build_schedule, learning_rate

QUICK = TrainConfig(data=Path(), out=Path(), warmup=2, lr=1e-3)
PAPER = TrainConfig.of("paper", data=Path(), out=Path(), alpha=1.0)


def optimizer(lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_the_learning_rate_rises_then_falls_to_zero():
    assert [learning_rate(QUICK, i, 102) for i in range(3)] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert learning_rate(QUICK, 52, 102) == pytest.approx(5e-4)
    assert learning_rate(QUICK, 101, 102) < 1e-6 * (1 + math.pi**2 / 4)


def test_cosine_sets_the_optimisers_rate_and_never_stops():
    held = optimizer(QUICK.lr)
    held.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": QUICK.lr / 4})
    schedule = build_schedule(QUICK, held, 102)
    schedule.before(52)
    assert [group["lr"] for group in held.param_groups] == pytest.approx([5e-4, 1.25e-4])
    assert all(schedule.after(loss) for loss in [1.0] * 50)


def course(config, losses):
    """The rate after each epoch, and after which one training ended."""
    held = optimizer(config.lr)
    schedule = build_schedule(config, held, 0)
    rates = []
    for epoch, loss in enumerate(losses, start=1):
        going = schedule.after(loss)
        rates.append(held.param_groups[0]["lr"])
        if not going:
            return rates, epoch
    return rates, None


def test_the_rate_falls_after_five_epochs_without_progress_and_training_ends_after_ten():
    rates, ended = course(PAPER, [1.0] * 40)
    assert ended == 11  # the first is progress, ten are not
    assert rates == pytest.approx([1e-4] * 6 + [1e-5] * 5)


def test_progress_is_more_than_delta():
    shrinking = [1.0 - 0.9e-4 * i for i in range(12)]  # every second epoch is below the best by more than 1e-4
    assert course(PAPER, shrinking) == ([1e-4] * 12, None)
    assert course(PAPER, [1.0, *[1.0 - 0.9e-4] * 20])[1] == 11


def test_the_rate_has_a_floor_and_released_never_stops():
    released = TrainConfig.of("released", data=Path(), out=Path(), alpha=0.0)
    rates, ended = course(released, [1.0] * 60)
    assert ended is None
    assert min(rates) == pytest.approx(1e-7)
    assert min(course(replace(PAPER, early_stop=0), [1.0] * 60)[0]) == pytest.approx(1e-6)


def test_a_plateau_goes_on_from_its_state():
    losses = [1.0, 0.8, 0.9, 0.85, 0.7, *[0.75] * 12]
    rates, ended = course(PAPER, losses)
    held = optimizer(PAPER.lr)
    schedule = build_schedule(PAPER, held, 0)
    for epoch, loss in enumerate(losses[:ended], start=1):
        other = optimizer(held.param_groups[0]["lr"])
        again = build_schedule(PAPER, other, 0)
        again.load_state_dict(schedule.state_dict())
        other.load_state_dict(held.state_dict())
        held, schedule = other, again
        assert schedule.after(loss) == (epoch != ended)
        assert held.param_groups[0]["lr"] == rates[epoch - 1]
