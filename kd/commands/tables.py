"""`kd tables`: evaluations → the paper's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hover_batch.errors import InputError


def tables(
    runs: Annotated[list[Path], typer.Argument(help="Files that `kd evaluate --json` wrote.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for tables.md and the CSV files.", show_default=False)
    ],
) -> None:
    """Write the paper's tables, its rows beside ours: Markdown and CSV.

    Evaluations of one label share a row: their mean ± standard deviation. Each row names its files and models; what a
    model has seen is marked in it.
    """
    from kd.evaluation.tables import read_runs, write_tables
    from kd.evaluation.tables import tables as make

    made = make(read_runs(runs), out)
    try:
        write_tables(made, out)
    except OSError as error:
        raise InputError(f"-o {out}: {error.strerror}; give a folder that can be written") from error
    typer.echo(out / "tables.md")
