"""`hover-batch compare`: two networks over the same pixels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from hover_batch.commands.options import CohortArgument
from hover_batch.config import InferSettings, Precision, Runtime
from hover_batch.errors import InputError

TEACHER = "hovernet_fast-pannuke"
SIDE, PER_SLIDE, SLIDES = 512, 2, 3
BATCHES = "1,4,16"
"""On a GPU the paper's 1 to 64; HoVerNet takes minutes for 64 patches on a CPU."""


def compare(
    cohort: CohortArgument = None,
    use_example: Annotated[
        bool, typer.Option("--example", help="Run on real H&E that ships inside a dependency: needs no data.")
    ] = False,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Compare with HoVerNet, whose weights --teacher-weights names.")
    ] = False,
    teacher_weights: Annotated[
        str, typer.Option(help="A package, hover_net's .tar, tiatoolbox's .pth, or a name that it fetches.")
    ] = TEACHER,
    against: Annotated[
        str | None, typer.Option(help="Compare with another package, or the same one at another precision or runtime.")
    ] = None,
    against_precision: Annotated[Precision, typer.Option(help="Precision of the other side.")] = "auto",
    against_runtime: Annotated[Runtime, typer.Option(help="Runtime of the other side.")] = "torch",
    student: Annotated[str, typer.Option(help="The package that is to replace the other one.")] = "starter",
    precision: Annotated[Precision, typer.Option(help="Precision of the student.")] = "auto",
    runtime: Annotated[Runtime, typer.Option(help="Runtime of the student.")] = "torch",
    device: Annotated[str, typer.Option(help="Device of both: auto, cpu or cuda.")] = "auto",
    timing_only: Annotated[
        bool,
        typer.Option(
            "--timing-only", help="Measure costs alone, with random weights for the teacher: needs no weights."
        ),
    ] = False,
    truth: Annotated[
        Path | None,
        typer.Option(help="Annotated images (dataset.csv, or what kd prepare writes): score both on their fold test."),
    ] = None,
    side: Annotated[int, typer.Option(min=128, max=8192, help="Side of a field in pixels.")] = SIDE,
    per_slide: Annotated[int, typer.Option(min=1, help="Fields per slide, those with most tissue.")] = PER_SLIDE,
    slides: Annotated[int, typer.Option(min=1, help="Number of slides, the first ones of the cohort.")] = SLIDES,
    full: Annotated[bool, typer.Option("--full", help="Compare on all tissue of all slides.")] = False,
    batches: Annotated[str, typer.Option(help="Batch sizes to time.")] = BATCHES,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions of each measurement; medians are reported.")] = 3,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for compare.json and compare.html.")] = Path(
        "hover-batch-compare"
    ),
) -> None:
    """Run two networks over the same pixels: what they cost, where they disagree.

    hover-batch compare cohort.csv --teacher --teacher-weights hovernet.safetensors

    hover-batch compare --example --teacher --timing-only

    hover-batch compare --example --against starter --runtime openvino
    """
    if (cohort is not None) == use_example:
        raise InputError("give exactly one of COHORT and --example")
    if teacher == (against is not None):
        raise InputError("give exactly one of --teacher and --against")
    if timing_only and not teacher:
        raise InputError("--timing-only: is for --teacher")
    if timing_only and truth is not None:
        raise InputError("--truth: random weights score nothing; leave it or --timing-only out")
    from dataclasses import replace

    from hover_batch.cohort.manifest import raise_if_faulty, read_cohort
    from hover_batch.compare.fields import places_of
    from hover_batch.compare.run import Wanted
    from hover_batch.compare.run import compare as run
    from hover_batch.compare.sides import random_teacher, side_of
    from hover_batch.slide.example import write_example
    from kd.evaluation.evaluate_package import judged

    sizes = _batches(batches)
    plain = InferSettings(device=device)
    ours = side_of(student, "--student", replace(plain, precision=precision, runtime=runtime))
    other = replace(plain, precision=against_precision, runtime=against_runtime)
    if against is not None:
        theirs = side_of(against, "--against", other)
    elif timing_only:
        theirs = random_teacher(teacher_weights, other)
    else:
        theirs = side_of(teacher_weights, "--teacher", other)
    if theirs.name == ours.name:
        ours, theirs = (
            replace(of, name=f"{of.name}, {of.predictor.precision} by {of.predictor.runtime}") for of in (ours, theirs)
        )
    ours, theirs = ours.for_fields(side), theirs.for_fields(side)
    if theirs.card.mpp != ours.card.mpp:
        raise InputError(
            f"{theirs.name} is for pixels of {theirs.card.mpp:g} µm, {ours.name} for {ours.card.mpp:g} µm: they "
            "cannot see the same"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}") from error
    if not os.access(output, os.W_OK):
        raise InputError(f"--output {output}: cannot be written; name another folder")
    records = read_cohort(cohort if cohort is not None else str(write_example(output / "example")))
    raise_if_faulty(records)
    chosen = list(records.records if full else records.records[:slides])
    places = list(places_of(chosen, ours.card.mpp, side, 0 if full else per_slide))
    found = run(
        theirs,
        ours,
        places,
        Wanted(sizes, repeats, timing_only),
        output,
        lambda line: typer.echo(line, err=True),
        (lambda of: judged(of.predictor, of.constants, truth)) if truth is not None else None,
    )
    _print(found)
    typer.echo(output / "compare.json")
    typer.echo(output / "compare.html")


