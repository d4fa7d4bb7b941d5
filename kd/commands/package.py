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
            help="checkpoint.pt in the output folder of `kd train`; several are averaged.",
            parser=local_path,
            metavar="CHECKPOINT...",
            show_default=False,
        ),
    ],
    data: Data,
    out: PackageFile,
) -> None:
    """Turn a checkpoint of `kd train`, or the mean of several, into a model package for `segment`.

    One checkpoint is needed only if a training run was stopped early, because `kd train` writes the package at its end.
    The package contains the averaged or best weights, and a card with Sobel constants found on the validation folds and
    with scores.

    Of several trainings that began with the same package (`--init`) but had other seeds or settings, the mean of the
    weights is packaged. It can be better than each of them, and is no slower.

    hover-batch kd package student/checkpoint.pt --data annotated.zarr -o student.safetensors

    hover-batch kd package a/checkpoint.pt b/checkpoint.pt --data annotated.zarr -o mean.safetensors
    """
    check_package_file(out)
    from kd.package import make_package

    typer.echo(make_package(checkpoints, data, out))
