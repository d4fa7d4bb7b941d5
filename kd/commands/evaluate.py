"""`kd evaluate`: a package and annotated images → scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hover_batch.errors import InputError
from kd.commands.options import Data
from kd.config import TrainConfig

if TYPE_CHECKING:
    from kd.evaluate import SourceScores

_SOURCES = TrainConfig(data=Path(), out=Path()).sources


def evaluate(
    model: Annotated[str, typer.Argument(help="A package: `starter`, a .safetensors file or its folder.")],
    data: Data,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    source: Annotated[
        list[str] | None,
        typer.Option(help="A source of dataset.csv; repeat for several.", show_default=" ".join(_SOURCES)),
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
    from kd.predict import predict_image

    norm = PostSettings(sobel_norm=sobel_norm).sobel_norm  # type: ignore[arg-type]  # PostSettings checks it
    settings = InferSettings(threads=threads)
    found = find_package(model)
    card = found.card
    if card.taxonomy.classes != CONSEP.classes:
        raise InputError(
            f"package {card.name}: its classes are {card.taxonomy.name}'s, the annotations' {CONSEP.name}'s"
        )
    sources = source or list(_SOURCES)
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
