"""The command line: flags to settings. Heavy imports stand inside the commands."""

from __future__ import annotations

import sys
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hover_batch.cli_errors import Commands
from hover_batch.cohort.layout import Format
from hover_batch.compare.command import compare_command
from hover_batch.config import EngineSettings, InferSettings, PostSettings, Settings, TissueSettings
from hover_batch.doctor import doctor
from hover_batch.errors import InputError
from hover_batch.logs import LogFormat
from hover_batch.model.cli import models_app
from hover_batch.version import __version__
from hover_batch.view.command import view
from kd.cli import kd_app

app = typer.Typer(
    name="hover-batch",
    cls=Commands,
    help="Segment and classify every nucleus in cohorts of H&E whole-slide images.",
    epilog="Exit codes: 0 all done · 1 internal error · 2 faulty input, nothing was run · 3 some slides failed · "
    "4 nothing could be processed · 130 interrupted.",
    no_args_is_help=True,
    suggest_commands=False,  # click does, and typer would say it again
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(kd_app, name="kd")


def _calibrated(network: Any, card: Any, data: Path) -> Any:
    """kd's search for Sobel constants: `models import` may use it, but only this file imports kd."""
    from kd.package import calibrated

    return calibrated(network, card, data)


def _judged(data: Path, side: Any) -> dict[str, Any]:
    """kd's scores of one side of a comparison on annotated images."""
    from kd.evaluation.evaluate_package import judged

    return judged(side.predictor, side.constants, data)


def _example_in(folder: Path) -> Path:
    from hover_batch.slide.example import write_example

    return write_example(folder)


app.add_typer(models_app(_calibrated), name="models")
app.command()(doctor)


class Backend(StrEnum):
    ray = "ray"
    local = "local"


class Tissue(StrEnum):
    auto = "auto"
    all = "all"


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Runtime(StrEnum):
    auto = "auto"
    torch = "torch"
    compile = "compile"
    openvino = "openvino"


class SobelNorm(StrEnum):
    fixed = "fixed"
    window = "window"


def _option(flag: str, help: str, default: object, panel: str) -> Any:
    """A settings flag. Its typer default is None, so that environment and --config can stand in between."""
    variable = "HOVER_BATCH_" + flag.removeprefix("--").replace("-", "_").upper()
    return typer.Option(flag, help=help, envvar=variable, show_default=str(default), rich_help_panel=panel)


_MODEL = "Model and inference"
_POST = "Tissue and post-processing"
_ENGINE = "Machines"
CohortArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="COHORT", help="CSV with a column `path` (see docs/first-cohort.md), a folder of slides, or a glob."
    ),
]
ModelOption = Annotated[
    str | None,
    _option("--model", "`starter`, a name that `models list` shows, or a .safetensors file.", Settings.model, _MODEL),
]
UnitOption = Annotated[
    int | None,
    _option("--unit", "Side in pixels of what is predicted and stored at once.", InferSettings.unit, _MODEL),
]
BatchOption = Annotated[int | None, _option("--batch", "Tiles a batch.", InferSettings.batch, _MODEL)]
PrecisionOption = Annotated[
    Precision | None,
    _option(
        "--precision",
        "auto: fp16 on a GPU, else fp32. bf16 is fast on new CPUs, and moves outlines.",
        InferSettings.precision,
        _MODEL,
    ),
]
RuntimeOption = Annotated[
    Runtime | None,
    _option(
        "--runtime",
        "auto: openvino on a CPU, torch on a GPU. compile: torch.compile, minutes at the start.",
        InferSettings.runtime,
        _MODEL,
    ),
]
ThreadsOption = Annotated[
    int | None,
    _option("--threads", "Threads of a network on the CPU; 0 = as fits the cores.", InferSettings.threads, _MODEL),
]
DeviceOption = Annotated[
    str | None,
    _option("--device", "auto, cpu or cuda; CUDA_VISIBLE_DEVICES chooses GPUs.", InferSettings.device, _MODEL),
]
TissueOption = Annotated[
    Tissue | None,
    _option("--tissue", "auto: find the tissue; all: the whole canvas. A mask_path goes before.", "auto", _POST),
]
SobelOption = Annotated[
    SobelNorm | None,
    _option(
        "--sobel-norm",
        "fixed: the same nuclei wherever tiles fall; window: as published, for parity.",
        PostSettings.sobel_norm,
        _POST,
    ),
]
HaloOption = Annotated[
    int | None, _option("--halo", "Pixels that a region is read wider on each side.", PostSettings.halo, _POST)
]
MaskMppOption = Annotated[
    float | None,
    _option("--mask-mpp", "Pixel size in µm of the tissue mask.", TissueSettings.mask_mpp, _POST),
]
MinTissueOption = Annotated[
    float | None,
    _option("--min-tissue-um2", "Drop smaller pieces of tissue.", TissueSettings.min_tissue_um2, _POST),
]
MinAreaOption = Annotated[
    int | None,
    _option("--min-area-px", "Drop nuclei of fewer inference pixels.", PostSettings.min_area_px, _POST),
]
ClassMapOption = Annotated[
    Path | None,
    typer.Option(
        "--class-map",
        help='TOML that merges or renames classes, each named once: neoplastic = ["epithelial"]',
        envvar="HOVER_BATCH_CLASS_MAP",
        rich_help_panel=_POST,
    ),
]
BackendOption = Annotated[
    Backend | None,
    _option(
        "--backend",
        "ray: all cores and GPUs, of this machine or a cluster; local: one process, for debuggers. Same results.",
        EngineSettings.backend,
        _ENGINE,
    ),
]
CpusOption = Annotated[int | None, _option("--cpus", "Cores to use; 0 = all.", "all", _ENGINE)]
GpusOption = Annotated[int | None, _option("--gpus", "GPUs to use; 0 = none.", "all", _ENGINE)]
AddressOption = Annotated[
    str | None, _option("--address", "Of a Ray cluster to join.", "start Ray on this machine", _ENGINE)
]
ScratchOption = Annotated[
    str | None,
    _option("--scratch", "Folder on each machine for copies of slides that lie in buckets.", "temp folder", _ENGINE),
]
MaxFailuresOption = Annotated[
    int | None,
    _option("--max-failures", "Stop when more slides than this have failed.", "never", _ENGINE),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="TOML with settings, as settings.toml of a run.", envvar="HOVER_BATCH_CONFIG"),
]
SkipInvalidOption = Annotated[
    bool, typer.Option("--skip-invalid", help="Run the valid rows; list the faulty ones in failures.csv.")
]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
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
            help="Make new tables of the predictions that the run in this folder kept, by other settings "
            "(--sobel-norm, --halo, --min-area-px, --class-map): needs no slides, no GPU and no weights.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; the same command again goes on where it stopped.")
    ] = Path("hover-batch-out"),
    model: ModelOption = None,
    unit: UnitOption = None,
    batch: BatchOption = None,
    precision: PrecisionOption = None,
    runtime: RuntimeOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    tissue: TissueOption = None,
    mask_mpp: MaskMppOption = None,
    min_tissue_um2: MinTissueOption = None,
    sobel_norm: SobelOption = None,
    halo: HaloOption = None,
    min_area_px: MinAreaOption = None,
    class_map: ClassMapOption = None,
    discard_predictions: Annotated[
        bool | None,
        typer.Option(
            "--discard-predictions",
            help="Remove each slide's prediction store when its table is written.",
            envvar="HOVER_BATCH_DISCARD_PREDICTIONS",
        ),
    ] = None,
    config: ConfigOption = None,
    skip_invalid: SkipInvalidOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Remove the results that lie in the output folder, and start anew.")
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Try again also the slides of which processes died, time and again."),
    ] = False,
    max_failures: MaxFailuresOption = None,
    backend: BackendOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    address: AddressOption = None,
    scratch: ScratchOption = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="Of stderr; json: one object a line.", envvar="HOVER_BATCH_LOG_FORMAT")
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
    kept = None
    if from_run is not None:
        from hover_batch.stored_run import StoredRun

        kept = StoredRun.open(from_run)
    settings = _settings(
        config,
        kept.settings.to_dict() if kept else {},
        model=model,
        tissue={"tissue": tissue, "mask_mpp": mask_mpp, "min_tissue_um2": min_tissue_um2},
        infer={
            "unit": unit,
            "batch": batch,
            "precision": precision,
            "runtime": runtime,
            "threads": threads,
            "device": device,
        },
        post={"sobel_norm": sobel_norm, "halo": halo, "min_area_px": min_area_px, "class_map": _class_map(class_map)},
        output={"discard_predictions": discard_predictions},
        engine={
            "backend": backend,
            "cpus": cpus,
            "gpus": gpus,
            "address": address,
            "max_failures": max_failures,
            "scratch": scratch,
        },
    )
    from hover_batch.segment import run_segment

    source = kept or cohort or str(_example(output))
    outcome = run_segment(
        source,
        output,
        settings,
        skip_invalid=skip_invalid,
        force=force,
        command=sys.argv[1:],
        retry_failed=retry_failed,
        log_format=log_format,
    )
    for line in outcome.closing_lines():
        typer.echo(line)
    raise typer.Exit(outcome.exit_code)


