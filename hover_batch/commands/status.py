"""`hover-batch status`: show the progress of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from hover_batch.commands.options import RunArgument, note_unlisted


def status(
    output: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for other programs.")] = False,
) -> None:
    """Show the progress of a run.

    Prints the numbers of slides that are done, failed and pending, the rate, the time left, and the failures.

    The command only reads the run's files, so you can call it at any time, on any machine that sees the folder.

    Example:

    hover-batch status out/
    """
    from hover_batch.status import read_status

    progress = read_status(output)
    note_unlisted(output)
    for line in [progress.to_json()] if as_json else progress.lines():
        typer.echo(line)
