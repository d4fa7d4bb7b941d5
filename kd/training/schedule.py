"""Schedules of the learning rate, which also decide when training ends."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch

from kd.training.config import TrainConfig


class Schedule(Protocol):
    """A schedule that can be stored in a checkpoint."""

    def before(self, step: int) -> None:
        """Set the learning rate before each step."""

    def after(self, loss: float) -> bool:
        """Take the validation loss after each epoch; False ends the training."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Schedule:
    """Build the schedule of a training of `steps` steps."""
    return Plateau(config, optimizer) if config.schedule == "plateau" else Cosine(config, optimizer, steps)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the rate at `step`: linear warm-up, then half a cosine to zero at step `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


class Cosine:
    """The rate is a function of the step; training ends with the last one."""

    def __init__(self, config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.config, self.optimizer, self.steps = config, optimizer, steps

    def before(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, self.steps)

    def after(self, loss: float) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Plateau:
    """The rate falls when the validation loss stops falling; some epochs later training ends.

    Progress is a loss more than `plateau_delta` below the lowest so far. After more than `plateau_patience` epochs
    without progress the rate is multiplied by `plateau_factor`, down to `min_lr`; with the `early_stop`-th such epoch
    training ends.
    """

    def __init__(self, config: TrainConfig, optimizer: torch.optim.Optimizer) -> None:
        self.config = config
        self.rate = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            factor=config.plateau_factor,
            patience=config.plateau_patience,
            threshold=config.plateau_delta,
            threshold_mode="abs",
            min_lr=config.min_lr,
        )
        self.least = math.inf
        self.waited = 0

    def before(self, step: int) -> None:
        pass

    def after(self, loss: float) -> bool:
        self.rate.step(loss)
        if loss < self.least - self.config.plateau_delta:
            self.least, self.waited = loss, 0
        else:
            self.waited += 1
        return not self.config.early_stop or self.waited < self.config.early_stop

    def state_dict(self) -> dict[str, Any]:
        rate = {name: value for name, value in self.rate.state_dict().items() if name != "min_lrs"}
        return {"rate": rate, "least": self.least, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rate.load_state_dict(state["rate"])
        self.least, self.waited = state["least"], state["waited"]
