"""Clusters of a slide: squares with tissue, from which random ones are drawn to be predicted and counted.

They form a grid that starts at (0, 0). A nucleus is counted in the cluster that contains its anchor, so all clusters
together count every nucleus of the slide once. To outline the nuclei at its edges, the tiles around a cluster are
predicted, too; neighbouring clusters share them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hover_batch.geometry import Box, Grid, Size, cell_box
from hover_batch.slide.tiles import Unit

HALO = 64
"""Width in inference pixels of the context around a cluster; all tiles that overlap it are predicted."""


def clusters_of(units: Sequence[Unit], canvas: Size, side: int) -> tuple[Unit, ...]:
    """Return the clusters that contain tiles of a slide's units, in raster order; empty if there are no tiles.

    Each cluster is a unit of work: its column and row are its position in the grid of clusters, and its box and its
    tiles include the halo of HALO inference pixels.

    `units`: units of the slide. `canvas`: size of the slide in inference pixels. `side`: side of a cluster in inference
    pixels, without its halo; a multiple of the side of a tile.
    """
    planned = {cell for unit in units for cell in unit.tile_cells}
    if not planned:
        return ()
    tile_side = units[0].tile_side
    per_side = side // tile_side
    found = []
    for row, column in sorted({(row // per_side, column // per_side) for column, row in planned}):
        tiles = list(cell_box(column, row, side).expand(HALO).intersect(canvas.box).cells(tile_side))
        first, last = cell_box(*tiles[0], tile_side), cell_box(*tiles[-1], tile_side)
        box = Box(first.x0, first.y0, last.x1, last.y1).intersect(canvas.box)
        found.append(Unit(column, row, box, tile_side, tuple(cell for cell in tiles if cell in planned)))
    return tuple(found)


def area_sums(
    picture: NDArray[np.generic], level0_per_pixel: Sequence[float], clusters: Sequence[Unit], grid: Grid, side: int
) -> NDArray[np.float64]:
    """Return the integral of a picture over each of n clusters without its halo, as float64 (n,).

    The integral is the sum of the pixels' values, each multiplied by its area in the cluster, in level-0 pixels. A
    pixel on the border of a cluster counts in part.

    `picture`: numbers or bool (y, x) that cover the slide. `level0_per_pixel`: size (x, y) of its pixels in level-0
    pixels. `clusters`: result of `clusters_of`. `grid`: inference grid of the slide. `side`: side of a cluster in
    inference pixels.
    """
    scale_x, scale_y = level0_per_pixel
    height, width = picture.shape
    rows, columns = -(-grid.size.height // side), -(-grid.size.width // side)
    y = np.minimum(np.arange(rows + 1) * (side * grid.scale_y / scale_y), height)
    x = np.minimum(np.arange(columns + 1) * (side * grid.scale_x / scale_x), width)
    sums = np.zeros((rows, columns))
    for row, (top, bottom) in enumerate(zip(y[:-1], y[1:], strict=True)):
        lines = np.arange(math.floor(top), math.ceil(bottom))
        weights = np.minimum(lines + 1, bottom) - np.maximum(lines, top)
        before = np.concatenate([[0.0], np.cumsum(weights @ picture[lines])])
        sums[row] = np.diff(np.interp(x, np.arange(width + 1), before))
    return sums[[unit.row for unit in clusters], [unit.column for unit in clusters]] * (scale_x * scale_y)
