"""Settings of a training, and presets. Settings are checked when they are made; errors name the `kd train` option."""

from __future__ import annotations

import math
import re
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
"""Relative number of crops from each source in the training of the starter."""

SIDES = {
    "unet": (256, 64, 32, 0),
    "hovernet-fast": (256, 128, 8, 0),
    "hovernet-original": (270, 222, 8, 6),
    "dist": (256, 64, 32, 0),
    "micronet": (252, 252, 0, 0),
    "mask-rcnn": (256, 64, 32, 0),
}
"""Sides in pixels of a training crop, by model: (default, smallest, divisor, remainder of side ÷ divisor).
With the divisor 0, the default alone is valid."""

LARGEST = {
    **dict.fromkeys(("steps", "epoch_steps", "max_steps", "warmup"), 1_000_000_000),
    **dict.fromkeys(("np_weight", "hv_weight", "tp_weight"), 1e6),
    **dict.fromkeys(("batch", "size", "width"), 4096),
    "temperature": 1000.0,
    "threads": 1024,
}
"""Largest values of settings; larger ones are treated as typos."""

ENCODERS = ("unet", "dist", "mask-rcnn")
"""Models that have an encoder of segmentation-models-pytorch."""

PRESETS: dict[str, dict[str, Any]] = {
    # This project's recipe, which takes hours on a CPU: the defaults of TrainConfig.
    "quick": {},
    # The training of the packaged starter: `quick` from ImageNet weights, on nine sources, about a day on a CPU.
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
    # HoVer-UNet (arXiv 2311.12553) with its best student. As far as we know, the paper does not state the batch size,
    # the epochs, the gradient clipping, and the rotations and flips; these are our choices.
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
        "teacher_labels": "soft",
        "dice_over": "sum",
        "np_weight": 1.0,
        "tp_weight": 1.0,
        "augmentation": "turns",
    },
}
"""Settings of each preset that differ from the defaults of TrainConfig."""
# HoVer-UNet's released code (DIAGNijmegen/HoVer-UNet at 913d2a9), where it differs from the paper. docs/models.md lists
# what else differs.
PRESETS["released"] = PRESETS["paper"] | {
    "alpha_of": "distillation",
    "temperature": 3.0,
    "kl_scale": "T²",
    "kl_mean": "elements",
    "dice_over": "mean",
    "msge_axes": "swapped",
    "batch": 64,
    "epochs": 240,
    "betas": (0.9, 0.999),
    "clip": 0.0,
    "plateau_delta": 1e-3,
    "plateau_relative": True,
    "min_lr": 1e-7,
    "early_stop": 0,
    "augmentation": "color",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a training run.

    Settings without an option of `kd train` are set by the presets. Raises InputError, naming the option, if a value is
    out of range or contradicts another one.
    """

    data: Path
    """Annotated images: a cache or an instance folder (see `kd.data.datasets`)."""
    out: Path
    """Folder for the checkpoint, the logs, the panels and the package."""
    preset: str = "quick"
    """Name of the preset that gave the settings; recorded only."""
    model: str = "unet"
    """unet: a student · hovernet-fast, hovernet-original: a teacher · dist, micronet, mask-rcnn: other systems."""
    encoder: str = "mit_b0"
    """Encoder of the U-Net, DIST or Mask R-CNN, by its name in segmentation-models-pytorch."""
    encoder_weights: str = "random"
    """Initial weights of the encoder: random, imagenet, or a file with a state dict."""
    width: int = 64
    """Channels of the first convolution of HoVerNet and Micro-Net; a quarter of those of Mask R-CNN's feature
    pyramid."""
    init: Path | None = None
    """Package with the initial weights; it must have the same network and classes."""
    teacher: Path | None = None
    """Folder with a teacher's outputs, written by `kd teach`."""
    alpha: float = math.nan
    """α of the loss (arXiv 2311.12553, eq. 1), from 0 to 1; nan: 0.5 with a teacher, no distillation without one."""
    alpha_of: Literal["student", "distillation"] = "student"
    """The loss that is multiplied by α; the other one is multiplied by 1 - α."""
    temperature: float = 1.0
    """Temperature T of the distillation: both logits are divided by it before the KL divergence."""
    kl_scale: Literal["1/T²", "T²"] = "1/T²"
    """Factor of the KL divergence."""
    kl_mean: Literal["pixels", "elements"] = "pixels"
    """Reduction of the KL divergence: mean over pixels of the sum over classes, or mean over pixels and classes."""
    teacher_labels: Literal["hard", "soft"] = "hard"
    """What L_distill takes from the teacher's branches np and tp for its cross-entropies and for the nuclei of MSGE:
    hard, the most probable class of each pixel, or soft, the probabilities (the paper: "y is HoVerNet prediction")."""
    class_weights: bool = False
    """Whether rare classes of the training data have larger weights in the cross-entropies."""
    dice_over: Literal["present", "sum", "mean"] = "present"
    """Reduction of the Dice loss. present: mean over the classes present in a batch · sum: over all classes, as in
    HoVerNet · mean: over all classes, absent ones counting 0, as in the library that HoVer-UNet's code uses."""
    msge_axes: Literal["own", "swapped"] = "own"
    """Axes of the derivatives in MSGE. own: h along x and v along y, as in HoVer-Net eq. 4 · swapped: h along y and v
    along x, as a meshgrid in the code of HoVerNet and HoVer-UNet has it."""
    np_weight: float = 3.0
    """Weight of the branch np (nucleus or background) in the loss. In an unweighted sum, np gives only a twentieth of
    the gradient at the decoder's output, although the foreground is the hardest task for students."""
    hv_weight: float = 1.0
    """Weight of the branch hv (distances) in the loss."""
    tp_weight: float = 0.5
    """Weight of the branch tp (classes) in the loss."""
    size: int = 0
    """Side of the training crops in pixels of 0.25 µm; 0: the default of the model."""
    batch: int = 8
    """Crops per step."""
    steps: int = 4250
    """Total number of optimiser steps; 0: `epochs` decides."""
    epochs: int = 0
    """Total number of epochs if `steps` is 0."""
    epoch_steps: int = 500
    """Steps per epoch, after which the network is validated and saved; 0: enough to cover the training images once."""
    max_steps: int = 0
    """Step at which to pause, for a trial; the same settings without it continue from there. 0: do not pause."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """Optimiser."""
    lr: float = 8e-4
    """Highest learning rate."""
    encoder_lr: float | None = None
    """Highest learning rate of the U-Net's encoder; None: `lr`. Use a lower one for pretrained weights."""
    betas: tuple[float, float] = (0.9, 0.999)
    """β₁ and β₂ of the optimiser."""
    weight_decay: float = 0.01
    """Weight decay of the optimiser."""
    schedule: Literal["cosine", "plateau"] = "cosine"
    """cosine: warm-up, then decay to zero at the last step · plateau: reduced when the validation loss stops
    falling."""
    warmup: int | None = None
    """Steps of the linear warm-up to `lr`; None: a tenth of all steps, at most 300."""
    plateau_patience: int = 5
    """Epochs without progress that the schedule `plateau` accepts before it reduces the learning rate."""
    plateau_factor: float = 0.1
    """Factor by which the schedule `plateau` reduces the learning rate."""
    plateau_delta: float = 1e-4
    """Smallest decrease of the validation loss that counts as progress, for `plateau` and `early_stop`."""
    plateau_relative: bool = False
    """Whether `plateau_delta` is a fraction of the lowest loss so far, as by default in torch, or a difference."""
    min_lr: float = 1e-6
    """Lower bound of the learning rate with the schedule `plateau`."""
    early_stop: int = 0
    """Epochs without progress after which training ends; 0: no early stopping."""
    clip: float = 5.0
    """Largest norm of the gradient; larger gradients are scaled down to it. 0: no limit."""
    ema_decay: float = 0.999
    """Decay per step of the moving average of the weights, which is validated and packaged. 0: no average; the weights
    of the epoch with the lowest validation loss are packaged."""
    augmentation: Literal["full", "turns", "color"] = "full"
    """Kind of augmentation: a row of the table in `kd.training.augment`."""
    seed: int = 7
    """Seed of the crops and of the initial weights."""
    threads: int = 2
    """Threads of the network on the CPU."""
    train_folds: tuple[str, ...] = ("train",)
    """Folds to train on."""
    val_folds: tuple[str, ...] = ("val",)
    """Folds to validate on."""
    sources: Mapping[str, float] | None = None
    """Sources to use, each with its relative number of crops; None: all, in proportion to their area in pixels."""

    def __post_init__(self) -> None:
        if self.model not in SIDES:
            raise InputError(f"--model {self.model}: unknown; give one of {', '.join(SIDES)}")
        default, smallest, multiple, excess = SIDES[self.model]
        object.__setattr__(self, "size", self.size or default)
        if not multiple and self.size != default:
            raise InputError(f"--size {self.size}: must be {default} for {self.model}")
        if multiple and (self.size % multiple != excess or self.size < smallest):
            more = f"{excess} more than " if excess else ""
            raise InputError(
                f"--size {self.size}: must be {more}a multiple of {multiple}, at least {smallest}, for {self.model}"
            )
        for name, largest in LARGEST.items():
            if (getattr(self, name) or 0) > largest:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at most {largest:.15g}")
        for name in ("batch", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("steps", "epoch_steps", "max_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative")
        if not self.steps and not self.epochs:
            raise InputError(
                f"--steps 0: the preset {self.preset} has a number of steps, not of epochs; give at least 1"
            )
        for name in ("lr", "encoder_lr"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < 1:
                raise InputError(f"--{name.replace('_', '-')} {rate}: must be above 0 and below 1")
        if self.encoder_lr is not None and self.model not in ENCODERS:
            raise InputError(f"--encoder-lr: {self.model} has no separate encoder rate; use --lr instead")
        if self.warmup is not None and self.warmup < 0:
            raise InputError(f"--warmup {self.warmup}: must not be negative")
        for name in ("np_weight", "hv_weight", "tp_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or larger, and finite")
        if self.width < 8 or self.width % 8:
            raise InputError(f"--width {self.width}: must be a multiple of 8")
        if math.isnan(self.alpha):
            object.__setattr__(self, "alpha", 1.0 if self.teacher is None else 0.5)
        if not 0 <= self.alpha <= 1:
            raise InputError(f"--alpha {self.alpha}: must be a number from 0 to 1")
        if not self.temperature >= 0.001:
            raise InputError(f"--temperature {self.temperature}: must be from 0.001 to 1000")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"--seed {self.seed}: must be a number from 0 to {(1 << 32) - 1}")
        if self.distils and self.teacher is None:
            alone = 1 if self.alpha_of == "student" else 0
            raise InputError(
                f"--alpha {self.alpha}: distils, which needs --teacher, a folder written by `hover-batch kd teach`; "
                f"give it, or --alpha {alone} to train without a teacher"
            )
        if self.teacher is not None and self.system != "hover":
            raise InputError(
                f"--teacher: {self.model} cannot be distilled from HoVerNet's outputs; leave --teacher out, or train "
                "--model unet"
            )
        if self.init is not None and self.encoder_weights not in ("random", "imagenet"):
            raise InputError(
                "--encoder-weights: --init already contains the encoder's weights; give only one of the two"
            )
        if self.sources is not None and not (self.sources and all(1e-9 < s < 1e9 for s in self.sources.values())):
            raise InputError("--source: give at least one source, each with a share above 0 and below 1e9")
        # timm would download encoders named in some other forms, or read them from a folder.
        if not re.fullmatch(r"[\w.-]+", self.encoder, re.ASCII):
            raise InputError(f"--encoder {self.encoder!r:.200}: must be a name such as mit_b0 or tu-resnet18")
        if both := set(self.train_folds) & set(self.val_folds):
            raise InputError(f"--val-fold {min(both)}: is also a fold to train on; validate on another fold")

    @classmethod
    def of(cls, preset: str, **given: Any) -> TrainConfig:
        """Return the settings of `preset`, overridden by the given settings that are not None.

        `given`: settings by the names of the fields; `data` and `out` are required. Raises InputError if the preset is
        unknown or a setting is invalid.
        """
        if preset not in PRESETS:
            raise InputError(f"--preset {preset}: unknown; give one of {', '.join(PRESETS)}")
        values = {name: value for name, value in given.items() if value is not None}
        if math.isnan(values.get("alpha", 0.0)):  # nan would select the default
            raise InputError("--alpha nan: must be a number from 0 to 1")
        return cls(preset=preset, **(PRESETS[preset] | values))

    @property
    def system(self) -> str:
        """System of the model, a key of `heads.SYSTEMS`: "hover", "dist", "micronet" or "mask-rcnn"."""
        from hover_batch.model.heads import SYSTEMS  # imports numpy, which --help does not need

        return self.model if self.model in SYSTEMS else "hover"

    @property
    def loss_shares(self) -> tuple[float, float]:
        """Factors of L_student and of L_distill in the loss.

        They are (α, 1 - α), or (1 - α, α) if `alpha_of` is "distillation".
        """
        return (self.alpha, 1 - self.alpha) if self.alpha_of == "student" else (1 - self.alpha, self.alpha)

    @property
    def distils(self) -> bool:
        """True if L_distill has a factor above 0; a teacher is then needed."""
        return self.loss_shares[1] > 0

    def to_json(self) -> dict[str, Any]:
        """Return the settings that determine the trained weights, as JSON values by name, for checkpoint and card.

        `data`, `out`, `teacher`, `threads` and `max_steps` are left out. Of the files with initial weights, only the
        name is recorded.
        """
        left_out = ("data", "out", "teacher", "threads", "max_steps")
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in left_out}
        values["init"] = None if self.init is None else self.init.name
        if self.encoder_weights not in ("random", "imagenet"):
            values["encoder_weights"] = Path(self.encoder_weights).name
        return values
