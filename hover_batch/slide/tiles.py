"""The tiles of a slide near tissue, grouped in units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hover_batch.geometry import Box, Grid, cell_box
from hover_batch.slide.tissue import TissueMask

TISSUE_REACH = 64
"""Inference pixels round a tile in which tissue makes it worth predicting: nuclei overlap the outline of a coarse
mask, and the regions that are post-processed are read that much wider."""


@dataclass(frozen=True)
class Unit:
    """One cell of the unit grid, which is read, predicted and stored at once.

    `box`: the cell, cut to the slide, in inference pixels. `cells`: (column, row) in the grid of kept parts of tiles,
    of side `keep`, of the tiles to predict, in raster order. Kept small, since it is sent between processes.
    """

    column: int
    row: int
    box: Box
    keep: int
    cells: tuple[tuple[int, int], ...]

    @property
    def tiles(self) -> tuple[Box, ...]:
        """The kept parts of the tiles in inference pixels; at the slide's edges they may reach outside of it."""
        return tuple(cell_box(column, row, self.keep) for column, row in self.cells)

    @property
    def unit_id(self) -> str:
        return f"r{self.row:05d}_c{self.column:05d}"


def plan_units(grid: Grid, mask: TissueMask, unit: int, keep: int) -> tuple[Unit, ...]:
    """The units with at least one tile near tissue, in raster order.

    `unit`: side of a unit; `keep`: side of a tile's kept part, which divides it. The choice of tiles does not depend
    on the unit's side.
    """
    if unit % keep:
        raise ValueError(f"a unit of {unit} does not hold whole tiles of {keep}")
    columns, rows = -(-grid.size.width // keep), -(-grid.size.height // keep)
    near = mask.meets_product(
        [(c * keep - TISSUE_REACH, (c + 1) * keep + TISSUE_REACH) for c in range(columns)],
        [(r * keep - TISSUE_REACH, (r + 1) * keep + TISSUE_REACH) for r in range(rows)],
        grid,
    )
    side = unit // keep
    units = []
    for column, row in grid.size.box.cells(unit):
        inside = near[row * side : (row + 1) * side, column * side : (column + 1) * side]
        cells = tuple((column * side + int(c), row * side + int(r)) for r, c in np.argwhere(inside))
        if cells:
            units.append(Unit(column, row, cell_box(column, row, unit).intersect(grid.size.box), keep, cells))
    return tuple(units)
