"""What one pass over a slide's table counts: morphology by class, nuclei in the cells of a grid, nuclei to look at."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.export.read import NucleiTable
from hover_batch.geometry import Grid, Mpp, Size

CELLS = 96
"""Of a grid's longer side, at most."""
MIN_CELL_UM = 50.0
"""Side of a cell, at least: in smaller ones a nucleus more or less is all there is to see."""


@dataclass(frozen=True)
class Measure:
    """A column and the range that its histogram shows in `bins` equal bins; what lies outside is in the outer ones."""

    column: str
    label: str
    low: float
    high: float
    bins: int


MEASURES = (
    Measure("area_um2", "Area, µm²", 0, 200, 50),
    Measure("eccentricity", "Eccentricity", 0, 1, 50),
    Measure("solidity", "Solidity", 0.7, 1, 50),
)


@dataclass(frozen=True)
class Cells:
    """Square cells of `side` level-0 pixels over a canvas from its upper left corner; the last ones are cut by it."""

    canvas: Size
    mpp: Mpp
    side: int

    @classmethod
    def over(cls, canvas: Size, mpp: Mpp) -> Cells:
        side = max(max(canvas.width, canvas.height) / CELLS, MIN_CELL_UM / mpp.x)
        return cls(canvas, mpp, math.ceil(side))

    @property
    def spans(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """[start, stop) of every column and of every row."""
        wide, high = (
            [(start, min(start + self.side, extent)) for start in range(0, extent, self.side)]
            for extent in (self.canvas.width, self.canvas.height)
        )
        return wide, high

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        columns, rows = self.spans
        return len(rows), len(columns)

    @property
    def mm2(self) -> NDArray[np.float64]:
        """(rows, columns): area of each cell inside the canvas."""
        wide, high = (np.array([stop - start for start, stop in spans]) for spans in self.spans)
        return np.outer(high * self.mpp.y, wide * self.mpp.x) / 1e6

    @property
    def grid(self) -> Grid:
        """Of level-0 pixels."""
        return Grid(self.canvas, 1.0, 1.0, self.mpp, self.canvas)


@dataclass(frozen=True)
class Measured:
    """`histograms`: column → (class, bin) nuclei; `counts`: (class, row, column) nuclei in each of the `cells`; classes
    by their ids, the background first. `chosen`: (k, 2) centroids x, y, in level-0 pixels, of nuclei drawn at random.
    """

    cells: Cells
    histograms: dict[str, NDArray[np.int64]]
    counts: NDArray[np.int64]
    chosen: NDArray[np.float64]


def measure(table: NucleiTable, choose: int) -> Measured:
    """One pass over the table, in the memory of a batch. Which nuclei are drawn depends on the slide_id alone.

    SlideError where the file is harmed.
    """
    cells, classes = Cells.over(table.level0, table.mpp), len(table.taxonomy.classes)
    rows, columns = cells.shape
    counts = np.zeros(classes * rows * columns, np.int64)
    histograms = {m.column: np.zeros(classes * m.bins, np.int64) for m in MEASURES}
    seed = int.from_bytes(hashlib.sha256(table.slide_id.encode()).digest()[:8], "big")
    picks = np.sort(np.random.default_rng(seed).choice(table.rows, min(choose, table.rows), replace=False))
    chosen: list[NDArray[np.float64]] = []
    start = 0
    for batch in table.batches(["type_id", "centroid_x", "centroid_y", *histograms]):
        values: dict[str, NDArray[Any]] = {name: batch[name].to_numpy() for name in batch.schema.names}
        kind = values["type_id"].astype(np.int64)
        for m in MEASURES:
            share = (values[m.column] - m.low) / (m.high - m.low)
            bin = np.clip((share * m.bins).astype(np.int64), 0, m.bins - 1)
            histograms[m.column] += np.bincount(kind * m.bins + bin, minlength=classes * m.bins)
        x, y = values["centroid_x"], values["centroid_y"]
        column = np.clip((x // cells.side).astype(np.int64), 0, columns - 1)
        row = np.clip((y // cells.side).astype(np.int64), 0, rows - 1)
        counts += np.bincount((kind * rows + row) * columns + column, minlength=len(counts))
        here = picks[(picks >= start) & (picks < start + len(kind))] - start
        chosen.append(np.stack([x[here], y[here]], axis=1))
        start += len(kind)
    return Measured(
        cells=cells,
        histograms={m.column: histograms[m.column].reshape(classes, m.bins) for m in MEASURES},
        counts=counts.reshape(classes, rows, columns),
        chosen=np.concatenate(chosen) if chosen else np.empty((0, 2)),
    )
