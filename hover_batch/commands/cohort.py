"""`hover-batch cohort`: gather the nuclei of runs in a data set, and answer questions about it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hover_batch.commands.options import RunArgument, note_unlisted, place
from hover_batch.errors import UploadError

BUILD = "build"
"""Name of the command that adds a run; users may omit it."""


class CohortGroup(TyperGroup):
    """Group of commands on data sets. If the first argument is not the name of a command, `build` is run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the group as click does, and return those that it leaves over.

        If the first argument is neither the name of a command nor an option for help, `build` is put before it.

        `ctx`: click's context. `args`: the command line after the group's name.
        """
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [BUILD, *args]
        return super().parse_args(ctx, args)


cohort_app = typer.Typer(
    cls=CohortGroup,
    no_args_is_help=True,
    help="Gather the nuclei of runs in one data set, and answer questions about it.\n\n"
    "A data set holds the nuclei of any number of slides, runs and models as GeoParquet, and a table of its slides. "
    "DuckDB, Polars, GeoPandas and pandas read it.\n\n"
    "To add the slides of a run, give its folder; the name of the command, `build`, is optional:\n\n"
    "hover-batch cohort OUT -o DATASET\n\n"
    "If the folder of a run has the name of a command, write it as ./NAME.",
)


@cohort_app.command(BUILD)
def build(
    run: RunArgument,
    dataset: Annotated[
        Any,
        typer.Option(
            "--output",
            "-o",
            metavar="DATASET",
            parser=place,
            help="Folder of the data set, or its URL in cloud storage, such as s3://bucket/dataset; created if it does "
            "not exist.",
        ),
    ],
    slide: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Add only this slide; repeat the option for several.")
    ] = None,
) -> None:
    """Add a run's finished slides to a data set.

    Prints the path of the data set. Repeat the command when the run has more slides: only new slides and slides that
    were run again are read. One data set may hold slides of several runs and models. The folder of the run is not
    changed; the data set does not need it afterwards.

    If the command is interrupted, the data set remains valid; repeat the command to add the rest. Files for a bucket
    are first written to a temporary folder (set TMPDIR to use another place). Run only one command at a time that
    writes to a bucket.

    Exit codes: 0 all slides are in the data set, 2 invalid input, 3 some slides were skipped or a bucket could not be
    reached, 4 all were skipped.

    Examples: add two runs; count nuclei by class.

    hover-batch cohort out/ -o cohort/

    hover-batch cohort out-of-another-site/ -o cohort/

    hover-batch query cohort/ "SELECT type, count(*) FROM nuclei GROUP BY type"
    """
    from hover_batch.dataset.update import add_run

    try:
        added = add_run(run, dataset, slide or (), lambda line: typer.echo(line, err=True))
    except UploadError as error:
        raise UploadError(f"{error}; repeat the command: what was added stays, and the rest is added then") from error
    note_unlisted(run)
    typer.echo(dataset)
    raise typer.Exit(added.exit_code)
