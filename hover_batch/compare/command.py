"""`hover-batch compare`. Heavy imports stand inside, so that `--help` answers at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hover_batch.config import InferSettings
from hover_batch.errors import InputError

TEACHER = "hovernet_fast-pannuke"
SIDE, PER_SLIDE, SLIDES = 512, 2, 3
BATCHES = "1,4,16"
"""On a GPU the paper's 1 to 64; HoVerNet takes minutes for 64 patches on a CPU."""

JudgeOn = Callable[[Path, Any], dict[str, Any]]
"""Folder of annotated images and a side → the side's scores there, and what it has seen of them."""


def compare_command(judge: JudgeOn, example: Callable[[Path], Path]) -> Callable[..., None]:
    """The command. `judge` is kd's, which nothing on this floor may import; `example` writes the example's cohort."""

    def compare(
        cohort: Annotated[
            str | None,
            typer.Argument(metavar="COHORT", help="CSV with a column `path`, a folder of slides, or a glob."),
        ] = None,
        use_example: Annotated[
            bool, typer.Option("--example", help="On real H&E that ships inside a dependency: needs no data.")
        ] = False,
        teacher: Annotated[
            bool, typer.Option("--teacher", help="Against HoVerNet, whose weights --teacher-weights names.")
        ] = False,
        teacher_weights: Annotated[
            str, typer.Option(help="A package, hover_net's .tar, tiatoolbox's .pth, or a name that it fetches.")
        ] = TEACHER,
        against: Annotated[
            str | None, typer.Option(help="Against another package, or the same at another precision or runtime.")
        ] = None,
        against_precision: Annotated[str, typer.Option(help="Of the other side: auto, fp32, fp16 or bf16.")] = "auto",
        against_runtime: Annotated[str, typer.Option(help="Of the other side: torch, compile or openvino.")] = "torch",
        student: Annotated[str, typer.Option(help="The package that is to replace the other side.")] = "starter",
        precision: Annotated[str, typer.Option(help="Of the student: auto, fp32, fp16 or bf16.")] = "auto",
        runtime: Annotated[str, typer.Option(help="Of the student: torch, compile or openvino.")] = "torch",
        device: Annotated[str, typer.Option(help="Of both: auto, cpu or cuda.")] = "auto",
        timing_only: Annotated[
            bool, typer.Option("--timing-only", help="Costs alone, the teacher with random weights: needs none.")
        ] = False,
        truth: Annotated[
            Path | None,
            typer.Option(
                help="Annotated images (dataset.csv, or what kd prepare writes): score both on their fold test."
            ),
        ] = None,
        side: Annotated[int, typer.Option(min=128, max=8192, help="Side in pixels of a field.")] = SIDE,
        per_slide: Annotated[
            int, typer.Option(min=1, help="Fields of each slide, those with most tissue.")
        ] = PER_SLIDE,
        slides: Annotated[int, typer.Option(min=1, help="Slides of the cohort, the first ones.")] = SLIDES,
        full: Annotated[bool, typer.Option("--full", help="All tissue of all slides.")] = False,
        batches: Annotated[str, typer.Option(help="Patches at once that are timed.")] = BATCHES,
        repeats: Annotated[int, typer.Option(min=1, help="Of each measurement; medians are told.")] = 3,
        output: Annotated[
            Path, typer.Option("--output", "-o", help="Folder for compare.json and compare.html.")
        ] = Path("hover-batch-compare"),
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

        sizes = _batches(batches)
        plain = InferSettings(device=device)
        ours = side_of(student, "--student", replace(plain, precision=precision, runtime=runtime))  # type: ignore[arg-type]
        other = replace(plain, precision=against_precision, runtime=against_runtime)  # type: ignore[arg-type]
        if against is not None:
            theirs = side_of(against, "--against", other)
        elif timing_only:
            theirs = random_teacher(teacher_weights, other)
        else:
            theirs = side_of(teacher_weights, "--teacher", other)
        if theirs.name == ours.name:
            ours, theirs = (
                replace(of, name=f"{of.name}, {of.predictor.precision} by {of.predictor.runtime}")
                for of in (ours, theirs)
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
        records = read_cohort(cohort if cohort is not None else str(example(output / "example")))
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
            (lambda of: judge(truth, of)) if truth is not None else None,
        )
        _print(found)
        typer.echo(output / "compare.json")
        typer.echo(output / "compare.html")

    return compare


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
