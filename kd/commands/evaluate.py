"""`kd evaluate`: a package and annotated images → scores, as a table, as JSON, as a picture."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hover_batch.config import PostSettings
from hover_batch.errors import InputError
from kd.commands.options import Data


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
    min_area_px: Annotated[
        int,
        typer.Option(
            "--min-area-px",
            help="Drop predicted nuclei of fewer pixels. Published figures were found with 10, the reference's value.",
        ),
    ] = PostSettings.min_area_px,
    shift: Annotated[
        bool,
        typer.Option(
            "--shift", help="Also score the images darkened, restained, blurred, compressed, and at other pixel sizes."
        ),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Another package, or the --json file of an earlier evaluation: PQ compared image by image.",
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="What `kd tables` calls it; evaluations of one label (the folds of one setting) share a row.",
            show_default="the package's name",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write everything to this file, for `kd tables` and for a later --against."),
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

    Of sources that outline only some of the nuclei (monusac, nucls): the recall of these and the accuracy of types.
    """
    if beside and not panel:
        raise InputError("--beside: is shown in the picture; give its file by --panel")
    if panel and panel.suffix != ".png":
        raise InputError(f"--panel {panel}: the picture is a .png file")
    for flag, file in (("--json", json_file), ("--panel", panel)):
        if file and not file.parent.is_dir():
            raise InputError(f"{flag} {file}: the folder {file.parent} does not exist")
        if file and file.is_dir():
            raise InputError(f"{flag} {file}: is a folder; name a file")
    post = PostSettings(sobel_norm=sobel_norm, min_area_px=min_area_px)  # type: ignore[arg-type]  # it checks both

    from kd.commands.score_tables import show
    from kd.evaluation.evaluate_package import evaluate_package

    evaluation = evaluate_package(
        model,
        data,
        folds=fold or ["test"],
        sources=source,
        post=post,
        label=label,
        shift=shift,
        against=against,
        picture=panel is not None,
        beside=beside,
        clock=clock,
        threads=threads,
        say=partial(typer.echo, err=True),
    )
    show(evaluation)
    if json_file:
        evaluation.write(json_file)
    if panel and evaluation.picture is not None:
        import cv2

        if not cv2.imwrite(str(panel), evaluation.picture[..., ::-1]):
            raise InputError(f"--panel {panel}: cannot be written")
        typer.echo(panel)
