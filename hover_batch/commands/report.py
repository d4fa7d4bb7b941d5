"""`hover-batch report`: write an HTML report of a run's cohort."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hover_batch.commands.options import RunArgument, local_path, note_unlisted


def report(
    run: RunArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="HTML file to write.", parser=local_path, show_default="OUT/report.html"),
    ] = None,
) -> None:
    """Write an HTML report of a run's cohort.

    Prints the path of the report, which opens in any browser, offline. The run need not be finished.

    With more than 200 slides, the pictures are on separate pages, in a folder next to the report.

    Example:

    hover-batch report out/
    """
    from hover_batch.reporting import report_run

    typer.echo(report_run(run, output, lambda line: typer.echo(line, err=True)))
    note_unlisted(run)
