"""`kd sweep`: train and score a student for each combination of encoder, α, T, seed and split, and write one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click.core import ParameterSource

from hover_batch.config import EngineSettings, PostSettings
from hover_batch.errors import InputError, exit_code
from hover_batch.formatting import plain_console
from kd.commands.options import Address, BackendOption, Cpus, Data, Gpus, MinAreaPx, local_path
from kd.commands.train import train, train_settings
from kd.training.config import PRESETS

if TYPE_CHECKING:
    from kd.sweep import Ended

REQUIRED = ("data", "out", "preset")
"""Options of `kd train` that always have a value."""
OWN = (*REQUIRED, "encoder", "alpha", "temperature", "seed", "teacher", "threads")
"""Options of `kd train` that the sweep sets for each run."""


def sweep(
    data: Data,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for sweep.csv, with one subfolder per run.",
            parser=local_path,
            metavar="PATH",
            show_default=False,
        ),
    ],
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="Encoder, as for `kd train`; repeat for several.", show_default="the preset's"),
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option(help="α, as for `kd train`; repeat for several.", show_default="the preset's")
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="T, as for `kd train`; repeat for several.", show_default="1"),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed, as for `kd train`; repeat for several.", show_default="7")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TRAIN/VAL/TEST",
            help="Folds to train, validate and score on, such as 1/2/3; repeat for cross-validation. The runs of all "
            "splits share a row in `kd tables`.",
            show_default="train/val/test",
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Folder written by `kd teach`.",
            parser=local_path,
            metavar="PATH",
            show_default="none; then α must be 1",
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}; see `kd train`.")] = "quick",
    test_fold: Annotated[
        list[str] | None, typer.Option(help="Fold to score on; repeat for several.", show_default="test")
    ] = None,
    min_area_px: MinAreaPx = PostSettings.min_area_px,
    threads: Annotated[int, typer.Option(help="CPU cores for each run.")] = 2,
    gpus_per_run: Annotated[float, typer.Option(help="Fraction of a GPU for each run, if there are GPUs.")] = 1.0,
    backend: BackendOption = "ray",
    cpus: Cpus = 0,
    gpus: Gpus = -1,
    address: Address = "",
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- TRAIN OPTIONS]", help="Further options of `kd train`, the same for all runs."),
    ] = None,
) -> None:
    """Train and score a student for every combination of --encoder, --alpha, --temperature, --seed and --split.

    It can be interrupted at any time: the same command skips finished runs and resumes the others. A failed run does
    not stop the others. The scores of the runs of this command are written to OUT/sweep.csv, and replace those of an
    earlier command; each run's own scores are also in its folder.

    Exit codes: 0 all runs done, 3 some runs failed, 4 all runs failed.

    Examples: two values of α; the three splits of PanNuke, without a teacher.

    hover-batch kd sweep --data annotated/ --teacher taught/ -o runs/ --alpha 0 --alpha 0.5 -- --steps 900

    hover-batch kd sweep --data pannuke.zarr -o runs/ --alpha 1 --split 1/2/3 --split 2/1/3 --split 3/2/1
    """
    if not 0 < gpus_per_run <= 1:
        raise InputError(f"--gpus-per-run {gpus_per_run}: must be above 0 and at most 1, because a run uses one GPU")
    if threads < 1:
        raise InputError(f"--threads {threads}: must be at least 1")
    from kd.sweep import REPORT, Grid, Split, runs_of
    from kd.sweep import sweep as run

    settings = _train_settings(more or ())
    if split and (test_fold or {"train_folds", "val_folds"} & settings.keys()):
        raise InputError("--split: already names the folds; leave out --test-fold, --fold and --val-fold")
    runs = runs_of(
        Grid(
            encoders=encoder or (),
            alphas=alpha or (),
            temperatures=temperature or (),
            seeds=seed or (),
            splits=[Split.parse(text) for text in split or ()],
        ),
        out,
        data=data,
        teacher=teacher,
        preset=preset,
        test_folds=test_fold or ["test"],
        min_area_px=min_area_px,
        threads=threads,
        settings=settings,
    )
    ended = run(
        runs,
        out,
        gpus_per_run=gpus_per_run,
        engine=EngineSettings(backend=backend, cpus=cpus, gpus=gpus, address=address),
        notify=lambda line: typer.echo(line, err=True),
    )
    _print(ended)
    typer.echo(out / REPORT)
    failed = sum(e.scores is None for e in ended)
    raise typer.Exit(exit_code(len(ended) - failed, failed))


def _train_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse options of `kd train` into settings of `TrainConfig.of`; options that are not given are left out.

    Raises InputError if the sweep sets an option itself, and typer's usage error if an option does not exist.
    """
    parser = typer.Typer(add_completion=False)
    parser.command()(train)
    command = typer.main.get_command(parser)
    for option in command.params:
        option.required = False
    with command.make_context("kd train", list(arguments)) as context:
        for name in OWN:
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise InputError(f"-- --{name}: the sweep sets it for each run; give it before the --")
        settings = train_settings(context.params)
    if settings["model"] not in (None, "unet"):
        raise InputError(
            f"-- --model {settings['model']}: a sweep trains students only; train a teacher with `hover-batch kd train`"
        )
    return {name: value for name, value in settings.items() if value is not None and name not in REQUIRED}


def _print(ended: list[Ended]) -> None:
    """Print the report as a table, without the columns that are part of the name of a run."""
    from rich.table import Table

    from kd.evaluation.scores import shown
    from kd.sweep import report

    rows = [{k: v for k, v in r.items() if k not in ("encoder", "alpha", "temperature", "seed")} for r in report(ended)]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(title="sweep")
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "failed") else "right")
    for row in rows:
        table.add_row(*(shown(row.get(column)) for column in columns))
    plain_console().print(table)
