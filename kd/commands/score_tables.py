"""Print an evaluation as tables on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import typer
from rich.table import Table

from hover_batch.formatting import plain_console
from hover_batch.model.cost import Cost
from kd.data.classes import PARTIAL
from kd.evaluation.evaluate_package import Evaluation
from kd.evaluation.paired import Baseline, Paired
from kd.evaluation.scores import shown
from kd.evaluation.shift_scores import SCORES, ShiftScores

SHOWN = {"pq": "PQ", "dice": "Dice", "f_d": "F_d"}
"""Column titles of the scores in the table of shifts."""


def show(evaluation: Evaluation) -> None:
    """Print an evaluation to stdout: scores by source, cost, times, shifts, and the comparison with a baseline.

    Times, shifts and the comparison are printed only if `evaluation` has them.
    """
    console = plain_console()
    name = evaluation.package.card.name
    console.print(_scores(evaluation))
    typer.echo(_cost(evaluation.cost))
    if timed := evaluation.timed:
        tile = timed["seconds_per_tile"]
        of_tile = "no image of 1000² px to time" if tile is None else f"{tile:.2f} s per tile of 1000² px"
        typer.echo(f"{timed['seconds_per_patch']:.4f} s per patch, {of_tile} ({timed['timed_on']})")
    if evaluation.shifts:
        console.print(shift_table(evaluation.shifts, f"{name} on changed images"))
    if evaluation.baseline:
        console.print(_paired(evaluation.paired, evaluation.baseline, name))


def _scores(evaluation: Evaluation) -> Table:
    """Return a table with one row per score and one column per source, and leakage below."""
    columns = [s.to_json() for s in evaluation.scores]
    partial = [s.source for s in evaluation.scores if s.source in PARTIAL]
    notes = [f"{leak.mark} {leak}" for leak in evaluation.leaks]
    notes += [f"{source}: only some nuclei are outlined, so only recall and types are scored" for source in partial]
    title = f"{evaluation.package.card.name} on {evaluation.data}, {' '.join(evaluation.folds)}"
    table = Table(
        title=f"{title}, nuclei from {evaluation.post.min_area_px} px",
        caption="\n".join(notes),
        caption_justify="left",
        min_width=72 if notes else None,
    )
    table.add_column("")
    for s in evaluation.scores:
        marks = sorted({leak.mark for leak in evaluation.leaks if leak.source == s.source})
        table.add_column(" ".join([s.source, *marks]), justify="right")
    for name, value in columns[0].items():
        if isinstance(value, int | float) or value is None:
            table.add_row(name, *(shown(c[name]) for c in columns))
    for kind in ("pq_c", "f_c"):
        for name in dict.fromkeys(n for c in columns for n in c[kind]):
            table.add_row(f"{kind[:-2]} {name}", *(shown(c[kind].get(name)) for c in columns))
    return table


def _cost(cost: Cost) -> str:
    return (
        f"{cost.parameters / 1e6:.1f} M parameters, {cost.macs_per_patch / 1e9:.2f} GMac per patch of {cost.patch} px, "
        f"{cost.macs_per_kept_pixel / 1e3:.0f} kMac per kept pixel"
    )


def shift_table(rows: Sequence[ShiftScores], title: str) -> Table:
    """Return a table with one row per source and shift.

    Each score is followed by its change from the unchanged images. Rows in which PQ collapsed (`ShiftScores.collapsed`)
    are red and marked ◀.

    `rows`: scores, sorted by source. `title`: title of the table.
    """
    collapsed = any(row.collapsed for row in rows)
    table = Table(
        title=title,
        caption="◀ PQ is at most half of that on unchanged images" if collapsed else None,
        caption_justify="left",
    )
    table.add_column("")
    for name in SCORES:
        table.add_column(SHOWN[name], justify="right")
        table.add_column("±", justify="right")
    source = None
    for row in rows:
        if row.source != source:
            source = row.source
            table.add_section()
            table.add_row(source, style="bold")
        cells = [cell for name in SCORES for cell in (shown(row.scores[name]), _signed(row.changes[name]))]
        mark = " ◀" if row.collapsed else ""
        table.add_row(f"{row.shift}{mark}", *cells, style="bold red" if row.collapsed else None)
    return table


def _paired(rows: Sequence[Paired], old: Baseline, name: str) -> Table:
    """Return a table with one row per source; the last column counts images with higher and with lower PQ."""
    table = Table(
        title=f"PQ of {name} against {old.name} on the same images",
        caption=f"{old.name}: {old.sha256[:12]}, --sobel-norm {old.sobel_norm}, --min-area-px {old.min_area_px}\n"
        "±: mean difference of PQ; its interval is from resampling images; number of images with higher and lower PQ",
        caption_justify="left",
        min_width=72,
    )
    for column in ("", "PQ", "against", "±", "95 % interval", "better, worse"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        interval = "–" if math.isnan(row.low) else f"{row.low:+.4f} to {row.high:+.4f}"
        numbers = (shown(row.new), shown(row.old), _signed(row.difference), interval)
        table.add_row(row.source, *numbers, f"{row.better}, {row.worse} of {row.images}")
    return table


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.4f}"
