"""Options that several commands share."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hover_batch.config import EngineSettings
from hover_batch.errors import InputError

Data = Annotated[
    Path,
    typer.Option(help="What `kd prepare` wrote (.zarr, .npz), or a folder with dataset.csv.", show_default=False),
]


class Backend(StrEnum):
    """Where tasks run."""

    ray = "ray"
    local = "local"


BackendOption = Annotated[
    Backend,
    typer.Option(
        help="ray: tasks on all cores and GPUs, of this machine or a cluster; local: one process. Same results.",
        envvar="HOVER_BATCH_BACKEND",
    ),
]
Cpus = Annotated[int, typer.Option(help="Cores to use; 0 = all.")]
Gpus = Annotated[int, typer.Option(help="GPUs to use; 0 = none, -1 = all.")]
Address = Annotated[
    str,
    typer.Option(
        help="Address of a Ray cluster to join.", show_default="start Ray on this machine", metavar="HOST:PORT"
    ),
]


def check_package_file(out: Path) -> None:
    """Make the folder of a package before minutes of work.

    Raises InputError if the name does not end in .safetensors, or the file cannot be written.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"-o {out}: the name of a package must end in .safetensors")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {out}: {error.strerror}; give a folder that can be written") from error
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError(f"-o {out}: cannot be written; give a file in a folder that can be written")


def engine_settings(backend: Backend, cpus: int, gpus: int, address: str) -> EngineSettings:
    """Return the settings. Raises InputError if they are out of range or contradict each other."""
    return EngineSettings(backend=backend.value, cpus=cpus, gpus=gpus, address=address)
