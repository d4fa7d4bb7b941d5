"""`hover-batch diff`: compare the results of two runs on the same slides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hover_batch.commands.options import local_path, note_unlisted
from hover_batch.errors import InputError
from hover_batch.files import check_output_file, to_json, write_atomically
from hover_batch.formatting import counted, plain_console

if TYPE_CHECKING:
    from rich.console import Console

    from hover_batch.diff.cohort import CohortDiff
    from hover_batch.diff.slide import Confusion

SHOWN = 20
"""Maximum number of slides in the table."""
WIDTH = 110
"""Minimum width of the table in characters."""


def _percentage(text: str) -> float:
    """Parse a percentage such as 1% to a fraction. typer.BadParameter for anything else."""
    try:
        value = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not text.strip().endswith("%") or not 0 <= value < float("inf"):
        raise typer.BadParameter(f"{text!r} is not a percentage; write it with its sign, such as 1%")
    return value


def diff(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="Folder of the first run, the reference.", parser=local_path)
    ],
    second: Annotated[
        Path, typer.Argument(metavar="B", help="Folder of the second run, on the same slides.", parser=local_path)
    ],
    endpoint: Annotated[
        str,
        typer.Option("--of", metavar="nuclei|CLASS", help="Density that --tolerance checks: of nuclei, or of a class."),
    ] = "nuclei",
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT",
            parser=_percentage,
            help="Largest relative change, (B − A) / A, of the nuclei per mm² of tissue, in each slide and on average.",
            show_default="only report",
        ),
    ] = None,
    min_matched: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT",
            parser=_percentage,
            help="Smallest share of matched nuclei in each slide: pairs ÷ mean number of nuclei in A and B.",
            show_default="any",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all numbers to this .json file.", parser=local_path),
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write a page with the places that differ most to this .html file.",
            parser=local_path,
        ),
    ] = None,
) -> None:
    """Compare the nuclei of two runs on the same slides, for example of two models, versions or settings.

    Two nuclei match if the IoU of their contours is above 0.5. For each slide, the table gives the numbers of nuclei in
    both runs, in A only (vanished), in B only (appeared) and with another class, and the change of the density. The
    slides that differ most are first; the cohort is last.

    The slides themselves are not needed; the --html page shows pixels of those that can still be opened.

    Exit codes: 0 compared, and within --tolerance and --min-matched if given; 2 invalid input, such as runs on
    different slides; 3 a slide or the cohort is outside these limits, limits are given and a slide is done in only one
    run, or a table cannot be read; 4 no slide could be compared.

    Examples: look at all differences; accept a new version only if no slide changes by more than 1 %.

    hover-batch diff out/ out-new/ --html diff.html

    hover-batch diff out/ out-new/ --tolerance 1% --min-matched 98%
    """
    if min_matched is not None and min_matched > 1:
        raise InputError(f"--min-matched {min_matched:.0%}: must be at most 100%, the share if all nuclei match")
    for flag, path, endings in (("--json", json_file, (".json",)), ("--html", html_file, (".html", ".htm"))):
        if path is not None:
            check_output_file(flag, path, endings, read=(first, second))
    from hover_batch.diff.cohort import Limits
    from hover_batch.diff.run import diff_runs

    found = diff_runs(
        first,
        second,
        Limits(endpoint, tolerance, min_matched),
        pictures=html_file is not None,
        notify=lambda line: typer.echo(line, err=True),
    )
    for run in (first, second):
        note_unlisted(run)
    if json_file is not None:
        write_atomically(json_file, to_json(found.to_json()))
    if html_file is not None:
        from hover_batch.diff.page import render

        write_atomically(html_file, render(found))
    _print(found.cohort)
    for path in (json_file, html_file):
        if path is not None:
            typer.echo(path)
    raise typer.Exit(found.cohort.exit_code)


def _print(cohort: CohortDiff) -> None:
    """Print the table of slides, the classes, and what is outside the limits or was not compared."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    from hover_batch.diff.page import change

    console = plain_console()
    if console.width < WIDTH:  # a narrower table would cut numbers
        console.width = WIDTH
    endpoint = cohort.limits.endpoint
    if confusion := cohort.confusion:
        table = Table(Column("slide", overflow="fold", min_width=12), box=SIMPLE_HEAD)
        for name in ("in A", "in B", "matched", "only A", "only B", "class", "IoU", "IoU p5", "area"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column(f"{endpoint}, change", justify="right", min_width=8)
        for slide in cohort.slides[:SHOWN]:
            a, b = slide.counts
            matched = slide.matched
            counts = (a, b, matched, a - matched, b - matched, slide.confusion.changed)
            ratios = (slide.iou["median"], slide.iou["p5"], slide.area_ratio["median"])
            table.add_row(
                slide.slide_id,
                *(f"{count:,}" for count in counts),
                *("–" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
                change(slide.change(endpoint).relative),
            )
        if (more := len(cohort.slides) - SHOWN) > 0:
            table.add_row(f"… {more:,} more (--json)")
        table.add_section()
        mean = cohort.mean_change(endpoint)
        a, b = (sum(slide.counts[side] for slide in cohort.slides) for side in range(2))
        matched = sum(slide.matched for slide in cohort.slides)
        counts = (a, b, matched, a - matched, b - matched, confusion.changed)
        name = f"cohort, {counted(len(cohort.slides), 'slide')}"
        table.add_row(name, *(f"{count:,}" for count in counts), "", "", "", change(mean.mean))
        console.print(table)
        console.print(
            "matched: IoU of the contours above 0.5 · class: matched, with another class · area: median of B ÷ A",
            soft_wrap=True,
        )
        for name in cohort.endpoints:
            mean = cohort.mean_change(name)
            span = "" if mean.low is None else f", 95 % interval {change(mean.low)} to {change(mean.high)}"
            left_out = f", {counted(mean.undefined, 'slide')} without it in A left out" if mean.undefined else ""
            n = counted(mean.n, cohort.unit.removesuffix("s"))
            console.print(f"{name}: mean change {change(mean.mean)}{span}, n = {n}{left_out}", soft_wrap=True)
        _print_confusion(console, confusion)
    for missing in cohort.missing:
        console.print(f"not compared: {missing.slide_id}, done in {missing.done_in}; {missing.reason}", soft_wrap=True)
    for fault in cohort.faults:
        console.print(f"outside the limits: {fault}", soft_wrap=True)
    if cohort.slides and cohort.limits.given and not cohort.faults:
        console.print("within the limits")


def _print_confusion(console: Console, confusion: Confusion) -> None:
    """Print the table of classes, and which of them only one run has."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    content = confusion.to_json()
    table = Table("class in A", box=SIMPLE_HEAD)
    for name in content["columns"]:
        table.add_column(f"B: {name}", justify="right")
    for name, counts in zip(content["rows"], content["counts"], strict=True):
        table.add_row(name, *(f"{count:,}" for count in counts))
    console.print(table)
    for run, names in (("A", confusion.only_in_rows), ("B", confusion.only_in_columns)):
        if names:
            console.print(f"classes that only {run} has: {', '.join(names)}", soft_wrap=True)
