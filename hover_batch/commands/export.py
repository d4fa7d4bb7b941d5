"""`hover-batch export`: a run's tables in the formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hover_batch.cohort.layout import Format
from hover_batch.commands.options import RunArgument


def export(
    run: RunArgument,
    to: Annotated[list[Format], typer.Option("--to", help="What to write; may be given several times.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the files.", show_default="beside each table")
    ] = None,
    slide: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Only this slide; may be given several times.")
    ] = None,
) -> None:
    """Write the tables of nuclei for other tools, and print the files' names. Files of an earlier export are replaced.

    hover-batch export out/ --to qupath --to csv
    """
    from hover_batch.convert import export_run

    exported = export_run(run, to, output, slide or (), lambda line: typer.echo(line, err=True))
    for path in exported.files:
        typer.echo(path)
    raise typer.Exit(exported.exit_code)
