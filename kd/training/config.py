"""Training settings and presets, checked on construction; the error names the flag. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hover_batch.errors import InputError

STARTER_SHARES = {
    "consep": 0.29,
    "monuseg": 0.27,
    "nuinsseg": 0.19,
    "monusac": 0.07,
    "tnbc": 0.06,
    "gbm40": 0.04,
    "lgg_tcga": 0.04,
    "cpm15": 0.03,
    "dsb2018": 0.01,
}
"""Share of the crops that each source gives to the starter."""

SIDES = {"unet": (256, 64, 32, 0), "hovernet-fast": (256, 128, 8, 0), "hovernet-original": (270, 222, 8, 6)}
"""By model: the crops' default side, the smallest, and what a side leaves (last) when divided by the third."""

PRESETS: dict[str, dict[str, Any]] = {
    # This project's recipe, for hours on a CPU; the defaults of TrainConfig.
    "quick": {},
    # The same as the packaged starter was trained: from ImageNet weights, on nine sources, for most of a day on a CPU.
    "starter": {
        "encoder": "tu-tf_efficientnet_lite0",
        "encoder_weights": "imagenet",
        "encoder_lr": 3e-4,
        "steps": 20_000,
        "sources": STARTER_SHARES,
    },
    # The packaged starter-open: the same network, from data under CC BY 4.0 and CC0 alone.
    "starter-open": {
        "encoder": "tu-tf_efficientnet_lite0",
        "encoder_weights": "imagenet",
        "encoder_lr": 3e-4,
        "steps": 8000,
        "sources": {"nuinsseg": 0.75, "tnbc": 0.2, "dsb2018": 0.05},
    },
    # HoVer-UNet (arXiv 2311.12553), with its best student. What the paper does not state as far as we know (batch,
    # epochs, clipping, turns and flips) is ours.
    "paper": {
        "encoder": "mit_b2",
        "encoder_weights": "imagenet",
        "alpha": 0.5,
        "steps": 0,
        "epochs": 200,
        "epoch_steps": 0,
        "optimizer": "adam",
        "lr": 1e-4,
        "betas": (0.99, 0.9999),
        "weight_decay": 0.0,
        "ema_decay": 0.0,
        "schedule": "plateau",
        "early_stop": 10,
        "class_weights": True,
        "dice_over": "sum",
        "np_weight": 1.0,
        "tp_weight": 1.0,
        "augmentation": "turns",
    },
}
# The code that was published with it, where it differs from the paper.
PRESETS["released"] = PRESETS["paper"] | {
    "alpha_of": "distillation",
    "kl_scale": "T²",
    "kl_mean": "elements",
    "betas": (0.9, 0.999),
    "plateau_delta": 1e-3,
    "min_lr": 1e-7,
    "early_stop": 0,
    "augmentation": "color",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a training run gives. `kd train --help` says the same of what has a flag; the rest
    is the presets'."""

    data: Path
    """Images with annotated nuclei (see `kd.data.datasets`)."""
    out: Path
    """Folder for the checkpoint, the logs, the panels and the package."""
    preset: str = "quick"
    model: str = "unet"
    """unet: the student · hovernet-fast, hovernet-original: a teacher."""
    encoder: str = "mit_b0"
    """Of the U-Net, as segmentation-models-pytorch names it."""
    encoder_weights: str = "random"
    """random, imagenet, or a file with the encoder's weights."""
    width: int = 64
    """Channels of HoVerNet's first convolution."""
    init: Path | None = None
    """A package whose weights are the start; its network and classes must be these."""
    teacher: Path | None = None
    """Folder written by `kd teach`."""
    alpha: float = math.nan
    """α of Eq. 1; nan: 0.5 with a teacher, no distillation without."""
    alpha_of: Literal["student", "distillation"] = "student"
    """Which loss α multiplies; the other has 1 - α."""
    temperature: float = 1.0
    kl_scale: Literal["1/T²", "T²"] = "1/T²"
    kl_mean: Literal["pixels", "elements"] = "pixels"
    """elements: the mean over pixels and classes, which divides by the number of classes once more."""
    class_weights: bool = False
    """Whether cross-entropies are weighted by the rarity of the classes in the training data."""
    dice_over: Literal["present", "sum"] = "present"
    """The Dice loss: mean over the classes that a batch holds, or sum over all classes, as HoVerNet has it."""
    np_weight: float = 3.0
    """Weight of the terms of the branch np in the loss, likewise hv and tp. Summed plainly, np has a twentieth of the
    gradient at the decoder's output, although the foreground is what students find hardest."""
    hv_weight: float = 1.0
    tp_weight: float = 0.5
    size: int = 0
    """Side of the training crops in pixels at 0.25 µm; 0: the model's own."""
    batch: int = 8
    steps: int = 4250
    """Optimiser steps in all; 0: `epochs` of them."""
    epochs: int = 0
    epoch_steps: int = 500
    """Steps between validations and checkpoints; 0: as many as cover the area of the training images once."""
    max_steps: int = 0
    """Stop there, for a trial; the same settings without it go on. 0: never."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    lr: float = 8e-4
    encoder_lr: float | None = None
    """Learning rate of the U-Net's encoder; None: `lr`. Lower for an encoder that has been trained before."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    schedule: Literal["cosine", "plateau"] = "cosine"
    """cosine: warm-up, then down to zero at the last step · plateau: by the validation loss."""
    warmup: int | None = None
    """Steps over which the rate rises to `lr`; None: a tenth of all, at most 300."""
    plateau_patience: int = 5
    plateau_factor: float = 0.1
    plateau_delta: float = 1e-4
    """What counts as progress of the validation loss, for the plateau and for the early stop."""
    min_lr: float = 1e-6
    early_stop: int = 0
    """Epochs without progress after which training ends; 0: never."""
    clip: float = 5.0
    """Largest norm of the gradient; longer ones are shortened to it."""
    ema_decay: float = 0.999
    """Decay a step of the moving average of the weights, which is what is validated and shipped. 0: no average; the
    weights of the epoch with the least validation loss are shipped."""
    augmentation: Literal["full", "turns", "color"] = "full"
    """See `kd.training.augment`."""
    seed: int = 7
    threads: int = 2
    train_folds: tuple[str, ...] = ("train",)
    val_folds: tuple[str, ...] = ("val",)
    sources: Mapping[str, float] | None = None
    """Share of the crops that each source gives; None: see `kd.training.crops.source_shares`."""

    def __post_init__(self) -> None:
        if self.model not in SIDES:
            raise InputError(f"--model {self.model}: not known; known are {', '.join(SIDES)}")
        default, smallest, multiple, excess = SIDES[self.model]
        object.__setattr__(self, "size", self.size or default)
        if self.size % multiple != excess or self.size < smallest:
            more = f"{excess} more than " if excess else ""
            raise InputError(f"--size {self.size}: must be {more}a multiple of {multiple}, at least {smallest}")
        for name in ("batch", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("steps", "epoch_steps", "max_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative")
        if not self.steps and not self.epochs:
            raise InputError(f"--steps 0: the preset {self.preset} counts steps, not epochs; give at least 1")
        for name in ("lr", "encoder_lr"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < 1:
                raise InputError(f"--{name.replace('_', '-')} {rate}: must lie between 0 and 1")
        if self.encoder_lr is not None and self.model != "unet":
            raise InputError(f"--encoder-lr: {self.model} is trained at one rate; give --lr alone")
        if self.warmup is not None and self.warmup < 0:
            raise InputError(f"--warmup {self.warmup}: must not be negative")
        for name in ("np_weight", "hv_weight", "tp_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be a number from 0 on")
        if self.width < 8 or self.width % 8:
            raise InputError(f"--width {self.width}: must be a multiple of 8")
        if math.isnan(self.alpha):
            object.__setattr__(self, "alpha", 1.0 if self.teacher is None else 0.5)
        if not 0 <= self.alpha <= 1:
            raise InputError(f"--alpha {self.alpha}: must lie between 0 and 1")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"--temperature {self.temperature}: must be a number above 0")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"--seed {self.seed}: must lie between 0 and {(1 << 32) - 1}")
        if self.distils and self.teacher is None:
            alone = 1 if self.alpha_of == "student" else 0
            raise InputError(
                f"--alpha {self.alpha}: distils, which needs --teacher, a folder written by `hover-batch kd teach`; "
                f"--alpha {alone} trains without"
            )
        if self.init is not None and self.encoder_weights not in ("random", "imagenet"):
            raise InputError("--encoder-weights: --init brings the encoder's weights, too; give one of the two")
        if self.sources is not None and not (self.sources and all(0 < s < math.inf for s in self.sources.values())):
            raise InputError("--source: name at least one source, each with a share above 0")
        if both := set(self.train_folds) & set(self.val_folds):
            raise InputError(f"--val-fold {min(both)}: is trained on; validate on another")

    @classmethod
    def of(cls, preset: str, **given: Any) -> TrainConfig:
        """A preset, in which the settings that are not None go before."""
        if preset not in PRESETS:
            raise InputError(f"--preset {preset}: not known; known are {', '.join(PRESETS)}")
        values = {name: value for name, value in given.items() if value is not None}
        if math.isnan(values.get("alpha", 0.0)):  # which would stand for the default
            raise InputError("--alpha nan: must lie between 0 and 1")
        return cls(preset=preset, **(PRESETS[preset] | values))

    @property
    def loss_shares(self) -> tuple[float, float]:
        """Of L_student and of L_distill in the loss."""
        return (self.alpha, 1 - self.alpha) if self.alpha_of == "student" else (1 - self.alpha, self.alpha)

    @property
    def distils(self) -> bool:
        return self.loss_shares[1] > 0

    def to_json(self) -> dict[str, Any]:
        """What decides the weights (not where files lie), for the checkpoint and the card."""
        elsewhere = ("data", "out", "teacher", "threads", "max_steps")
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in elsewhere}
        named = ("random", "imagenet")
        weights = self.encoder_weights if self.encoder_weights in named else Path(self.encoder_weights).name
        return values | {"init": None if self.init is None else self.init.name, "encoder_weights": weights}
