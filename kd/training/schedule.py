"""How the learning rate goes, and when training ends.

Both schedules: `before(step)` is called before each step; `after(loss)` after each epoch with its validation loss, and
says whether to go on.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch

from kd.training.config import TrainConfig


class Schedule(Protocol):
    def before(self, step: int) -> None: ...
    def after(self, loss: float) -> bool: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Schedule:
    return Plateau(config, optimizer) if config.schedule == "plateau" else Cosine(config, optimizer, steps)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero at step `steps`."""
    warmup = min(300, steps // 10) if config.warmup is None else config.warmup
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


class Cosine:
    """The rate is a function of the step, in the proportions that the groups begin with; training ends with the last
    step."""

    def __init__(self, config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.config, self.optimizer, self.steps = config, optimizer, steps
        self.shares = [group["lr"] / config.lr for group in optimizer.param_groups]

    def before(self, step: int) -> None:
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = learning_rate(self.config, step, self.steps) * share

    def after(self, loss: float) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Plateau:
    """The rate falls where the validation loss stays; training ends where it stays for longer.

    Progress is a loss lower than the least so far by `plateau_delta`, in absolute terms. After more than
    `plateau_patience` epochs without, the rate is multiplied by `plateau_factor`, down to `min_lr`; with the
    `early_stop`-th such epoch, training ends.
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
