"""`hover-batch segment`: turn a cohort of slides into tables of nuclei."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hover_batch.cohort.record import Url
from hover_batch.commands.options import (
    ENGINE,
    MODEL,
    POST,
    SAMPLE,
    AddressOption,
    BackendOption,
    CohortArgument,
    ConfigOption,
    CpusOption,
    GpusOption,
    ModelOption,
    SkipInvalidOption,
    batch_size,
    local_path,
    note_unlisted,
    place,
    setting,
    settings_of,
    share,
    warn_of_unknown_variables,
)
from hover_batch.config import Precision, Runtime, SobelNorm, Tissue
from hover_batch.errors import InputError
from hover_batch.logs import LogFormat


def segment(
    ctx: typer.Context,
    cohort: CohortArgument = None,
    example: Annotated[
        bool, typer.Option("--example", help="Run on the included H&E slides; no data of your own is needed.")
    ] = False,
    from_run: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            parser=local_path,
            help="Make new tables from the stored predictions of the run in this folder, with other settings "
            "(--sobel-norm, --halo, --min-area-px, --class-map). Needs no slides, no GPU and no weights.",
        ),
    ] = None,
    output: Annotated[
        Any,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            parser=place,
            help="Folder for the results, or a URL in cloud storage, such as s3://bucket/run, together with --work; to "
            "resume a run that stopped, repeat the command.",
        ),
    ] = "hover-batch-out",
    dataset: Annotated[
        Any,
        typer.Option(
            "--dataset",
            metavar="DATASET",
            parser=place,
            help="Data set to which the finished slides are added at the end of the run, as by `hover-batch cohort`: a "
            "folder, or a URL in cloud storage; created if it does not exist.",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="FOLDER",
            parser=local_path,
            help="Folder on disk for the run's working files, such as its predictions, if --output is a URL. Finished "
            "slides are uploaded from it.",
            show_default="none",
        ),
    ] = None,
    model: ModelOption = None,
    unit: Annotated[
        int | None,
        setting("--unit", "Side in pixels of a unit, the square that is predicted and stored at once.", MODEL),
    ] = None,
    batch: Annotated[
        Any,
        setting(
            "--batch",
            "Tiles per batch. auto: on a GPU as many as make it faster, found in a short trial; the run keeps the "
            "number when it resumes. On a CPU, 8.",
            MODEL,
            parser=batch_size,
            metavar="N|auto",
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        setting(
            "--precision", "auto: fp16 on a GPU, else fp32. bf16 is fast on recent CPUs, but shifts outlines.", MODEL
        ),
    ] = None,
    runtime: Annotated[
        Runtime | None,
        setting(
            "--runtime",
            "auto: openvino on a CPU, torch on a GPU. compile: torch.compile, which takes minutes at the start.",
            MODEL,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        setting("--threads", "Threads of each network on the CPU; 0 = chosen by the number of cores.", MODEL),
    ] = None,
    device: Annotated[
        str | None, setting("--device", "auto, cpu or cuda; CUDA_VISIBLE_DEVICES selects GPUs.", MODEL)
    ] = None,
    tissue: Annotated[
        Tissue | None,
        setting(
            "--tissue",
            "auto: find the tissue; all: the whole slide. A mask_path in the cohort CSV takes precedence.",
            POST,
        ),
    ] = None,
    mask_mpp: Annotated[float | None, setting("--mask-mpp", "Pixel size in µm of the tissue mask.", POST)] = None,
    min_tissue_um2: Annotated[
        float | None, setting("--min-tissue-um2", "Ignore pieces of tissue smaller than this area in µm².", POST)
    ] = None,
    sobel_norm: Annotated[
        SobelNorm | None,
        setting(
            "--sobel-norm",
            "fixed: nuclei do not depend on tile borders; window: as in HoVerNet's own code, for comparison.",
            POST,
        ),
    ] = None,
    halo: Annotated[
        int | None, setting("--halo", "Context in pixels around each region in post-processing.", POST)
    ] = None,
    min_area_px: Annotated[
        int | None, setting("--min-area-px", "Drop nuclei with fewer inference pixels.", POST)
    ] = None,
    class_map: Annotated[
        Path | None,
        setting(
            "--class-map",
            "TOML file that merges or renames classes: new name = list of the model's classes. Example line: "
            'neoplastic = ["epithelial"]',
            POST,
            "the model's classes",
            parser=local_path,
        ),
    ] = None,
    stop_at: Annotated[
        Any,
        setting(
            "--stop-at",
            "Estimate the density of nuclei from random squares of each slide, until its 90 % interval is within "
            "± this percentage of it, such as 5%. Small or heterogeneous slides are processed whole. To complete the "
            "slides later, repeat the command without this option (docs/numbers.md).",
            SAMPLE,
            "whole slides",
            parser=share,
            metavar="SHARE",
        ),
    ] = None,
    of: Annotated[
        str | None,
        setting("--of", "Density that --stop-at estimates: of nuclei, or of a class.", SAMPLE, metavar="nuclei|CLASS"),
    ] = None,
    discard_predictions: Annotated[
        bool | None,
        setting(
            "--discard-predictions",
            "Remove each slide's predictions once its table is written; saves disk space, but rules out --from.",
            POST,
            "no",
        ),
    ] = None,
    config: ConfigOption = None,
    skip_invalid: SkipInvalidOption = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Remove the results of the run in --output and --work, and start again from the beginning.",
        ),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Also retry quarantined slides: those that repeatedly crashed their workers in an earlier start. "
            "Other failed slides are retried in any case.",
        ),
    ] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            metavar="FLAG",
            help="Record slides with this quality flag (docs/numbers.md) as failed, but keep their results; repeat the "
            "option for several flags.",
        ),
    ] = None,
    max_failures: Annotated[
        int | None, setting("--max-failures", "Stop the run when more slides than this have failed.", ENGINE, "never")
    ] = None,
    backend: BackendOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    address: AddressOption = None,
    scratch: Annotated[
        str | None,
        setting("--scratch", "Folder on each machine for copies of slides from cloud storage.", ENGINE, "temp folder"),
    ] = None,
    log_format: Annotated[
        LogFormat,
        typer.Option(
            help="Format of the messages on stderr; json: one object per line.", envvar="HOVER_BATCH_LOG_FORMAT"
        ),
    ] = LogFormat.text,
) -> None:
    """Turn a cohort of slides into tables of nuclei.

    Writes the nuclei of each slide to OUTPUT/slides/SLIDE_ID/nuclei.parquet, and a summary to OUTPUT/summary.csv.

    Nothing is run if a row of the cohort or a setting is invalid; `hover-batch plan` lists what is wrong.

    Slides that cannot be opened or processed are listed in OUTPUT/failures.csv, and the run continues with the others.

    Repeat the command to resume a run that stopped, and to retry the slides that failed.

    With --dataset, the finished slides are also added to a data set of all nuclei (see `hover-batch cohort --help`).

    Examples: process a cohort; try the included slides; make new tables from the stored predictions of the first run;
    upload the results to a bucket.

    hover-batch segment cohort.csv -o out/

    hover-batch segment --example -o example-run

    hover-batch segment --from out/ -o stricter/ --min-area-px 120

    hover-batch segment cohort.csv -o s3://bucket/run --work out/
    """
    ctx.find_root().obj = log_format
    warn_of_unknown_variables(ctx)
    if sum((cohort is not None, example, from_run is not None)) != 1:
        raise InputError("give exactly one of COHORT, --example and --from RUN")
    bucket = output if isinstance(output, Url) else None
    folder = _folder(output, work)
    stored_run = None
    if from_run is not None:
        from hover_batch.stored_run import StoredRun

        stored_run = StoredRun.open(from_run)
        note_unlisted(from_run)
    settings = settings_of(ctx, stored_run.settings.to_dict() if stored_run else None)
    if settings.sample.stop_at:
        _refuse_whole_only({"--from": from_run, "--dataset": dataset})
    from hover_batch.segment import add_to_dataset, check_dataset, run_segment

    if dataset is not None:
        check_dataset(dataset, output, folder)
    outcome = run_segment(
        stored_run or cohort or str(_example(folder)),
        folder,
        settings,
        skip_invalid=skip_invalid,
        force=force,
        command=sys.argv[1:],
        retry_failed=retry_failed,
        fail_on=fail_on or (),
        log_format=log_format,
        bucket=bucket,
    )
    for line in outcome.closing_lines():
        typer.echo(line)
    code = outcome.exit_code
    if dataset is not None:
        code = add_to_dataset(outcome, dataset, log_format)
    raise typer.Exit(code)


def _refuse_whole_only(options: dict[str, Path | None]) -> None:
    """Raise InputError if one of these options, which need whole slides, is given."""
    for option, folder in options.items():
        if folder is not None:
            raise InputError(
                f"{option} {folder}: needs whole slides, and --stop-at estimates from a part of them; leave one of the "
                "two out"
            )


def _folder(output: Path | Url, work: Path | None) -> Path:
    """Return the folder of the run on disk. InputError if --work is missing, or has no use."""
    if isinstance(output, Path):
        if work is not None:
            raise InputError(f"--work {work}: is only for a URL in --output, and --output {output} is a folder")
        return output
    if work is None:
        raise InputError(
            f"--output {output}: is a URL, and a run needs a folder on disk, too, for its working files; add for "
            f"example --work {output.name or 'run'}-work"
        )
    return work


def _example(output: Path) -> Path:
    """Write the example's slides and return the path of their cohort.csv.

    InputError if `output` holds anything but a run.
    """
    from hover_batch.cohort.layout import RunLayout
    from hover_batch.cohort.ledger import Ledger
    from hover_batch.slide.example import write_example

    layout = RunLayout(output)
    with Ledger(layout):
        return write_example(layout.example)
