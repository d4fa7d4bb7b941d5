"""Options that several commands of `hover-batch kd` share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from hover_batch.cohort.record import Url
from hover_batch.config import Backend
from hover_batch.errors import InputError
from hover_batch.files import check_output_file, given_path


def local_path(text: str) -> Path:
    """Return `text`, the value of an option or argument, as a path on this machine.

    InputError if it is a URL, or empty.
    """
    if url := Url.of(text):
        raise InputError(f"{url}: is a URL, and `kd` uses files on this machine only; copy them, and give their path")
    return given_path(text)


Data = Annotated[
    Path,
    typer.Option(
        help="Annotated images: a cache that `kd prepare` wrote (.zarr, .npz), or a folder with dataset.csv.",
        parser=local_path,
        metavar="PATH",
        show_default=False,
    ),
]
PackageArgument = Annotated[
    str, typer.Argument(help="Model package: `starter`, a .safetensors file, or its folder.", show_default=False)
]
PackageFile = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help="Package to write, a .safetensors file.",
        parser=local_path,
        metavar="PATH",
        show_default=False,
    ),
]
Source = Annotated[
    list[str] | None, typer.Option(help="Source of the data to use; repeat for several.", show_default="all")
]
Threads = Annotated[int, typer.Option(help="Threads of the network on the CPU; 0 = all cores.")]
MinAreaPx = Annotated[
    int,
    typer.Option(
        "--min-area-px",
        help="Drop predicted nuclei with fewer pixels. Published scores use 10, HoVerNet's value.",
    ),
]
BackendOption = Annotated[
    Backend,
    typer.Option(
        help="ray: all cores and GPUs of this machine or a cluster; local: one process. The results are the same.",
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


def check_package_file(out: Path, read: Iterable[Path] = ()) -> None:
    """Check that the package file `out` can be written. Missing folders are created.

    Call this before a long computation. `read`: files that must not change.

    Raises InputError if the name does not end in .safetensors, or the file cannot be written or is one of `read`.
    """
    if out.suffix != ".safetensors":  # also of upper case, which `find_package` does not find
        raise InputError(f"-o {out}: the name of a package must end in .safetensors; add it")
    check_output_file("-o", out, (".safetensors",), read, make_folder=True)
