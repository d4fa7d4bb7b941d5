"""Learning rate schedules, which also decide when training ends."""

from __future__ import annotations

import math
from typing import Any

import torch

from kd.training.config import TrainConfig


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Schedule:
    """Return the schedule of `config` for a training of `steps` steps in all.

    `optimizer`: optimiser whose rates are set; it must have its initial rates.
    """
    return Plateau(config, optimizer) if config.schedule == "plateau" else Cosine(config, optimizer, steps)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate at a step: linear warm-up to `config.lr`, then half a cosine down to zero.

    The rate reaches zero only after the last step. The warm-up takes `config.warmup` steps, by default a tenth of all
    steps, but at most 300.

    `config`: settings of the training. `step`: number of steps done so far. `steps`: number of all steps.
    """
    warmup = min(300, steps // 10) if config.warmup is None else config.warmup
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


class Cosine:
    """Schedule of `optimizer` with the rate of `learning_rate`, over `steps` steps; it never ends training early.

    The ratios between the rates of the optimiser's parameter groups stay constant.
    """

    def __init__(self, config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.config, self.optimizer, self.steps = config, optimizer, steps
        self.shares = [group["lr"] / config.lr for group in optimizer.param_groups]

    def before(self, step: int) -> None:
        """Set the learning rate of every parameter group. `step`: number of steps done so far."""
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = learning_rate(self.config, step, self.steps) * share

    def after(self, loss: float) -> bool:
        """Return True, since training ends only at its last step; `loss` is ignored."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, since the rate depends only on the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, since there is no state; `state` is ignored."""


class Plateau:
    """Schedule of `optimizer` that reduces the rate, and later ends training, when the validation loss stops falling.

    An epoch has progress if its loss is more than `plateau_delta` below the lowest loss so far; with `plateau_relative`
    this is a fraction of the lowest loss. After more than `plateau_patience` epochs without progress, the rate is
    multiplied by `plateau_factor`, but not below `min_lr`. After `early_stop` epochs without progress, training ends;
    0: it does not end early.
    """

    def __init__(self, config: TrainConfig, optimizer: torch.optim.Optimizer) -> None:
        self.config = config
        self.rate = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            factor=config.plateau_factor,
            patience=config.plateau_patience,
            threshold=config.plateau_delta,
            threshold_mode="rel" if config.plateau_relative else "abs",
            min_lr=config.min_lr,
        )
        self.least = math.inf
        self.waited = 0

    def before(self, step: int) -> None:
        """Do nothing, since the rate changes only after epochs; `step` is ignored."""

    def after(self, loss: float) -> bool:
        """Update the rate after an epoch. Return False if training should end, else True.

        Training should end after `early_stop` epochs without progress (see `Plateau`). If `early_stop` is 0, the result
        is always True.

        `loss`: validation loss of the epoch, lower is better.
        """
        self.rate.step(loss)
        delta, relative = self.config.plateau_delta, self.config.plateau_relative
        if loss < (self.least * (1 - delta) if relative else self.least - delta):
            self.least, self.waited = loss, 0
        else:
            self.waited += 1
        return not self.config.early_stop or self.waited < self.config.early_stop

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule. `load_state_dict` restores it."""
        # `min_lrs` is a setting, which comes from the configuration.
        rate = {name: value for name, value in self.rate.state_dict().items() if name != "min_lrs"}
        return {"rate": rate, "least": self.least, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state`, which `state_dict` of a schedule with the same settings returned."""
        self.rate.load_state_dict(state["rate"])
        self.least, self.waited = state["least"], state["waited"]


Schedule = Cosine | Plateau
"""Learning rate schedule of an optimiser, whose state can be stored in a checkpoint.

Call `before` before each step, and `after` after each epoch.
"""
