"""`kd teach`: images and a teacher → the teacher's outputs, for students to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kd.commands.options import Address, Backend, BackendOption, Cpus, Gpus, engine_settings


def teach(
    data: Annotated[Path, typer.Argument(help="Annotated images, as `kd train` takes them.", show_default=False)],
    teacher: Annotated[
        str,
        typer.Option(
            help="The teacher's package; `models import` makes one of a published checkpoint.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for the outputs; other data can be added later.", show_default=False),
    ],
    fold: Annotated[
        list[str] | None,
        typer.Option(help="A fold or split of the data; repeat for several.", show_default="train val"),
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="A source of the data; repeat for several.", show_default="all")
    ] = None,
    batch: Annotated[int, typer.Option(help="Tiles a batch.")] = 4,
    tta: Annotated[
        int, typer.Option(help="8: average over the turns and flips of each image, at eight times the cost.")
    ] = 1,
    backend: BackendOption = Backend.local,
    cpus: Cpus = 0,
    gpus: Gpus = -1,
    address: Address = "",
) -> None:
    """Run the teacher once over the images and store its outputs, every pixel predicted with its real surroundings.

    Interrupt it at any time: the same command resumes.

    hover-batch kd teach annotated/ --teacher hovernet.safetensors -o taught/
    """
    from kd.teaching.teach import teach as run

    cache = run(
        data,
        teacher,
        out,
        fold or ["train", "val"],
        source,
        batch=batch,
        tta=tta,
        engine=engine_settings(backend, cpus, gpus, address),
        say=lambda line: typer.echo(line, err=True),
    )
    typer.echo(cache.path)