@app.command()
def plan(
    cohort: CohortArgument = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    skip_invalid: SkipInvalidOption = False,
    backend: BackendOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """Check every row and slide header, and estimate tiles, disk and time. Writes nothing.

    hover-batch plan cohort.csv
    """
    if cohort is None:
        raise InputError("give a COHORT: a CSV, a folder of slides or a glob")
    settings = _settings(
        config, {}, model=model, engine={"backend": backend, "cpus": cpus, "gpus": gpus, "address": address}
    )
    from hover_batch.cohort.manifest import raise_if_faulty, read_cohort
    from hover_batch.executor.resources import resource_lines
    from hover_batch.model.package import find_package
    from hover_batch.plan import plan_cohort

    package = find_package(settings.model)
    planned = plan_cohort(read_cohort(cohort), package.card)
    if not skip_invalid:
        raise_if_faulty(planned.cohort)
    for line in [*planned.lines(settings, package.card), *resource_lines(settings, package.card)]:
        typer.echo(line)
    raise typer.Exit(planned.exit_code)


@app.command()
def status(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a run: what segment was given as --output.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")] = False,
) -> None:
    """Tell where a run stands, from its files alone. Writes nothing; the run may go on, also on another machine.

    hover-batch status out/
    """
    from hover_batch.status import read_status

    stands = read_status(output)
    for line in [stands.to_json()] if as_json else stands.lines():
        typer.echo(line)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a run: what segment was given as --output.")],
    to: Annotated[list[Format], typer.Option("--to", help="What to write; may be given several times.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the files.", show_default="beside each table")
    ] = None,
    slide: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Only this slide; may be given several times.")
    ] = None,
) -> None:
    """Write the tables of nuclei for other tools, and print the files' names. Files of an earlier export are replaced.

    hover-batch export out/ --to qupath --to csv
    """
    from hover_batch.convert import export_run

    exported = export_run(run, to, output, slide or (), lambda line: typer.echo(line, err=True))
    for path in exported.files:
        typer.echo(path)
    raise typer.Exit(exported.exit_code)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a run: what segment was given as --output.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write.", show_default="OUT/report.html")
    ] = None,
) -> None:
    """Write an HTML report of a run's cohort, finished or not, and print its name. It opens in any browser, offline.

    Of more than 200 slides, the pictures are on pages beside it.

    hover-batch report out/
    """
    from hover_batch.reporting import report_run

    typer.echo(report_run(run, output, lambda line: typer.echo(line, err=True)))


