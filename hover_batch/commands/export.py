"""`hover-batch export`: write a run's tables in the formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hover_batch.cohort.layout import ALIASES, Format
from hover_batch.commands.options import RunArgument, local_path, note_unlisted
from hover_batch.formatting import suggestion

_NAMES = ", ".join(Format)


def format_named(name: str) -> Format:
    """Return the export format whose name or alias is `name`.

    typer.BadParameter for other names; the message suggests a similar name.
    """
    try:
        return Format(name)
    except ValueError as error:
        hint = suggestion(name, [*Format, *ALIASES])
        raise typer.BadParameter(f"{name!r} is not one of {_NAMES}{hint}") from error


def export(
    run: RunArgument,
    to: Annotated[
        list[Format],
        typer.Option(
            "--to", metavar="FORMAT", parser=format_named, help=f"One of {_NAMES}; repeat the option for several."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the files.",
            parser=local_path,
            show_default="that of each slide's table",
        ),
    ] = None,
    slide: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Export only this slide; repeat the option for several.")
    ] = None,
) -> None:
    """Write a run's tables of nuclei in the formats of other tools.

    Prints the paths of the files. Files of an earlier export are replaced. Slides that are not done are skipped.

    Exit codes: 0 all slides exported, 2 invalid input, 3 some slides skipped, 4 nothing exported.

    Example:

    hover-batch export out/ --to qupath --to csv
    """
    from hover_batch.exporting import export_run

    exported = export_run(run, to, output, slide or (), lambda line: typer.echo(line, err=True))
    note_unlisted(run)
    for path in exported.files:
        typer.echo(path)
    raise typer.Exit(exported.exit_code)
