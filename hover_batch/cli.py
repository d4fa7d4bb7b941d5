"""Command line `hover-batch`, with the commands of `hover_batch.commands` and `kd`."""

from __future__ import annotations

from typing import Annotated

import typer

from hover_batch.cli_errors import CommandGroup
from hover_batch.commands.cohort import cohort_app
from hover_batch.commands.compare import compare
from hover_batch.commands.diff import diff
from hover_batch.commands.doctor import doctor
from hover_batch.commands.export import export
from hover_batch.commands.models import models_app
from hover_batch.commands.options import warn_of_unknown_variables
from hover_batch.commands.plan import plan
from hover_batch.commands.query import query
from hover_batch.commands.questions import compare_groups, counts, near
from hover_batch.commands.report import report
from hover_batch.commands.segment import segment
from hover_batch.commands.status import status
from hover_batch.commands.view import view
from hover_batch.version import __version__
from kd.cli import kd_app

app = typer.Typer(
    name="hover-batch",
    cls=CommandGroup,
    help="Segment and classify every nucleus in cohorts of H&E whole-slide images.\n\n"
    "Start with `hover-batch doctor`, which checks this machine, and `hover-batch segment --example -o example-run`.",
    epilog="Exit codes: 0 all done · 1 internal error · 2 invalid input, nothing was run · 3 some slides failed · "
    "4 nothing could be processed · 130 interrupted.",
    no_args_is_help=True,
    suggest_commands=False,  # click suggests commands already
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (doctor, segment, plan, status, export, report, view, compare, diff, query):
    app.command()(command)
cohort_app.command()(counts)
cohort_app.command()(near)
cohort_app.command("compare")(compare_groups)
app.add_typer(cohort_app, name="cohort")
app.add_typer(kd_app, name="kd")
app.add_typer(models_app, name="models")


@app.callback(invoke_without_command=True)
def main(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Print the version and exit if --version is given; otherwise warn about unknown environment variables.

    Those are variables HOVER_BATCH_* that no command reads; the warnings go to stderr. The command `segment` gives them
    itself, in its own log format. Raises typer.Exit after the version is printed.
    """
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if ctx.invoked_subcommand != "segment":  # it warns in its own log format
        warn_of_unknown_variables(ctx)
