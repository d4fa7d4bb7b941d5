"""Measure a slide's table in one pass: histograms by class, nuclei per grid cell, and randomly chosen nuclei."""

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
"""Maximum number of cells along the longer side of the grid."""
MIN_CELL_UM = 50.0
"""Minimum side of a cell in µm; smaller cells would show only noise."""


@dataclass(frozen=True)
class Measure:
    """Column of the table, and the bins of its histogram."""

    column: str
    """Name of the column."""
    label: str
    """Name and unit for the reader."""
    low: float
    """Lower end of the range; smaller values count in the first bin."""
    high: float
    """Upper end of the range; larger values count in the last bin."""
    bins: int
    """Number of equal bins."""


MEASURES = (
    Measure("area_um2", "Area, µm²", 0, 200, 50),
    Measure("eccentricity", "Eccentricity", 0, 1, 50),
    Measure("solidity", "Solidity", 0.7, 1, 50),
)


@dataclass(frozen=True)
class Cells:
    """Grid of square cells over a slide, from its upper left corner.

    The last column and row are cut off at the canvas.
    """

    canvas: Size
    """Size of the slide in level-0 pixels."""
    mpp: Mpp
    """Pixel size of level 0 in µm."""
    side: int
    """Side of a cell in level-0 pixels."""

    @classmethod
    def over(cls, canvas: Size, mpp: Mpp) -> Cells:
        """Return the finest grid with at most CELLS (96) cells along a side and cells of at least MIN_CELL_UM (50 µm).

        `canvas`: size of the slide in level-0 pixels. `mpp`: pixel size of level 0 in µm.
        """
        side = max(max(canvas.width, canvas.height) / CELLS, MIN_CELL_UM / mpp.x)
        return cls(canvas, mpp, math.ceil(side))

    @property
    def spans(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Extents of all columns along x, and of all rows along y: two lists of (start, stop) in level-0 pixels.

        Each `stop` is exclusive.
        """
        columns, rows = (
            [(start, min(start + self.side, extent)) for start in range(0, extent, self.side)]
            for extent in (self.canvas.width, self.canvas.height)
        )
        return columns, rows

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns of cells."""
        columns, rows = self.spans
        return len(rows), len(columns)

    @property
    def mm2(self) -> NDArray[np.float64]:
        """Area of each cell in mm²: (rows, columns) float64."""
        widths, heights = (np.array([stop - start for start, stop in spans]) for spans in self.spans)
        return np.outer(heights * self.mpp.y, widths * self.mpp.x) / 1e6

    @property
    def grid(self) -> Grid:
        """Grid of the slide's level-0 pixels, for `TissueMask.meets_product`."""
        return Grid(self.canvas, 1.0, 1.0, self.mpp, self.canvas)


@dataclass(frozen=True)
class Measured:
    """Result of one pass over a slide's table. The class axis is indexed by class id, background first."""

    cells: Cells
    """Grid of the cells."""
    histograms: dict[str, NDArray[np.int64]]
    """Number of nuclei in each bin by column: (classes, bins) int64."""
    counts: NDArray[np.int64]
    """Number of nuclei in each cell: (classes, rows, columns) int64."""
    chosen: NDArray[np.float64]
    """Centroids of the randomly chosen nuclei: (k, 2) x, y in level-0 pixels."""


def measure(table: NucleiTable, choose: int) -> Measured:
    """Return the histograms, the nuclei per cell, and randomly chosen nuclei of a table, in one pass over its rows.

    Only one batch is held in memory. The slide_id is the seed of the random choice; equal tables therefore give the
    same nuclei.

    `choose`: largest number of nuclei to choose. SlideError if the file is corrupted.
    """
    cells = Cells.over(table.level0, table.mpp)
    classes = len(table.taxonomy.classes)
    rows, columns = cells.shape
    counts = np.zeros(classes * rows * columns, np.int64)
    histograms = {m.column: np.zeros(classes * m.bins, np.int64) for m in MEASURES}
    seed = int.from_bytes(hashlib.sha256(table.slide_id.encode()).digest()[:8], "big")
    chosen_rows = np.sort(np.random.default_rng(seed).choice(table.rows, min(choose, table.rows), replace=False))
    chosen: list[NDArray[np.float64]] = []
    start = 0
    for batch in table.batches(["type_id", "centroid_x", "centroid_y", *histograms]):
        values: dict[str, NDArray[Any]] = {name: batch[name].to_numpy() for name in batch.schema.names}
        type_id = values["type_id"].astype(np.int64)
        for m in MEASURES:
            fraction = (values[m.column] - m.low) / (m.high - m.low)
            bins = np.clip((fraction * m.bins).astype(np.int64), 0, m.bins - 1)
            histograms[m.column] += np.bincount(type_id * m.bins + bins, minlength=classes * m.bins)
        x, y = values["centroid_x"], values["centroid_y"]
        column = np.clip((x // cells.side).astype(np.int64), 0, columns - 1)
        row = np.clip((y // cells.side).astype(np.int64), 0, rows - 1)
        counts += np.bincount((type_id * rows + row) * columns + column, minlength=len(counts))
        in_batch = chosen_rows[(chosen_rows >= start) & (chosen_rows < start + len(type_id))] - start
        chosen.append(np.stack([x[in_batch], y[in_batch]], axis=1))
        start += len(type_id)
    return Measured(
        cells=cells,
        histograms={m.column: histograms[m.column].reshape(classes, m.bins) for m in MEASURES},
        counts=counts.reshape(classes, rows, columns),
        chosen=np.concatenate(chosen) if chosen else np.empty((0, 2)),
    )
