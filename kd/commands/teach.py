"""`kd teach`: store a teacher's outputs for annotated images, from which students are distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hover_batch.config import EngineSettings
from kd.commands.options import Address, BackendOption, Cpus, Gpus, Source, local_path


def teach(
    data: Annotated[
        Path,
        typer.Argument(
            help="Annotated images: a cache that `kd prepare` wrote (.zarr, .npz), or a folder with dataset.csv.",
            parser=local_path,
            show_default=False,
        ),
    ],
    teacher: Annotated[
        str,
        typer.Option(
            help="Package of the teacher; `models import` converts published checkpoints, such as HoVerNet's.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the outputs; outputs for other data can be added later.",
            parser=local_path,
            metavar="PATH",
            show_default=False,
        ),
    ],
    fold: Annotated[
        list[str] | None,
        typer.Option(help="Fold of the data; repeat for several.", show_default="train and val"),
    ] = None,
    source: Source = None,
    batch: Annotated[int, typer.Option(help="Tiles per batch.")] = 4,
    tta: Annotated[
        int,
        typer.Option(help="8: average over the rotations and flips of each image, at eight times the cost; 1: do not."),
    ] = 1,
    backend: BackendOption = "local",
    cpus: Cpus = 0,
    gpus: Gpus = -1,
    address: Address = "",
) -> None:
    """Run a teacher, such as HoVerNet, over all images once, and store its outputs (logits of np and tp, and h and v).

    `kd train --teacher` reads them instead of running the teacher in every epoch. Whole images are predicted tile by
    tile with their real surroundings. Interrupt it at any time: the same command resumes.

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
        engine=EngineSettings(backend=backend, cpus=cpus, gpus=gpus, address=address),
        notify=lambda line: typer.echo(line, err=True),
    )
    typer.echo(cache.path)
