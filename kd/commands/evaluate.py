"""`kd evaluate`: a package and annotated images → scores, as a table, as JSON, as a picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hover_batch.errors import InputError
from kd.commands.options import Data

if TYPE_CHECKING:
    from hover_batch.model.cost import Cost
    from kd.evaluation.leakage import Leak
    from kd.evaluation.scores import SourceScores


def evaluate(
    model: Annotated[str, typer.Argument(help="A package: `starter`, a .safetensors file or its folder.")],
    data: Data,
    fold: Annotated[
        list[str] | None,
        typer.Option(help="train, val, test, or a published fold's number; repeat for several.", show_default="test"),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="A source of the data; repeat for several.", show_default="all there are"),
    ] = None,
    sobel_norm: Annotated[
        str, typer.Option(help="fixed: the card's Sobel constants; window: each image's own, as the reference does.")
    ] = "fixed",
    label: Annotated[
        str | None,
        typer.Option(
            help="What `kd tables` calls it; evaluations of one label (the folds of one setting) share a row.",
            show_default="the package's name",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file, for `kd tables`.")
    ] = None,
    panel: Annotated[
        Path | None, typer.Option(help="Write a picture (.png): image, truth and prediction side by side.")
    ] = None,
    beside: Annotated[
        str | None, typer.Option(help="Another package for the picture, as the teacher is.", show_default=False)
    ] = None,
    clock: Annotated[
        bool, typer.Option("--time", help="Time the network alone on a batch of 16 patches, as the paper does.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads of the network on the CPU; 0 = all cores.")] = 0,
) -> None:
    """Score a package on annotated images.

    Dice, AJI, DQ, SQ, PQ: means over images. bPQ, mPQ: means over tissues, as PanNuke-metrics has them.

    F_d and F_c: over all nuclei. Where the classes of data and model differ, those that both have.
    """
    folds = fold or ["test"]
    if beside and not panel:
        raise InputError("--beside: is shown in the picture; give its file by --panel")
    if panel and panel.suffix != ".png":
        raise InputError(f"--panel {panel}: the picture is a .png file")
    for flag, file in (("--json", json_file), ("--panel", panel)):
        if file and not file.parent.is_dir():
            raise InputError(f"{flag} {file}: the folder {file.parent} does not exist")
        if file and file.is_dir():
            raise InputError(f"{flag} {file}: is a folder; name a file")
    from hover_batch.config import InferSettings, PostSettings
    from hover_batch.model.cost import cost_of, seconds_per_patch
    from hover_batch.model.images import batch_of, predict_image
    from hover_batch.model.package import Package, find_package, load_network
    from hover_batch.model.predict import Predictor, load_predictor, on_device
    from hover_batch.nuclei.watershed import SobelConstants
    from kd.data.datasets import read_data
    from kd.data.pixel_size import check_pixel_size
    from kd.evaluation.evaluate import evaluate_data
    from kd.evaluation.figure import Shown, figure
    from kd.evaluation.leakage import leaks

    norm = PostSettings(sobel_norm=sobel_norm).sobel_norm  # type: ignore[arg-type]  # PostSettings checks it

    def predictor_of(package: Package) -> Predictor:
        batch = batch_of(package.card, (sample.image.shape for sample in judged.samples))
        return load_predictor(package, InferSettings(threads=threads, batch=batch))

    found = find_package(model, "package")
    other = find_package(beside, "--beside") if beside else None
    check_pixel_size(found.card, f"package {model}")
    if other:
        check_pixel_size(other.card, f"--beside {beside}")
    judged = read_data(data, folds, source)
    if not judged.samples:
        of = f" of {', '.join(source)}" if source else ""
        raise InputError(f"--fold {' '.join(folds)}: {data} has no such image{of}")
    predictor = predictor_of(found)
    card = found.card

    def constants(package: Package) -> SobelConstants | None:
        return SobelConstants.from_json(package.card.sobel) if norm == "fixed" else None

    network = load_network(found)
    cost = cost_of(network, card)
    seen = leaks(card, judged.samples)
    scores = evaluate_data(lambda image: predict_image(predictor, image), judged, constants(found), card.taxonomy)
    _print(scores, seen, cost, f"{card.name} on {data.resolve().name}, {' '.join(folds)}")
    if json_file:
        report = {
            "label": label or card.name,
            "model": card.name,
            "sha256": found.sha256,
            "architecture": f"{card.architecture} {card.encoder}".rstrip(),
            "data": data.resolve().name,
            "folds": folds,
            "sobel_norm": norm,
            "precision": predictor.precision,
            "sources": {s.source: s.to_json() for s in scores},
            "leakage": [leak.to_json() for leak in seen],
            "cost": cost.to_json()
            | (_timed(seconds_per_patch(on_device(network, predictor.device), card)) if clock else {}),
        }
        temporary = json_file.with_name(f".{json_file.name}.partial")
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", "utf-8")
        os.replace(temporary, json_file)
    if panel:
        import cv2

        shown = [Shown(card.name, lambda image: predict_image(predictor, image), constants(found), card.taxonomy)]
        if other:
            second = predictor_of(other)
            classes = other.card.taxonomy
            shown.insert(
                0, Shown(other.card.name, lambda image: predict_image(second, image), constants(other), classes)
            )
        picture = figure(judged, shown)
        if not cv2.imwrite(str(panel), picture[..., ::-1]):
            raise InputError(f"--panel {panel}: cannot be written")
        typer.echo(panel)


def _timed(seconds: float) -> dict[str, Any]:
    """With what a time means nothing without."""
    import torch

    cpu = f"a CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"seconds_per_patch": seconds, "timed_on": f"{device}, float32"}


def _print(scores: list[SourceScores], seen: list[Leak], cost: Cost, title: str) -> None:
    """A table with a row for each score and a column for each source; what the model has seen stands below it."""
    from rich.console import Console
    from rich.table import Table

    columns = [s.to_json() for s in scores]
    table = Table(
        title=title,
        caption="\n".join(f"{leak.mark} {leak}" for leak in seen),
        caption_justify="left",
        min_width=72 if seen else None,
    )
    table.add_column("")
    for s in scores:
        marks = sorted({leak.mark for leak in seen if leak.source == s.source})
        table.add_column(" ".join([s.source, *marks]), justify="right")
    for name, value in columns[0].items():
        if isinstance(value, int | float) or value is None:
            table.add_row(name, *(_cell(c[name]) for c in columns))
    for kind in ("pq_c", "f_c"):
        for name in dict.fromkeys(n for c in columns for n in c[kind]):
            table.add_row(f"{kind[:-2]} {name}", *(_cell(c[kind].get(name)) for c in columns))
    Console().print(table)
    typer.echo(
        f"{cost.parameters / 1e6:.1f} M parameters, {cost.macs_per_patch / 1e9:.2f} GMac a patch of {cost.patch} px, "
        f"{cost.macs_per_kept_pixel / 1e3:.0f} kMac a kept pixel"
    )


def _cell(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
