"""`kd train`: images with annotated nuclei → a network, packaged."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from hover_batch.errors import InputError
from kd.commands.options import Data
from kd.training.config import PRESETS, SIDES, TrainConfig

_PRESET = "the preset's"


def train_settings(
    data: Data,
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoint.pt, the logs, the panels and the package.", show_default=False)
    ],
    preset: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}; see above.")] = "quick",
    model: Annotated[
        str | None, typer.Option(help=f"{', '.join(SIDES)}: a student, or one of the teachers.", show_default="unet")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Of the U-Net, as segmentation-models-pytorch names it: mit_b0 … mit_b3, or timm's as tu-resnet18.",
            show_default=_PRESET,
        ),
    ] = None,
    encoder_weights: Annotated[
        str | None,
        typer.Option(
            help="Its start: random; imagenet, which is fetched, or for tu-tf_efficientnet_lite0 … 2 read from the "
            "packages of the extra `imagenet`; or a file with a state dict (.safetensors, .pth).",
            show_default=_PRESET,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            help="Channels of HoVerNet's first convolution; 8 trains on a CPU.", show_default="64, as published"
        ),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="A package whose weights are the start.", show_default=False)
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Folder written by `kd teach`: distil from it.", show_default=False)
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Share of the annotations in the loss, the teacher having the rest; `released`: the reverse.",
            show_default="quick, starter: 0.5 with a teacher, 1 without; else 0.5",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="By which the logits are divided in the KL divergence.", show_default="1")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Side of the crops in pixels at 0.25 µm.", show_default="256; hovernet-original: 270"),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Crops a step.", show_default="8")] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimiser steps in all.", show_default="quick: 4250; starter: 20000; else 200 epochs"),
    ] = None,
    epoch_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps between validations and checkpoints; 0: as many as cover the images' area once.",
            show_default="quick, starter: 500; else 0",
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(help="Stop there, for a trial; the same command without it goes on.", show_default=False),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at its height.", show_default=_PRESET)] = None,
    encoder_lr: Annotated[
        float | None,
        typer.Option(
            help="That of the U-Net's encoder; lower for pretrained weights.", show_default="starter: 3e-4; else --lr"
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(help="Steps over which the rate rises to --lr.", show_default="a tenth of all, at most 300"),
    ] = None,
    np_weight: Annotated[
        float | None,
        typer.Option(help="Weight of the foreground branch in the loss.", show_default="quick, starter: 3; else 1"),
    ] = None,
    hv_weight: Annotated[
        float | None, typer.Option(help="Weight of the distance branch in the loss.", show_default="1")
    ] = None,
    tp_weight: Annotated[
        float | None,
        typer.Option(help="Weight of the class branch in the loss.", show_default="quick, starter: 0.5; else 1"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the crops and the weights.", show_default="7")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the network on the CPU.", show_default="2")] = None,
    fold: Annotated[
        list[str] | None, typer.Option(help="A fold to train on; repeat for several.", show_default="train")
    ] = None,
    val_fold: Annotated[
        list[str] | None, typer.Option(help="A fold to validate on; repeat for several.", show_default="val")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SHARE: a source of the data and its share of the crops; repeat for several.",
            show_default="starter: the starter's nine; else all by their area",
        ),
    ] = None,
) -> dict[str, Any]:
    """Train a network on annotated images, or go on where the checkpoint in OUT stands, then package it.

    Interrupt it at any time: the same command resumes at the last checkpoint.

    What it then gives is what an undisturbed run gives.

    Presets. quick: AdamW, warm-up, cosine, averaged weights, full augmentation; hours on a CPU.

    starter: quick from ImageNet weights of EfficientNet-Lite0, on the nine sources and for the 20,000 steps of the
    packaged starter; about a day on a CPU.

    paper: as HoVer-UNet (arXiv 2311.12553): mit_b2 from ImageNet, weighted CE, Adam, plateaus, early stop, KL × 1/T².

    released: as its released code: α weighs the distillation, KL × T², other betas, no early stop.
    """
    return dict(
        preset=preset,
        data=data,
        out=out,
        model=model,
        encoder=encoder,
        encoder_weights=encoder_weights,
        width=width,
        init=init,
        teacher=teacher,
        alpha=alpha,
        temperature=temperature,
        size=size,
        batch=batch,
        steps=steps,
        epoch_steps=epoch_steps,
        max_steps=max_steps,
        lr=lr,
        encoder_lr=encoder_lr,
        warmup=warmup,
        np_weight=np_weight,
        hv_weight=hv_weight,
        tp_weight=tp_weight,
        seed=seed,
        threads=threads,
        train_folds=tuple(fold) if fold else None,
        val_folds=tuple(val_fold) if val_fold else None,
        sources=_shares(source) if source else None,
    )


@functools.wraps(train_settings, assigned=("__doc__", "__annotations__"))
def train(**options: Any) -> None:
    config = TrainConfig.of(**train_settings(**options))
    from kd.package import make_package, package_path
    from kd.training.state import CHECKPOINT
    from kd.training.train import train as run

    run(config)
    typer.echo(make_package(config.out / CHECKPOINT, config.data, package_path(config)))


def _shares(listed: list[str]) -> dict[str, float]:
    shares = {}
    for item in listed:
        name, _, share = item.partition("=")
        try:
            shares[name] = float(share)
        except ValueError as error:
            raise InputError(f"--source {item}: give NAME=SHARE, as in --source consep=0.5") from error
    return shares
