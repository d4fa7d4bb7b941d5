"""`hover-batch compare`: run two networks on the same pixels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from hover_batch.commands.options import CohortArgument, local_path
from hover_batch.config import InferSettings, Precision, Runtime
from hover_batch.errors import InputError
from hover_batch.files import check_output_file
from hover_batch.formatting import plain_console

TEACHER = "hovernet_fast-pannuke"
SIDE, PER_SLIDE, SLIDES = 512, 2, 3
BATCHES = "1,4,16"
"""Default batch sizes. HoVerNet's paper times 1 to 64, which takes minutes on a CPU."""

MINUTES = 5.0
"""Default of --minutes with --timing-only: without a limit, a HoVerNet takes half an hour on two cores."""


def compare(
    cohort: CohortArgument = None,
    use_example: Annotated[
        bool, typer.Option("--example", help="Run on the included H&E slides; no data of your own is needed.")
    ] = False,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Compare with HoVerNet, with the weights that --teacher-weights gives.")
    ] = False,
    teacher_weights: Annotated[
        str,
        typer.Option(
            help="Weights of the teacher: a package, hover_net's .tar, tiatoolbox's .pth, or a "
            "published name, which is downloaded."
        ),
    ] = TEACHER,
    against: Annotated[
        str | None,
        typer.Option(help="Compare with this package; it may be the same one, at another precision or runtime."),
    ] = None,
    against_precision: Annotated[
        Precision, typer.Option(help="Precision of the teacher or the --against package.")
    ] = "auto",
    against_runtime: Annotated[
        Runtime, typer.Option(help="Runtime of the teacher or the --against package.")
    ] = "torch",
    student: Annotated[
        str, typer.Option(help="Package of the student: a name that `models list` shows, or a .safetensors file.")
    ] = "starter",
    precision: Annotated[Precision, typer.Option(help="Precision of the student.")] = "auto",
    runtime: Annotated[Runtime, typer.Option(help="Runtime of the student.")] = "torch",
    device: Annotated[str, typer.Option(help="Device of both networks: auto, cpu or cuda.")] = "auto",
    timing_only: Annotated[
        bool,
        typer.Option(
            "--timing-only", help="Measure costs only, with random weights for the teacher: needs no download."
        ),
    ] = False,
    truth: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            help="Folder of annotated images (with dataset.csv, or from `kd prepare`): score both networks "
            "on its test fold.",
        ),
    ] = None,
    side: Annotated[
        int, typer.Option(min=128, max=8192, help="Side in pixels of a field, a square on which both are compared.")
    ] = SIDE,
    per_slide: Annotated[int, typer.Option(min=1, help="Fields per slide: those with most tissue.")] = PER_SLIDE,
    slides: Annotated[int, typer.Option(min=1, help="Slides to use: the first ones of the cohort.")] = SLIDES,
    full: Annotated[bool, typer.Option("--full", help="Compare on all tissue of all slides.")] = False,
    batches: Annotated[str, typer.Option(help="Batch sizes to time, separated by commas.")] = BATCHES,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions of each measurement; medians are reported.")] = 3,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Time that the comparison may take: if needed, it uses fewer repetitions, then fewer fields and batch "
            "sizes.",
            show_default=f"{MINUTES:g} with --timing-only, else no limit",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for compare.json and compare.html.", parser=local_path)
    ] = Path("hover-batch-compare"),
) -> None:
    """Compare two networks on the same pixels: their costs, and where their nuclei differ.

    One is the student (--student). The other, shown first, is a HoVerNet (--teacher) or any package (--against).

    By default, two fields of each of the first three slides are compared. Use --timing-only to measure only costs, and
    --truth to also score both networks on annotated images.

    Prints a table, and writes compare.json and compare.html.

    Examples: compare the starter with a HoVerNet; measure only the costs; compare two runtimes of one package.

    hover-batch compare cohort.csv --teacher --teacher-weights hovernet.safetensors

    hover-batch compare --example --teacher --timing-only

    hover-batch compare --example --against starter --runtime openvino
    """
    if (cohort is not None) == use_example:
        raise InputError("give either COHORT or --example, and not both")
    if teacher == (against is not None):
        raise InputError("give either --teacher or --against MODEL, and not both")
    if timing_only and not teacher:
        raise InputError("--timing-only: works only with --teacher; add that, or leave it out")
    if minutes is not None and not math.isfinite(minutes):
        raise InputError(f"--minutes {minutes}: must be a number of minutes; leave it out for no limit")
    if timing_only and truth is not None:
        raise InputError("--truth: random weights cannot be scored; leave out --truth or --timing-only")
    from dataclasses import replace

    from hover_batch.cohort.manifest import raise_if_faulty, read_cohort
    from hover_batch.compare.budget import Options
    from hover_batch.compare.fields import choose_fields
    from hover_batch.compare.run import compare as run
    from hover_batch.compare.sides import TEACHER_FLAG, load_side, random_teacher
    from hover_batch.slide.example import write_example
    from kd.evaluation.evaluate_package import score_test_fold

    sizes = _batches(batches)
    if minutes is None and timing_only:
        minutes = MINUTES
    student_settings = InferSettings(device=device, precision=precision, runtime=runtime)
    reference_settings = InferSettings(device=device, precision=against_precision, runtime=against_runtime)
    student_side = load_side(student, "--student", student_settings)
    if against is not None:
        reference = load_side(against, "--against", reference_settings)
    elif timing_only:
        reference = random_teacher(teacher_weights, reference_settings)
    else:
        reference = load_side(teacher_weights, TEACHER_FLAG, reference_settings)
    if reference.name == student_side.name:
        student_side, reference = (
            replace(network, name=f"{network.name}, {network.predictor.precision} by {network.predictor.runtime}")
            for network in (student_side, reference)
        )
    student_side, reference = student_side.for_fields(side), reference.for_fields(side)
    if reference.card.mpp != student_side.card.mpp:
        raise InputError(
            f"{reference.name} needs pixels of {reference.card.mpp:g} µm, {student_side.name} of "
            f"{student_side.card.mpp:g} µm; compare networks with the same pixel size"
        )
    for name in ("compare.json", "compare.html"):
        check_output_file("--output", output / name, (".json", ".html"), make_folder=True)
    read = read_cohort(cohort if cohort is not None else str(write_example(output / "example")))
    raise_if_faulty(read)
    chosen = list(read.records if full else read.records[:slides])
    places = list(choose_fields(chosen, student_side.card.mpp, side, 0 if full else per_slide))
    results = run(
        reference,
        student_side,
        places,
        Options(sizes, repeats, timing_only, None if minutes is None else 60 * minutes),
        output,
        lambda line: typer.echo(line, err=True),
        (lambda network: score_test_fold(network.predictor, network.splitter, truth)) if truth is not None else None,
    )
    _print(results)
    typer.echo(output / "compare.json")
    typer.echo(output / "compare.html")


