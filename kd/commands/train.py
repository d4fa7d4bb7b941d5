"""`kd train`: images with annotated nuclei → a network, packaged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hover_batch.errors import InputError
from kd.commands.options import Data
from kd.config import TrainConfig

_DEFAULT = TrainConfig(data=Path(), out=Path())
_SHARES = [f"{name}={share:g}" for name, share in _DEFAULT.sources.items()]
PACKAGE = "student.safetensors"
"""What `train` calls the package in its output folder."""


def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint.pt, log.csv and the package.", show_default=False)],
    init: Annotated[
        Path | None, typer.Option(help="A package whose weights are the start, in place of random ones.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Encoder of the U-Net, as segmentation-models-pytorch names it.")
    ] = _DEFAULT.encoder,
    size: Annotated[int, typer.Option(help="Side of the training crops in pixels at 0.25 µm.")] = _DEFAULT.size,
    batch: Annotated[int, typer.Option(help="Crops a step.")] = _DEFAULT.batch,
    steps: Annotated[
        int, typer.Option(help="Optimiser steps in all; the learning rate falls to zero over them.")
    ] = _DEFAULT.steps,
    epoch_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = _DEFAULT.epoch_steps,
    lr: Annotated[float, typer.Option(help="Learning rate after warm-up.")] = _DEFAULT.lr,
    warmup: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = _DEFAULT.warmup,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = _DEFAULT.weight_decay,
    ema_decay: Annotated[
        float, typer.Option(help="Decay a step of the averaged weights, which are what is shipped.")
    ] = _DEFAULT.ema_decay,
    seed: Annotated[int, typer.Option(help="Of the crops and the weights.")] = _DEFAULT.seed,
    threads: Annotated[int, typer.Option(help="Threads of the network on the CPU.")] = _DEFAULT.threads,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SHARE: a source of dataset.csv and its share of the crops; repeat for several.",
            show_default=" ".join(_SHARES),
        ),
    ] = None,
) -> None:
    """Train a student on annotated images, or go on where the checkpoint in OUT stands, then package it.

    Interrupt it at any time: the same command resumes at the last checkpoint.

    What it then gives is what an undisturbed run gives.
    """
    config = TrainConfig(
        data=data,
        out=out,
        init=init,
        encoder=encoder,
        size=size,
        batch=batch,
        steps=steps,
        epoch_steps=epoch_steps,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        ema_decay=ema_decay,
        seed=seed,
        threads=threads,
        sources=_shares(source or _SHARES),
    )
    from kd.package import make_package
    from kd.train import CHECKPOINT
    from kd.train import train as run

    run(config)
    typer.echo(make_package(out / CHECKPOINT, data, out / PACKAGE))


def _shares(listed: list[str]) -> dict[str, float]:
    shares = {}
    for item in listed:
        name, _, share = item.partition("=")
        try:
            shares[name] = float(share)
        except ValueError as error:
            raise InputError(f"--source {item}: give NAME=SHARE, as in --source consep=0.5") from error
    return shares
