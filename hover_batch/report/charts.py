"""Charts as the coordinates of SVG shapes; the templates draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hover_batch.report.measure import Measure
from hover_batch.taxonomy import NucleusClass

WIDTH, HEIGHT = 360, 150
"""Of a chart's field in its own units; texts lie outside of it."""


@dataclass(frozen=True)
class Curve:
    """`points` as an SVG polyline takes them."""

    kind: NucleusClass
    points: str


@dataclass(frozen=True)
class Histogram:
    """Curves of the share of each class's nuclei in each bin; a class without nuclei has none. `top`: the share at the
    upper edge; `ticks`: x → its label."""

    label: str
    curves: Sequence[Curve]
    top: float
    ticks: Mapping[float, str]


@dataclass(frozen=True)
class Strip:
    """A dot for each slide. `dots`: its x and its name; `median`: x of the middle one; `top`: the value at the right
    edge. `kind` is None for all classes together."""

    kind: NucleusClass | None
    dots: Sequence[tuple[float, str]]
    median: float
    median_value: float
    top: float


def histogram(measure: Measure, counts: NDArray[np.int64], classes: Sequence[NucleusClass]) -> Histogram:
    """`counts`: (class, bin) nuclei, classes by id."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    top = float(shares.max()) or 1.0
    edges = np.linspace(0, WIDTH, measure.bins + 1)
    curves = []
    for kind in classes:
        if totals[kind.id, 0]:
            y = HEIGHT * (1 - shares[kind.id] / top)
            steps = zip(np.repeat(edges, 2)[1:-1], np.repeat(y, 2), strict=True)
            curves.append(Curve(kind, " ".join(f"{a:.1f},{b:.1f}" for a, b in steps)))
    values = np.linspace(measure.low, measure.high, 5)
    ticks = {float(x): f"{value:.4g}" for x, value in zip(np.linspace(0, WIDTH, 5), values, strict=True)}
    # Shares end at 0 and 1; elsewhere the outer bins hold what lies beyond.
    if measure.low > 0:
        ticks[0.0] = f"≤ {measure.low:.4g}"
    if measure.high > 1:
        ticks[float(WIDTH)] = f"≥ {measure.high:.4g}"
    return Histogram(measure.label, curves, top, ticks)


def strips(values: Mapping[NucleusClass | None, Sequence[tuple[float, str]]]) -> list[Strip]:
    """One strip a class, of each slide's value and name, on one scale; a class without values has no strip."""
    everything = [value for dots in values.values() for value, _ in dots]
    top = nice_ceiling(max(everything, default=0.0))
    return [
        Strip(
            kind=kind,
            dots=[(round(value / top * WIDTH, 1), name) for value, name in dots],
            median=(middle := float(np.median([value for value, _ in dots]))) / top * WIDTH,
            median_value=middle,
            top=top,
        )
        for kind, dots in values.items()
        if dots
    ]


def nice_ceiling(value: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, … that is no smaller; 1 for what is not above 0.

    Scales that end at such numbers are few, so that slides side by side mostly share theirs.
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))
