"""`kd package`: turn a training checkpoint, or the mean of several, into a model package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kd.commands.options import Data, PackageFile, check_package_file, local_path


def package(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            help="checkpoint.pt in the output folder of `kd train`; of several, the mean of the weights is packaged.",
            parser=local_path,
            metavar="CHECKPOINT...",
            show_default=False,
        ),
    ],
    data: Data,
    out: PackageFile,
) -> None:
    """Turn a checkpoint of `kd train`, or the mean of several, into a model package for `segment`.

    For a single checkpoint, this is needed only if the training was stopped early, because `kd train` writes the
    package at its end. The package contains the moving average of the weights or those of the best epoch, and a card
    with Sobel constants found on the validation folds and with scores.

    Give several checkpoints to package the mean of their weights. The trainings must have the same network, images,
    teacher and initial package (`--init`), but different seeds or settings. The mean can be better than each of them,
    and is as fast.

    hover-batch kd package student/checkpoint.pt --data annotated.zarr -o student.safetensors

    hover-batch kd package a/checkpoint.pt b/checkpoint.pt --data annotated.zarr -o mean.safetensors
    """
    check_package_file(out, checkpoints)
    from kd.package import make_package

    typer.echo(make_package(checkpoints, data, out))
