"""`kd tables`: make tables of published scores with rows for the evaluated models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hover_batch.errors import InputError
from kd.commands.options import local_path


def tables(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Files written by `kd evaluate --json`.", parser=local_path, show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for tables.md and the CSV files.",
            parser=local_path,
            metavar="PATH",
            show_default=False,
        ),
    ],
) -> None:
    """Write tables of published scores, with rows for your evaluations, as Markdown and CSV.

    Also writes a table of costs, and for each source a table of all its scores.

    The published rows are from HoVer-UNet (arXiv 2311.12553), Tables 1 to 3. Evaluations with the same label share a
    row, with their mean ± standard deviation. Each row lists its files and models, and marks scores on images that a
    model has seen in training.

    hover-batch kd tables fold1.json fold2.json fold3.json -o tables/
    """
    from kd.evaluation.tables import read_runs, write_tables
    from kd.evaluation.tables import tables as make

    made = make(read_runs(runs), out)
    try:
        write_tables(made, out)
    except OSError as error:
        raise InputError(f"-o {out}: {error.strerror}; give a folder that can be written") from error
    typer.echo(out / "tables.md")
