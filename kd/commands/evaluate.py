"""`kd evaluate`: score a model package on annotated images; write a table, JSON and a picture."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hover_batch.config import PostSettings, SobelNorm
from hover_batch.errors import InputError
from hover_batch.files import check_output_file
from kd.commands.options import Data, MinAreaPx, PackageArgument, Threads, local_path


def evaluate(
    model: PackageArgument,
    data: Data,
    fold: Annotated[
        list[str] | None,
        typer.Option(
            help="Fold: train, val, test, or the number of a published fold; repeat for several.", show_default="test"
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Source of the data to score; repeat for several.", show_default="all"),
    ] = None,
    sobel_norm: Annotated[
        SobelNorm,
        typer.Option(
            help="Scaling of the Sobel maps. fixed: the constants in the package; window: minimum and maximum of each "
            "image, as in HoVerNet."
        ),
    ] = "fixed",
    min_area_px: MinAreaPx = PostSettings.min_area_px,
    shift: Annotated[
        bool,
        typer.Option(
            "--shift", help="Also score changed images: darker, restained, blurred, compressed, with other pixel sizes."
        ),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compare PQ image by image with another package, or with the --json file of an earlier evaluation.",
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="Name of the row in `kd tables`; evaluations with the same label (folds of one setting) share a row.",
            show_default="the package's name",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="File to write all results to, for `kd tables` and for --against.",
            parser=local_path,
            metavar="PATH",
        ),
    ] = None,
    panel: Annotated[
        Path | None,
        typer.Option(
            help="Picture to write (.png): image, annotations and prediction side by side.",
            parser=local_path,
            metavar="PATH",
        ),
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(help="Another package to show in the picture, such as the teacher.", show_default=False),
    ] = None,
    time_network: Annotated[
        bool,
        typer.Option(
            "--time",
            help="Also measure times as in arXiv 2311.12553, each the median of three runs: seconds per patch of the "
            "network alone, in batches of 16, and seconds of network and post-processing for a tile of 1000² pixels, "
            "if an image is that large.",
        ),
    ] = False,
    threads: Threads = 0,
) -> None:
    """Score a model package on annotated images, source by source.

    Dice, AJI, DQ, SQ and PQ are means over images, as in HoVerNet; bPQ and mPQ are means over tissues, as in
    PanNuke-metrics. F_d (detection) and F_c (classes) count the nuclei of all images together.

    If the classes of the data and of the model differ, the classes that both have are scored. For sources that outline
    only some of the nuclei (monusac, nucls), only recall and the accuracy of types are scored. Sources with images that
    the model has seen in training are marked.

    hover-batch kd evaluate student.safetensors --data annotated.zarr --json student.json
    """
    if beside and not panel:
        raise InputError("--beside: is shown in the picture, but there is none; give its file with --panel")
    for flag, file, ending in (("--json", json_file, ".json"), ("--panel", panel, ".png")):
        if file:  # --against recognises an evaluation by its ending
            # The annotated images are PNG files, too.
            check_output_file(flag, file, (ending,), read=(data,) if file == panel else ())
    post = PostSettings(sobel_norm=sobel_norm, min_area_px=min_area_px)

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
        time_network=time_network,
        threads=threads,
        notify=partial(typer.echo, err=True),
    )
    show(evaluation)
    if json_file:
        evaluation.write(json_file)
    if panel and evaluation.picture is not None:
        import cv2

        if not cv2.imwrite(str(panel), evaluation.picture[..., ::-1]):
            raise InputError(f"--panel {panel}: cannot be written; give a file in a folder that can be written")
        typer.echo(panel)
