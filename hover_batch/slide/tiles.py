"""Tiles of a slide that are near tissue, grouped into units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hover_batch.geometry import Box, Grid, cell_box
from hover_batch.slide.tissue import TissueMask

TISSUE_REACH = 64
"""Distance in inference pixels at which tissue makes a tile worth predicting: nuclei cross the outline of a coarse
mask, and regions are read with a margin of this width in post-processing."""


@dataclass(frozen=True)
class Unit:
    """Cell of the unit grid with its tiles, which are read, predicted and stored together.

    Units are kept small, since they are sent between processes.
    """

    column: int
    """Column in the unit grid."""
    row: int
    """Row in the unit grid."""
    box: Box
    """Cell in inference pixels, clipped to the slide."""
    keep: int
    """Side in inference pixels of a tile's output without its margins."""
    tile_cells: tuple[tuple[int, int], ...]
    """(column, row) of the tiles to predict, in the grid of side `keep`, in raster order."""

    @property
    def tiles(self) -> tuple[Box, ...]:
        """Boxes in inference pixels of the tiles' outputs without their margins, in the order of `tile_cells`.

        At the slide's edges they may extend beyond it.
        """
        return tuple(cell_box(column, row, self.keep) for column, row in self.tile_cells)

    @property
    def unit_id(self) -> str:
        """Name of the unit, by its row and column in the unit grid, such as r00002_c00005."""
        return f"r{self.row:05d}_c{self.column:05d}"


def plan_units(grid: Grid, mask: TissueMask, unit: int, keep: int) -> tuple[Unit, ...]:
    """Return the units with at least one tile near tissue, in raster order.

    `unit`: side of a unit in inference pixels. `keep`: side of a tile's output without its margins. The choice of tiles
    does not depend on `unit`. ValueError if `unit` is not a multiple of `keep`.
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
