"""`kd package`: turn a training checkpoint into a model package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kd.commands.options import Data, PackageFile, check_package_file, local_path


def package(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="checkpoint.pt in the output folder of `kd train`.", parser=local_path, show_default=False),
    ],
    data: Data,
    out: PackageFile,
) -> None:
    """Turn a checkpoint of `kd train` into a model package for `segment`.

    Needed only for a training run that was stopped early, because `kd train` writes the package at its end. The package
    contains the averaged or best weights, and a card with Sobel constants found on the validation folds and with
    scores.

    hover-batch kd package student/checkpoint.pt --data annotated.zarr -o student.safetensors
    """
    check_package_file(out)
    from kd.package import make_package

    typer.echo(make_package(checkpoint, data, out))
