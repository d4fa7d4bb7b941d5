"""`hover-batch status`: where a run stands."""

from __future__ import annotations

from typing import Annotated

import typer

from hover_batch.commands.options import RunArgument


def status(
    output: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")] = False,
) -> None:
    """Show where a run stands, from its files alone. Writes nothing; the run may go on, also on another machine.

    hover-batch status out/
    """
    from hover_batch.status import read_status

    stands = read_status(output)
    for line in [stands.to_json()] if as_json else stands.lines():
        typer.echo(line)
