"""`hover-batch plan`: check a cohort, and estimate the tiles, disk space and time of its run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hover_batch.commands.options import (
    AddressOption,
    BackendOption,
    CohortArgument,
    ConfigOption,
    CpusOption,
    GpusOption,
    ModelOption,
    SkipInvalidOption,
    place,
    settings_of,
)
from hover_batch.errors import HoverBatchError, InputError

if TYPE_CHECKING:
    from hover_batch.config import Settings
    from hover_batch.model.package import Package
    from hover_batch.plan import Plan


def plan(
    ctx: typer.Context,
    cohort: CohortArgument = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    skip_invalid: SkipInvalidOption = False,
    output: Annotated[
        Any,
        typer.Option(
            "--output",
            "-o",
            metavar="URL",
            parser=place,
            help="URL for the results, as for `segment`: check that they can be written there, with a small file that "
            "is removed again.",
            show_default="not checked",
        ),
    ] = None,
    backend: BackendOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    address: AddressOption = None,
    check_scale: Annotated[
        bool,
        typer.Option(
            "--check-scale",
            help="Also predict one dense field of each slide at several pixel sizes, and say which fits its nuclei "
            "best. Takes seconds per slide; slides in buckets are not checked.",
        ),
    ] = False,
) -> None:
    """Check a cohort, and estimate the tiles, disk space and time of its run.

    Checks every row and slide header. Writes nothing to disk. Estimates are upper bounds, since the tissue is not known
    yet: they are for whole slides, or for their masks (mask_path).

    Exit codes: 0 all slides can be run, 2 invalid input, 3 some slides cannot be run, 4 none can.

    Examples: check a cohort; also check the pixel sizes against the nuclei.

    hover-batch plan cohort.csv

    hover-batch plan cohort.csv --check-scale
    """
    if cohort is None:
        raise InputError("COHORT is missing: give a CSV, a folder of slides or a glob pattern")
    if isinstance(output, Path):
        raise InputError(f"--output {output}: is not a URL; only URLs are checked, so leave it out")
    settings = settings_of(ctx)
    from hover_batch.bucket import BucketFolder
    from hover_batch.cohort.manifest import read_cohort
    from hover_batch.executor.resources import resource_lines
    from hover_batch.model.architectures import check_installed
    from hover_batch.model.package import find_package
    from hover_batch.plan import check_settings, plan_cohort

    if output is not None:
        BucketFolder(output).check_writable()
        typer.echo(f"output: {output} can be written")
    package = find_package(settings.model)
    check_installed(package.card.architecture)
    check_settings(settings, package.card)
    if settings.infer.device != "auto":  # the check imports torch, which takes seconds
        from hover_batch.executor.backend import resolve_here

        resolve_here(settings, package.card)
    planned = plan_cohort(read_cohort(cohort), package.card)
    if not skip_invalid:
        planned.raise_if_faulty()
    for line in [*planned.lines(settings, package.card), *resource_lines(settings, package.card, planned.slides)]:
        typer.echo(line)
    if check_scale:
        _check_scales(planned, package, settings)
    raise typer.Exit(planned.exit_code)


def _check_scales(planned: Plan, package: Package, settings: Settings) -> None:
    """Print a line about the pixel size of each slide on disk."""
    from hover_batch.model.images import batch_of
    from hover_batch.model.predict import load_predictor
    from hover_batch.quality import scale_check

    field = (scale_check.FIELD, scale_check.FIELD)
    predictor = load_predictor(package, replace(settings.infer, batch=batch_of(package.card, [field])))
    for slide in planned.slides:
        if slide.grid is None:
            line = "pixel size not checked, because the slide is not on this machine"
        else:
            try:
                line = scale_check.check_scale(slide.record, predictor, settings.tissue)
            except HoverBatchError as error:
                line = f"pixel size not checked: {error}"
        typer.echo(f"  {slide.record.slide_id}: {line}")
