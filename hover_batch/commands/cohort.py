"""`hover-batch cohort`: gather a run in a data set that can be asked questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hover_batch.commands.options import RunArgument

BUILD = "build"


class CohortGroup(TyperGroup):
    """Group whose first argument is a command or else the folder of a run, which is then added to a data set."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the group; all of them are those of `build` if the first is not a command."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [BUILD, *args]
        return super().parse_args(ctx, args)


cohort_app = typer.Typer(cls=CohortGroup, no_args_is_help=True)


@cohort_app.command(BUILD)
def build(
    run: RunArgument,
    dataset: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DATASET", help="Folder of the data set; made if it does not exist."),
    ],
    slide: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Add only this slide; repeat the option for several.")
    ] = None,
) -> None:
    """Add a run's slides to a data set."""
    from hover_batch.dataset.update import add_run

    added = add_run(run, dataset, slide or (), lambda line: typer.echo(line, err=True))
    typer.echo(dataset)
    raise typer.Exit(added.exit_code)
