"""`hover-batch cohort counts`, `near` and `compare`: ready-made questions about a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hover_batch.cohort.record import Url
from hover_batch.commands.query import DatasetArgument, JoinOption, OnOption, OutputOption
from hover_batch.commands.results import check_output, deliver, print_notes
from hover_batch.formatting import plain_console

if TYPE_CHECKING:
    from hover_batch.dataset.groups import Effect
    from hover_batch.dataset.questions import Subject

ByOption = Annotated[
    str,
    typer.Option(
        metavar="COLUMN", help="Column of the slides or of the --join file, such as patient_id, slide_id or group."
    ),
]
OnlyClassOption = Annotated[
    str | None, typer.Option("--of", metavar="CLASS", help="Count only nuclei of this class.", show_default="all")
]
ModelOption = Annotated[
    str | None, typer.Option(help="Model of the nuclei, if the data set holds several.", show_default="the only one")
]
WithoutFlaggedOption = Annotated[bool, typer.Option("--without-flagged", help="Leave out slides with quality flags.")]
ShowSqlOption = Annotated[
    bool, typer.Option("--show-sql", help="Print the SQL for `hover-batch query` instead of running it.")
]


def micrometres(text: str) -> float:
    """Parse a length in µm: a number, which may have the unit µm or um. typer.BadParameter for any other text."""
    number = text.casefold().replace("μ", "u").removesuffix("um")  # the micro sign, too, becomes a μ
    try:
        return float(number)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a length in µm, such as 20") from error


@contextmanager
def _subject(
    dataset: Path | Url, join: Path | None, on: str, model: str | None, without_flagged: bool, output: Path | None
) -> Iterator[Subject]:
    """Open the data set and yield the slides that a question is about."""
    from hover_batch.dataset.interrupts import ended_by_ctrl_c
    from hover_batch.dataset.opened import Dataset
    from hover_batch.dataset.questions import Subject

    check_output(output, dataset, join)
    with Dataset(dataset, join, on) as opened, ended_by_ctrl_c(opened.connection):
        yield Subject.of(opened, model, without_flagged)


def counts(
    dataset: DatasetArgument,
    by: ByOption = "patient_id",
    of: OnlyClassOption = None,
    join: JoinOption = None,
    on: OnOption = "patient_id",
    model: ModelOption = None,
    without_flagged: WithoutFlaggedOption = False,
    show_sql: ShowSqlOption = False,
    output: OutputOption = None,
) -> None:
    """Count the nuclei of each patient, group or slide, by class, and give their density per mm² of tissue.

    The density over several slides is their total number of nuclei divided by their total area of tissue.

    The SQL for the densities of one class is:

    SELECT patient_id, sum(n_inflammatory) / sum(tissue_mm2) FROM slides GROUP BY patient_id

    Example:

    hover-batch cohort counts DATASET --by patient_id -o counts.csv
    """
    from hover_batch.dataset.questions import counts_sql

    with _subject(dataset, join, on, model, without_flagged, output) as subject:
        sql = counts_sql(subject, by, of)
        if show_sql:
            typer.echo(sql)
        else:
            print_notes(subject.notes)
            deliver(subject.dataset.select(sql), output)


def near(
    dataset: DatasetArgument,
    of: Annotated[str, typer.Option("--of", metavar="CLASS", help="Class of the nuclei that are counted.")],
    to: Annotated[str, typer.Option("--to", metavar="CLASS", help="Class of the neighbours.")],
    within: Annotated[
        Any, typer.Option(metavar="UM", help="Largest distance between the centroids, in µm.", parser=micrometres)
    ] = "20",
    by: ByOption = "slide_id",
    join: JoinOption = None,
    on: OnOption = "patient_id",
    model: ModelOption = None,
    without_flagged: WithoutFlaggedOption = False,
    show_sql: ShowSqlOption = False,
    output: OutputOption = None,
) -> None:
    """Count the nuclei of one class that have a nucleus of another class nearby.

    `nuclei` is the number of nuclei of the class --of, `near` the number of those with a neighbour, and `share` their
    ratio. The slides are read one after the other.

    In SQL, this joins each nucleus with those in the same or an adjacent cell of a grid, and checks the distance.
    --show-sql prints the query. `hover-batch query` gives the same answer with it, but reads all slides at once.

    Example:

    hover-batch cohort near DATASET --of epithelial --to inflammatory --within 20 --by patient_id
    """
    from hover_batch.dataset.near import NearQuestion

    with _subject(dataset, join, on, model, without_flagged, output) as subject:
        question = NearQuestion(subject, of, to, within, by)
        if show_sql:
            typer.echo(question.sql)
        else:
            print_notes(subject.notes)
            deliver(question.answer(_track), output)


def compare_groups(
    dataset: DatasetArgument,
    by: ByOption = "group",
    of: OnlyClassOption = None,
    join: JoinOption = None,
    on: OnOption = "patient_id",
    model: ModelOption = None,
    without_flagged: WithoutFlaggedOption = False,
    show_sql: ShowSqlOption = False,
    output: OutputOption = None,
) -> None:
    """Compare the densities of nuclei between groups of patients.

    For every pair of groups, the table shows the median of each density in both groups, the difference in medians, and
    Cliff's delta. Cliff's delta is 1 if all patients of the second group have a higher density than all of the first,
    -1 if all have a lower one, and 0 if neither group tends to have higher densities. Intervals are 95 % bootstrap
    intervals over patients. Each group needs at least three patients.

    If the errors of the model were measured, the difference in the density of all nuclei has two more intervals, which
    include the error of the counts: one for groups from one source (laboratory, stain, scanner, tissue), one for groups
    from two sources.

    --show-sql prints the SQL of the densities by patient, from which these numbers are computed.

    Examples: compare groups in the cohort CSV; compare groups in a clinical table.

    hover-batch cohort compare DATASET --by group

    hover-batch cohort compare DATASET --by response --join clinical.csv --of inflammatory
    """
    import pyarrow as pa

    from hover_batch.dataset.groups import compare_densities, densities_sql

    with _subject(dataset, join, on, model, without_flagged, output) as subject:
        if show_sql:
            typer.echo(densities_sql(subject, by, of))
            return
        comparison = compare_densities(subject, by, of)
        print_notes([*subject.notes, *comparison.notes])
        if output is None:
            _show_effects(comparison.effects)
        else:
            rows = pa.Table.from_pylist([effect.to_row() for effect in comparison.effects])
            subject.dataset.create_table("effects", rows)
            deliver(subject.dataset.select("FROM effects"), output)


def _track(items: list[Any]) -> Iterable[Any]:
    """Yield the items, with a progress bar on stderr if it is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, "files", console=console, transient=True, disable=not console.is_terminal)


def _show_effects(effects: Sequence[Effect]) -> None:
    """Print a table of the effects for every pair of groups, with their intervals."""
    from rich.table import Column, Table

    tables: dict[tuple[str, str], Table] = {}
    for effect in effects:
        patients = [f"{name} (n = {count})" for name, count in zip(effect.groups, effect.patients, strict=True)]
        columns = [*patients, "difference", "Cliff's delta"]
        table = tables.setdefault(effect.groups, Table(Column("median", no_wrap=True), *columns))
        low, high = effect.difference_interval
        difference = f"{effect.difference:+.4g} ({low:+.4g} to {high:+.4g})"
        low, high = effect.cliffs_delta_interval
        delta = f"{effect.cliffs_delta:+.2f} ({low:+.2f} to {high:+.2f})"
        table.add_row(effect.measure, *(f"{median:.4g}" for median in effect.medians), difference, delta)
        if effect.measured:
            for what, (low, high) in (
                ("  one source", effect.measured.one_source),
                ("  two sources", effect.measured.two_sources),
            ):
                table.add_row(what, "", "", f"({low:+.4g} to {high:+.4g})", "")
    plain_console().print(*tables.values())