app.command()(view)
app.command("compare")(compare_command(_judged, _example_in))


def _example(output: Path) -> Path:
    from hover_batch.cohort.layout import RunLayout
    from hover_batch.cohort.ledger import Ledger
    from hover_batch.slide.example import write_example

    layout = RunLayout(output)
    with Ledger(layout):  # that the folder can be written and is no one else's
        return write_example(layout.example)


def _toml(flag: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: {error}") from error


def _class_map(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    class_map = _toml("--class-map", path)
    if not class_map:
        raise InputError(f'--class-map {path}: is empty; write lines as neoplastic = ["epithelial"]')
    return class_map


def _settings(config: Path | None, base: dict[str, Any], **given: Any) -> Settings:
    """Flag or environment (typer has settled which) > --config > `base` > default."""
    data = base
    if config is not None:
        for key, value in _toml("--config", config).items():
            held = data.get(key)
            data[key] = {**held, **value} if isinstance(held, dict) and isinstance(value, dict) else value
    for section, values in given.items():
        if isinstance(values, dict):
            set_ones = {k: str(v) if isinstance(v, StrEnum) else v for k, v in values.items() if v is not None}
            if isinstance(held := data.get(section, {}), dict):  # else it is refused below
                data[section] = {**held, **set_ones}
        elif values is not None:
            data[section] = values
    return Settings.from_dict(data)
