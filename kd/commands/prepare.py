"""`kd prepare`: annotated images in their published layouts → one cache to train from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kd.data.findings import Findings
    from kd.data.samples import Sample


def prepare(
    source: Annotated[
        list[Path],
        typer.Argument(
            help="Folders as published: PanNuke (Fold 1 …, or one of them), CoNSeP (Train, Test), or one with "
            "dataset.csv.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The cache to write: a .zarr, or a .npz file.", show_default=False)
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            help="consep or pannuke: the classes that types are mapped to.",
            show_default="pannuke if PanNuke is among the folders, else consep",
        ),
    ] = None,
    val: Annotated[
        int,
        typer.Option(min=0, help="Number of CoNSeP's last training tiles that become the fold val, which it lacks."),
    ] = 0,
    sheet: Annotated[
        Path | None, typer.Option(help="The contact sheet to write, a PNG.", show_default="beside the cache")
    ] = None,
) -> None:
    """Read annotated images, check them, and write them to one cache, with a contact sheet to look at.

    Give the cache to the other commands as --data. The folds are the published ones: train, val, test, or 1, 2, 3.
    """
    from kd.data.prepare import prepare as run

    sheet = sheet or out.with_suffix(".png")
    findings = run(source, out, sheet, classes, val, _watch)
    _print(findings)
    for line in findings.warnings():
        typer.echo(f"note: {line}", err=True)
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    typer.echo(f"{out}: {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB; look at {sheet}")


def _watch(samples: Iterable[Sample], total: int) -> Iterable[Sample]:
    from rich.console import Console
    from rich.progress import track

    return track(samples, "reading", total, console=Console(stderr=True), transient=True)


def _print(findings: Findings) -> None:
    """Print a table with a row for each source and fold."""
    from rich.console import Console
    from rich.table import Table

    table = Table("source", "fold", title=f"Annotated images, classes of {findings.taxonomy.name}")
    for name in ("images", "nuclei"):
        table.add_column(name, justify="right")
    table.add_column("by class")
    for column in table.columns[:-1]:
        column.no_wrap = True
    for (source, fold), part in findings.parts.items():
        counts = ", ".join(f"{c.name} {part.by_class[c.id]:,}" for c in findings.taxonomy.nuclei)
        table.add_row(source, fold, f"{part.images:,}", f"{part.nuclei:,}", counts if part.by_class else "no types")
    Console().print(table)
