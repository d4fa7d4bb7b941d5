"""Compute the coordinates of charts as SVG shapes, which the templates draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hover_batch.report.measure import Measure
from hover_batch.taxonomy import NucleusClass

WIDTH, HEIGHT = 360, 150
"""Size of a chart's plotting area in SVG units; labels lie outside of it."""


@dataclass(frozen=True)
class Curve:
    """Curve of one class."""

    kind: NucleusClass
    """Class of the curve."""
    points: str
    """Points "x,y x,y …" of an SVG polyline."""


@dataclass(frozen=True)
class Histogram:
    """Histogram of a measurement, with one curve per class that has nuclei."""

    label: str
    """Name and unit of the measurement."""
    curves: Sequence[Curve]
    """Share of the class's nuclei in each bin, as steps."""
    top: float
    """Share at the upper edge of the plotting area."""
    ticks: Mapping[float, str]
    """Label of each tick by its x in SVG units."""


@dataclass(frozen=True)
class Strip:
    """Dot plot of one value per slide."""

    kind: NucleusClass | None
    """Class that the values are of; None for all classes together."""
    dots: Sequence[tuple[float, str]]
    """x in SVG units and label of each slide."""
    median: float
    """x of the median in SVG units."""
    median_value: float
    """Median of the values."""
    top: float
    """Value at the right edge; the left edge is 0."""


def histogram(measure: Measure, counts: NDArray[np.int64], classes: Sequence[NucleusClass]) -> Histogram:
    """Return the histogram of `measure`, with a curve for each of `classes` that has nuclei.

    Each curve gives the fraction of the nuclei of its class in each bin.

    `measure`: column and bins. `counts`: (class id, bin) int64, the number of nuclei. `classes`: classes of nuclei,
    without the background.
    """
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    top = float(shares.max()) or 1.0
    edges = np.linspace(0, WIDTH, measure.bins + 1)
    curves = []
    for kind in classes:
        if totals[kind.id, 0]:
            y_of_bin = HEIGHT * (1 - shares[kind.id] / top)
            # Each bin is a horizontal step between its two edges.
            steps = zip(np.repeat(edges, 2)[1:-1], np.repeat(y_of_bin, 2), strict=True)
            curves.append(Curve(kind, " ".join(f"{x:.1f},{y:.1f}" for x, y in steps)))
    values = np.linspace(measure.low, measure.high, 5)
    ticks = {float(x): f"{value:.4g}" for x, value in zip(np.linspace(0, WIDTH, 5), values, strict=True)}
    # Unless they end at 0 or 1, the outer bins also hold all values beyond the range.
    if measure.low > 0:
        ticks[0.0] = f"≤ {measure.low:.4g}"
    if measure.high > 1:
        ticks[float(WIDTH)] = f"≥ {measure.high:.4g}"
    return Histogram(measure.label, curves, top, ticks)


def strips(values: Mapping[NucleusClass | None, Sequence[tuple[float, str]]]) -> list[Strip]:
    """Return one dot plot per class that has values, all on the same scale.

    `values`: for each class, the (value, label) of each slide. The key None means all classes together. Values must not
    be negative.
    """
    top = nice_ceiling(max((value for of_class in values.values() for value, _ in of_class), default=0.0))
    plots = []
    for kind, of_class in values.items():
        if of_class:
            dots = [(round(value / top * WIDTH, 1), label) for value, label in of_class]
            median = float(np.median([value for value, _ in of_class]))
            plots.append(Strip(kind, dots, median=median / top * WIDTH, median_value=median, top=top))
    return plots


def nice_ceiling(value: float) -> float:
    """Return the smallest number of the form 1, 2 or 5 × 10^n that is at least `value`; 1 if `value` is not positive.

    Because the steps are coarse, most slides get the same scale and can be compared.
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))
