"""`kd package`: checkpoint → model package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kd.commands.options import Data, check_package_file


def package(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint.pt of a training run.", show_default=False)],
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.", show_default=False)],
) -> None:
    """Turn a checkpoint into a model package: its best weights, calibrated on the validation folds, and the card."""
    check_package_file(out)
    from kd.package import make_package

    typer.echo(make_package(checkpoint, data, out))
