"""`hover-batch segment`: a cohort of slides → tables of nuclei."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hover_batch.commands.options import (
    ENGINE,
    MODEL,
    POST,
    AddressOption,
    BackendOption,
    CohortArgument,
    ConfigOption,
    CpusOption,
    GpusOption,
    ModelOption,
    SkipInvalidOption,
    setting,
    settings_of,
)
from hover_batch.config import Precision, Runtime, SobelNorm, Tissue
from hover_batch.errors import InputError
from hover_batch.logs import LogFormat


def segment(
    ctx: typer.Context,
    cohort: CohortArgument = None,
    example: Annotated[
        bool, typer.Option("--example", help="Run on real H&E that ships inside a dependency: needs no data.")
    ] = False,
    from_run: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Make new tables from the predictions of the run in this folder, with other settings "
            "(--sobel-norm, --halo, --min-area-px, --class-map): needs no slides, no GPU and no weights.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; the same command resumes a run that stopped.")
    ] = Path("hover-batch-out"),
    model: ModelOption = None,
    unit: Annotated[
        int | None, setting("--unit", "Side in pixels of what is predicted and stored at once.", MODEL)
    ] = None,
    batch: Annotated[int | None, setting("--batch", "Tiles in a batch.", MODEL)] = None,
    precision: Annotated[
        Precision | None,
        setting("--precision", "auto: fp16 on a GPU, else fp32. bf16 is fast on new CPUs, and moves outlines.", MODEL),
    ] = None,
    runtime: Annotated[
        Runtime | None,
        setting(
            "--runtime",
            "auto: openvino on a CPU, torch on a GPU. compile: torch.compile, minutes at the start.",
            MODEL,
        ),
    ] = None,
    threads: Annotated[
        int | None, setting("--threads", "Threads of a network on the CPU; 0 = as fits the cores.", MODEL)
    ] = None,
    device: Annotated[
        str | None, setting("--device", "auto, cpu or cuda; CUDA_VISIBLE_DEVICES chooses GPUs.", MODEL)
    ] = None,
    tissue: Annotated[
        Tissue | None,
        setting("--tissue", "auto: find the tissue; all: the whole canvas. A mask_path takes precedence.", POST),
    ] = None,
    mask_mpp: Annotated[float | None, setting("--mask-mpp", "Pixel size in µm of the tissue mask.", POST)] = None,
    min_tissue_um2: Annotated[float | None, setting("--min-tissue-um2", "Drop smaller pieces of tissue.", POST)] = None,
    sobel_norm: Annotated[
        SobelNorm | None,
        setting("--sobel-norm", "fixed: the same nuclei wherever tiles fall; window: as published, for parity.", POST),
    ] = None,
    halo: Annotated[int | None, setting("--halo", "Context in pixels read around each region.", POST)] = None,
    min_area_px: Annotated[int | None, setting("--min-area-px", "Drop nuclei of fewer inference pixels.", POST)] = None,
    class_map: Annotated[
        Path | None,
        setting(
            "--class-map",
            'TOML that merges or renames classes, each named once: neoplastic = ["epithelial"]',
            POST,
            "the model's classes",
        ),
    ] = None,
    discard_predictions: Annotated[
        bool | None,
        setting("--discard-predictions", "Remove each slide's prediction store when its table is written.", POST, "no"),
    ] = None,
    config: ConfigOption = None,
    skip_invalid: SkipInvalidOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Remove the results in the output folder, and start anew.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Retry quarantined slides, too.")] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            metavar="FLAG",
            help="Record slides with this quality flag (docs/numbers.md) as failed; repeatable. Results stay.",
        ),
    ] = None,
    max_failures: Annotated[
        int | None, setting("--max-failures", "Stop when more slides than this have failed.", ENGINE, "never")
    ] = None,
    backend: BackendOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    address: AddressOption = None,
    scratch: Annotated[
        str | None,
        setting("--scratch", "Folder on each machine for copies of slides from buckets.", ENGINE, "temp folder"),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="Format of stderr; json: one object a line.", envvar="HOVER_BATCH_LOG_FORMAT")
    ] = LogFormat.text,
) -> None:
    """Turn a cohort of slides into tables of nuclei.

    Every slide's nuclei go to OUTPUT/slides/SLIDE_ID/nuclei.parquet.

    A slide that cannot be opened is listed in failures.csv; the others go on.

    hover-batch segment cohort.csv -o out/

    hover-batch segment --example -o example-run

    hover-batch segment --from out/ -o stricter/ --min-area-px 120
    """
    ctx.find_root().obj = log_format
    if sum((cohort is not None, example, from_run is not None)) != 1:
        raise InputError("give exactly one of COHORT, --example and --from")
    stored = None
    if from_run is not None:
        from hover_batch.stored_run import StoredRun

        stored = StoredRun.open(from_run)
    settings = settings_of(ctx, stored.settings.to_dict() if stored else None)
    from hover_batch.segment import run_segment

    outcome = run_segment(
        stored or cohort or str(_example(output)),
        output,
        settings,
        skip_invalid=skip_invalid,
        force=force,
        command=sys.argv[1:],
        retry_failed=retry_failed,
        fail_on=fail_on or (),
        log_format=log_format,
    )
    for line in outcome.closing_lines():
        typer.echo(line)
    raise typer.Exit(outcome.exit_code)


def _example(output: Path) -> Path:
    """Write the example's slides and return its cohort. InputError where `output` holds anything but a run."""
    from hover_batch.cohort.layout import RunLayout
    from hover_batch.cohort.ledger import Ledger
    from hover_batch.slide.example import write_example

    layout = RunLayout(output)
    with Ledger(layout):
        return write_example(layout.example)