def _batches(text: str) -> list[int]:
    try:
        sizes = sorted({int(word) for word in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1 or sizes[-1] > 1024:
        raise InputError(f"--batches {text}: give numbers from 1 to 1024, as {BATCHES}")
    return sizes


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    first, second = found["sides"]
    table = Table("", first["name"], second["name"], "first ÷ second", title=found["device"])
    ratios = found["ratios"]
    rows = [
        ("parameters, millions", "parameters", 1e-6, ratios["parameters"]),
        ("GMAC a patch", "macs_per_patch", 1e-9, ratios["macs_per_patch"]),
        ("kMAC a kept pixel", "macs_per_kept_pixel", 1e-3, ratios["macs_per_kept_pixel"]),
        ("network, µs a kept pixel", "infer_us_per_pixel", 1, ratios["infer_us_per_pixel"]),
        ("mm² a second, network", "mm2_per_second", 1, None),
        ("post-processing of all fields, s", "post_seconds", 1, ratios["post_seconds"]),
        ("reading, network and post-processing, s", "end_to_end_seconds", 1, ratios["end_to_end_seconds"]),
        ("mm² a second, end to end", "mm2_per_second_end_to_end", 1, None),
    ]
    for label, key, scale, ratio in rows:
        cells = [f"{side[key] * scale:.4g}" for side in (first, second)]
        table.add_row(label, *cells, "" if ratio is None else f"{ratio:.3g} ×")
    for batch, ratio in ratios["seconds_per_patch"].items():
        label = f"seconds a patch, {batch} at once" + (" (as the paper)" if batch == "16" else "")
        cells = [f"{side['seconds_per_patch'][batch]:.3g}" for side in (first, second)]
        table.add_row(label, *cells, f"{ratio:.3g} ×")
    console = Console(highlight=False, markup=False)
    console.print(table)
    if agreed := found["agreement"]:
        pq, f1, r = (_told(agreed[key]) for key in ("pq", "detection_f1", "density_correlation"))
        console.print(
            f"agreement: PQ {pq}, F1 of detections {f1}, nuclei {agreed['nuclei'][0]} and {agreed['nuclei'][1]}, "
            f"correlation of densities {r}",
            soft_wrap=True,
        )
    for side, truth in zip(found["sides"], found["truth"] or [], strict=False):
        for source, scores in truth["sources"].items():
            told = ", ".join(f"{key} {_told(scores[key])}" for key in ("pq", "aji", "dice", "f_d"))
            console.print(f"{side['name']} on {source}: {told}", soft_wrap=True)
        for leak in truth["leakage"]:
            console.print(f"  warning: {leak['text']}", soft_wrap=True)
    for note in found["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _told(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
