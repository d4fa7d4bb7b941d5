"""`kd prepare`: write annotated images in their published layouts to one cache for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hover_batch.errors import InputError
from hover_batch.formatting import plain_console
from kd.commands.options import local_path

if TYPE_CHECKING:
    from kd.data.findings import Findings
    from kd.data.samples import Sample


def prepare(
    source: Annotated[
        list[Path],
        typer.Argument(
            help="Folders as published: PanNuke (with Fold 1 …, or a single fold), CoNSeP (with Train and Test); a "
            "folder with dataset.csv; or a folder with pictures or slides and QuPath's GeoJSON.",
            parser=local_path,
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Cache to write: a .zarr folder or a .npz file.",
            parser=local_path,
            metavar="PATH",
            show_default=False,
        ),
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            help="Classes to map the annotated types to: consep or pannuke.",
            show_default="pannuke if it fits one of the folders better, else consep",
        ),
    ] = None,
    val: Annotated[
        int,
        typer.Option(
            min=0,
            help="Use the last N training tiles of CoNSeP as fold val, because CoNSeP has no validation fold.",
        ),
    ] = 0,
    map_class: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="NAME=CLASS",
            help="Class in QuPath, and what it means: one of the classes; none for nuclei without a class; ignore to "
            "skip the objects; region for rectangles in which every nucleus is outlined. Repeat for several.",
            show_default="classes by their names; Region* = region; Ignore* = ignore",
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            help="Contact sheet to write, a PNG.",
            parser=local_path,
            metavar="PATH",
            show_default="next to the cache",
        ),
    ] = None,
) -> None:
    """Read and check annotated images, and write them to one cache, with a contact sheet for visual inspection.

    The other commands take the cache as --data. The folds are the published ones: train and test for CoNSeP (--val
    moves tiles from train to a fold val); 1, 2, 3 for PanNuke. Images must have a pixel size of 0.25 µm (40×). An older
    cache at --out and an older contact sheet are replaced.

    In a folder with dataset.csv, this table has one row per image, with the columns sample_id, image, labels (16-bit
    PNG of instance ids), types (8-bit PNG of class codes, or empty), source and split (train, val or test, or the
    number of a fold), and optionally group (patient or slide) and tissue. Paths are relative to the folder.

    In a folder with QuPath's GeoJSON, x.geojson lies beside x.png or x.svs. In QuPath, draw a rectangle of the class
    Region* round each part of a slide in which every nucleus is outlined; each becomes an image. A picture of up to
    0.5 mm needs none. Files in the subfolders val and test are of these folds, all others of train.

    hover-batch kd prepare CoNSeP/ PanNuke/ -o annotated.zarr --val 5

    hover-batch kd prepare CoNSeP/ corrected/ -o annotated.zarr --val 5 --map Tumor=epithelial
    """
    from kd.data.prepare import prepare as run

    sheet = sheet or out.with_suffix(".png")
    findings = run(source, out, sheet, classes, val, _pairs(map_class or []), _watch)
    _print(findings)
    for line in findings.warnings():
        typer.echo(f"note: {line}", err=True)
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    typer.echo(f"{out}: {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB; look at {sheet}")


def _pairs(listed: Sequence[str]) -> dict[str, str]:
    """Return the pairs NAME=CLASS as a dictionary. Raises InputError if one is malformed or a name is given twice."""
    pairs: dict[str, str] = {}
    for item in listed:
        name, equals, value = (part.strip() for part in item.rpartition("="))
        if not (name and equals and value):
            raise InputError(f"--map {item}: give NAME=CLASS, such as --map Tumor=epithelial")
        if name.lower() in map(str.lower, pairs):
            raise InputError(f"--map {item}: {name} is given twice; give it once")
        pairs[name] = value
    return pairs


def _watch(samples: Iterable[Sample], total: int) -> Iterable[Sample]:
    from rich.progress import track

    return track(samples, "reading", total, console=plain_console(stderr=True), transient=True)


def _print(findings: Findings) -> None:
    """Print a table with a row for each source and fold."""
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
    plain_console().print(table)
