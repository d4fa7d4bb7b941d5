"""The commands `hover-batch kd …`. Heavy imports stand inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hover_batch.errors import InputError
from kd.config import TrainConfig

if TYPE_CHECKING:
    from kd.evaluate import SourceScores

kd_app = typer.Typer(
    name="kd",
    help="Train, package and evaluate the student network.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Data = Annotated[Path, typer.Option(help="Folder with dataset.csv, images and labels.", show_default=False)]
_DEFAULT = TrainConfig(data=Path(), out=Path())
_SHARES = [f"{name}={share:g}" for name, share in _DEFAULT.sources.items()]
PACKAGE = "student.safetensors"
"""What `train` calls the package in its output folder."""


@kd_app.command()
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


@kd_app.command()
def package(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint.pt of a training run.", show_default=False)],
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.", show_default=False)],
) -> None:
    """Turn a checkpoint into a model package: averaged weights, calibrated on the validation split, and the card."""
    from kd.package import make_package

    typer.echo(make_package(checkpoint, data, out))


@kd_app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A package: `starter`, a .safetensors file or its folder.")],
    data: Data,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    source: Annotated[
        list[str] | None,
        typer.Option(help="A source of dataset.csv; repeat for several.", show_default=" ".join(_DEFAULT.sources)),
    ] = None,
    sobel_norm: Annotated[
        str, typer.Option(help="fixed: the card's Sobel constants; window: each image's own, as the reference does.")
    ] = "fixed",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file, too.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the network on the CPU; 0 = all cores.")] = 0,
) -> None:
    """Score a package on annotated images: Dice, AJI, DQ, SQ, PQ as means over images, F_d and F_c over all nuclei."""
    from hover_batch.config import InferSettings, PostSettings
    from hover_batch.model.package import find_package, load_network
    from hover_batch.model.predict import Predictor
    from hover_batch.nuclei.watershed import SobelConstants
    from hover_batch.taxonomy import CONSEP
    from kd.datasets import read_instance_folder
    from kd.evaluate import evaluate as score
    from kd.evaluate import predict_image

    norm = PostSettings(sobel_norm=sobel_norm).sobel_norm  # type: ignore[arg-type]  # PostSettings checks it
    settings = InferSettings(threads=threads)
    found = find_package(model)
    card = found.card
    if card.taxonomy.classes != CONSEP.classes:
        raise InputError(
            f"package {card.name}: its classes are {card.taxonomy.name}'s, the annotations' {CONSEP.name}'s"
        )
    sources = source or list(_DEFAULT.sources)
    samples = read_instance_folder(data, split, sources)
    if not samples:
        raise InputError(f"--split {split}: {data}/dataset.csv has no such image of {', '.join(sources)}")
    predictor = Predictor(load_network(found), card, settings)
    constants = SobelConstants.from_json(card.sobel) if norm == "fixed" else None
    scores = score(lambda image: predict_image(predictor, image), samples, constants, card.taxonomy)
    _print(scores, f"{card.name} on the {split} images")
    if json_file:
        report = {
            "model": card.name,
            "sha256": found.sha256,
            "split": split,
            "sobel_norm": norm,
            "precision": predictor.precision,
            "sources": {s.source: s.to_json() for s in scores},
        }
        json_file.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")


def _print(scores: list[SourceScores], title: str) -> None:
    """A table with a row for each score and a column for each source."""
    from rich.console import Console
    from rich.table import Table

    columns = [s.to_json() for s in scores]
    table = Table(title=title)
    table.add_column("")
    for s in scores:
        table.add_column(s.source, justify="right")
    for name in columns[0]:
        if name not in ("source", "f_c"):
            table.add_row(name, *(_cell(c[name]) for c in columns))
    for name in dict.fromkeys(n for c in columns for n in c["f_c"]):
        table.add_row(f"f_{name}", *(_cell(c["f_c"].get(name)) for c in columns))
    Console().print(table)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