def _batches(text: str) -> list[int]:
    """Parse the batch sizes, sorted and each once. InputError for anything but whole numbers from 1 to 1024."""
    try:
        sizes = sorted({int(word) for word in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1 or sizes[-1] > 1024:
        raise InputError(f"--batches {text}: give whole numbers from 1 to 1024, separated by commas, such as {BATCHES}")
    return sizes


def _print(found: dict[str, Any]) -> None:
    """Print the results as a table and notes. `found`: the content of compare.json."""
    from rich.table import Table

    first, second = found["sides"]
    table = Table("", first["name"], second["name"], "first ÷ second", title=found["device"])
    ratios = found["ratios"]
    rows = [
        ("parameters, millions", "parameters", 1e-6, ratios["parameters"]),
        ("GMAC per patch", "macs_per_patch", 1e-9, ratios["macs_per_patch"]),
        ("kMAC per kept pixel", "macs_per_kept_pixel", 1e-3, ratios["macs_per_kept_pixel"]),
        ("network, µs per kept pixel", "infer_us_per_pixel", 1, ratios["infer_us_per_pixel"]),
        ("network, mm²/s", "mm2_per_second", 1, None),
        ("post-processing of all fields, s", "post_seconds", 1, ratios["post_seconds"]),
        ("reading, network and post-processing, s", "end_to_end_seconds", 1, ratios["end_to_end_seconds"]),
        ("end to end, mm²/s", "mm2_per_second_end_to_end", 1, None),
    ]
    for label, key, scale, ratio in rows:
        cells = [f"{side[key] * scale:.4g}" for side in (first, second)]
        table.add_row(label, *cells, "" if ratio is None else f"{ratio:.3g} ×")
    for batch, ratio in ratios["seconds_per_patch"].items():
        label = f"seconds per patch, batch size {batch}" + (" (as in the paper)" if batch == "16" else "")
        cells = [f"{side['seconds_per_patch'][batch]:.3g}" for side in (first, second)]
        table.add_row(label, *cells, f"{ratio:.3g} ×")
    console = plain_console()
    console.print(table)
    if agreed := found["agreement"]:
        pq, f1, r = (_decimals(agreed[key]) for key in ("pq", "detection_f1", "density_correlation"))
        console.print(
            f"agreement: PQ {pq}, F1 of detections {f1}, nuclei {agreed['nuclei'][0]} and {agreed['nuclei'][1]}, "
            f"correlation of densities {r}",
            soft_wrap=True,
        )
    for side, truth in zip(found["sides"], found["truth"] or [], strict=False):
        for source, scores in truth["sources"].items():
            values = ", ".join(f"{key} {_decimals(scores[key])}" for key in ("pq", "aji", "dice", "f_d"))
            console.print(f"{side['name']} on {source}: {values}", soft_wrap=True)
        for leak in truth["leakage"]:
            console.print(f"  warning: {leak['text']}", soft_wrap=True)
    for note in found["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _decimals(value: float | None) -> str:
    """Return the value with three decimals; a dash for None."""
    return "–" if value is None else f"{value:.3f}"
