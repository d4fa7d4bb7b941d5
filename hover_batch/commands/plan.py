"""`hover-batch plan`: check a cohort, and estimate the tiles, disk space and time of its run."""

from __future__ import annotations

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
    settings_of,
)
from hover_batch.errors import InputError


def plan(
    ctx: typer.Context,
    cohort: CohortArgument = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    skip_invalid: SkipInvalidOption = False,
    backend: BackendOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """Check a cohort, and estimate the tiles, disk space and time of its run.

    Checks every row and slide header. Writes nothing.

    Example:

    hover-batch plan cohort.csv
    """
    if cohort is None:
        raise InputError("COHORT is missing: give a CSV, a folder of slides or a glob pattern")
    settings = settings_of(ctx)
    from hover_batch.cohort.manifest import raise_if_faulty, read_cohort
    from hover_batch.executor.resources import resource_lines
    from hover_batch.model.package import find_package
    from hover_batch.plan import plan_cohort

    package = find_package(settings.model)
    planned = plan_cohort(read_cohort(cohort), package.card)
    if not skip_invalid:
        raise_if_faulty(planned.cohort)
    for line in [*planned.lines(settings, package.card), *resource_lines(settings, package.card, planned.slides)]:
        typer.echo(line)
    raise typer.Exit(planned.exit_code)
