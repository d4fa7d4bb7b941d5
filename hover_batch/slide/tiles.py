"""Tiles of a slide that are near tissue, grouped into units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hover_batch.geometry import Box, Grid, cell_box
from hover_batch.slide.tissue import TissueMask

TISSUE_REACH = 64
"""Distance in inference pixels at which tissue makes a tile worth predicting: nuclei cross the outline of a coarse
mask, and regions are read with a margin of this width in post-processing."""


@dataclass(frozen=True)
class Unit:
    """Cell of the unit grid with its tiles, which are read, predicted and stored together.

    Units hold no pixels, since they are sent between processes.
    """

    column: int
    """Column in the unit grid."""
    row: int
    """Row in the unit grid."""
    box: Box
    """Cell in inference pixels, clipped to the slide."""
    tile_side: int
    """Side in inference pixels of a tile's output without its margins."""
    tile_cells: tuple[tuple[int, int], ...]
    """(column, row) of the tiles to predict, in the grid of side `tile_side`, in raster order."""

    @property
    def tiles(self) -> tuple[Box, ...]:
        """Boxes in inference pixels of the tiles' outputs without their margins, in the order of `tile_cells`.

        At the slide's right and lower edges, they may extend beyond it.
        """
        return tuple(cell_box(column, row, self.tile_side) for column, row in self.tile_cells)

    @property
    def unit_id(self) -> str:
        """Name of the unit by its row and column in the unit grid, such as r00002_c00005."""
        return f"r{self.row:05d}_c{self.column:05d}"


def tiles_near(grid: Grid, mask: TissueMask, tile_side: int) -> NDArray[np.bool_]:
    """Return, for each tile that covers the slide, whether tissue is within TISSUE_REACH inference pixels of it.

    The result is a bool array (row, column).

    `grid`: inference grid of the slide. `mask`: tissue of the slide. `tile_side`: side in inference pixels of a tile's
    output without its margins.
    """
    columns, rows = -(-grid.size.width // tile_side), -(-grid.size.height // tile_side)
    return mask.meets_product(
        [(c * tile_side - TISSUE_REACH, (c + 1) * tile_side + TISSUE_REACH) for c in range(columns)],
        [(r * tile_side - TISSUE_REACH, (r + 1) * tile_side + TISSUE_REACH) for r in range(rows)],
        grid,
    )


def plan_units(grid: Grid, mask: TissueMask, unit: int, tile_side: int) -> tuple[Unit, ...]:
    """Return the units with at least one tile within TISSUE_REACH inference pixels of tissue, in raster order.

    Tiles further from tissue are left out of their unit. The choice of tiles does not depend on `unit`.

    `grid`: inference grid of the slide. `mask`: tissue of the slide. `unit`: side of a unit in inference pixels.
    `tile_side`: side of a tile's output without its margins, in inference pixels.

    ValueError if `unit` is not a multiple of `tile_side`.
    """
    if unit % tile_side:
        raise ValueError(f"a unit of {unit} does not hold whole tiles of {tile_side}")
    near = tiles_near(grid, mask, tile_side)
    tiles_along = unit // tile_side
    units = []
    for column, row in grid.size.box.cells(unit):
        inside = near[row * tiles_along : (row + 1) * tiles_along, column * tiles_along : (column + 1) * tiles_along]
        cells = tuple((column * tiles_along + int(c), row * tiles_along + int(r)) for r, c in np.argwhere(inside))
        if cells:
            units.append(Unit(column, row, cell_box(column, row, unit).intersect(grid.size.box), tile_side, cells))
    return tuple(units)
