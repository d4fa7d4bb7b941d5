"""Training settings, checked on construction; the error names the flag."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hover_batch.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a training run gives. `--help` of `kd train` says the same of each flag."""

    data: Path
    """Folder with dataset.csv (see `kd.datasets`)."""
    out: Path
    """Folder for the checkpoint, the log and the package."""
    init: Path | None = None
    """A package whose weights are the start, in place of random ones; its encoder must be this one."""
    encoder: str = "mit_b0"
    size: int = 256
    """Side of the training crops in pixels at 0.25 µm; a multiple of 32."""
    batch: int = 8
    steps: int = 4250
    """Optimiser steps in all; the learning rate falls to zero over them."""
    epoch_steps: int = 500
    """Steps between checkpoints and validations."""
    lr: float = 8e-4
    warmup: int = 300
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    """Decay a step of the moving average of the weights, which is what is validated and shipped."""
    seed: int = 7
    threads: int = 2
    sources: dict[str, float] = field(default_factory=lambda: {"consep": 0.5, "monuseg": 0.35, "tnbc": 0.15})
    """Share of the crops that each source of dataset.csv gives."""

    def __post_init__(self) -> None:
        if self.size % 32 or self.size < 64:
            raise InputError(f"--size {self.size}: must be a multiple of 32, at least 64")
        for name in ("batch", "steps", "epoch_steps", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not 0 < self.lr < 1:
            raise InputError(f"--lr {self.lr}: must lie between 0 and 1")
        if not self.sources or min(self.sources.values()) <= 0:
            raise InputError("--source: name at least one source, each with a share above 0")

    def to_json(self) -> dict[str, Any]:
        """What decides the weights (not where files lie), for the checkpoint and the card."""
        values = {k: v for k, v in asdict(self).items() if k not in ("data", "out", "threads", "epoch_steps")}
        return values | {"init": None if self.init is None else self.init.name}
