"""Serve the nuclei of one slide: contours and densities by tile, and the table row of one nucleus.

The table is read once. A nucleus belongs to the tile that holds its centroid, so that it is in exactly one tile. Only
what is drawn stays in memory, about 200 bytes per nucleus. The other columns are read on demand when the user points at
a nucleus, one row group at a time.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from hover_batch.export.read import NucleiTable, unreadable

TILE_UM = 256.0
"""Approximate side in µm of a tile of contours: a few hundred nuclei, in about as many KB."""
CELLS = 128
"""Cells along each side of a tile of densities."""
_STEP = 1 / 16
"""Resolution of contours in level-0 pixels; coarser if a nucleus is over 4095 pixels long, since points are uint16."""
_GROUPS = 4
"""Row groups that stay in memory: about 15 MB each."""


class NucleiTiles:
    """Tiles of the nuclei in one slide's `table`; thread-safe.

    `tile`: side of a contour tile in level-0 pixels, a power of 2. `columns`, `rows`: number of contour tiles along x
    and y. `step`: resolution of contours in level-0 pixels. `counts` (classes,): number of nuclei of each class, by id.
    `peaks` (classes,): highest density of each class in a contour tile, in nuclei per square level-0 pixel.
    """

    def __init__(self, table: NucleiTable) -> None:
        """Read positions and contours from the table. SlideError if the file is corrupted."""
        self.table = table
        self._classes = len(table.taxonomy.classes)
        self.tile = 2 ** max(5, round(math.log2(TILE_UM / math.sqrt(table.mpp.x * table.mpp.y))))
        self.columns = -(-table.level0.width // self.tile)
        self.rows = -(-table.level0.height // self.tile)
        self._read_places()
        self._read_contours()
        self._lock = threading.Lock()
        self._file = pq.ParquetFile(table.path)
        self._first_rows = np.cumsum(
            [0, *(self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups))]
        )
        self._group = lru_cache(_GROUPS)(self._read_group)

    def _read_places(self) -> None:
        """Read centroids, classes and bounding boxes, and sort the nuclei by tile."""
        n = self.table.rows
        self._x, self._y = np.empty(n), np.empty(n)
        self._type = np.empty(n, np.uint8)
        self._corner = np.empty((n, 2), np.float32)
        longest, at = 0.0, 0
        for batch in self.table.batches(["centroid_x", "centroid_y", "type_id", "bbox"]):
            part = slice(at, at + len(batch))
            # The inference grid may reach a pixel over the canvas; what is drawn does not.
            self._x[part] = np.minimum(batch["centroid_x"].to_numpy(), np.nextafter(self.table.level0.width, 0))
            self._y[part] = np.minimum(batch["centroid_y"].to_numpy(), np.nextafter(self.table.level0.height, 0))
            self._type[part] = batch["type_id"].to_numpy()
            x0, y0, x1, y1 = (batch["bbox"].field(name).to_numpy() for name in ("xmin", "ymin", "xmax", "ymax"))
            self._corner[part, 0], self._corner[part, 1] = x0, y0
            if len(batch):
                longest = max(longest, float((x1 - x0).max()), float((y1 - y0).max()))
            at = part.stop
        # One pixel is added because the corner is rounded to float32.
        self.step = max(_STEP, (longest + 1) / 65535)
        tiles = (self._y // self.tile).astype(np.int64) * self.columns + (self._x // self.tile).astype(np.int64)
        self._order = np.argsort(tiles, kind="stable").astype(np.uint32)
        self._starts = np.searchsorted(tiles[self._order], np.arange(self.columns * self.rows + 1))
        self.counts = np.bincount(self._type, minlength=self._classes)
        by_tile = np.zeros((self._classes, self.columns * self.rows), np.uint32)
        np.add.at(by_tile, (self._type, tiles), 1)
        self.peaks = by_tile.max(axis=1, initial=0) / self.tile**2

    def _read_contours(self) -> None:
        """Read the contours as uint16 steps from the corner of each bounding box."""
        self._points = np.empty((0, 2), np.uint16)
        lengths = np.empty(self.table.rows, np.int64)
        at = 0
        for batch in self.table.batches(["geometry"]):
            polygons = self.table.polygons(batch)
            coordinates, owner = shapely.get_coordinates(polygons, return_index=True)
            corners = self._corner[at : at + len(batch)].astype(np.float64)
            steps = np.rint((coordinates - corners[owner]) / self.step)
            known = len(self._points)
            self._points.resize((known + len(steps), 2), refcheck=False)  # in place, to hold it once
            self._points[known:] = np.clip(steps, 0, 65535)
            lengths[at : at + len(batch)] = np.bincount(owner, minlength=len(batch))
            at += len(batch)
        self._ends = np.concatenate([[0], lengths.cumsum()])

    def contours(self, column: int, row: int) -> bytes | None:
        """Return the nuclei of a contour tile in the little-endian layout below; None if there is no such tile.

        `column`, `row`: position of the tile in the grid of contour tiles.

        ::

            n          uint32           number of nuclei
            nucleus_id uint32  (n,)
            ends       uint32  (n,)     end of each contour in `points`
            corner     float32 (n, 2)   upper left corner of the bounding box: x, y in level-0 pixels
            points     uint16  (ends[-1], 2)   x, y from the corner, in units of `step` level-0 pixels
            type_id    uint8   (n,)
        """
        if not (0 <= column < self.columns and 0 <= row < self.rows):
            return None
        tile = row * self.columns + column
        chosen = np.sort(self._order[self._starts[tile] : self._starts[tile + 1]]).astype(np.int64)
        first, lengths = self._ends[chosen], np.diff(self._ends)[chosen]
        ends = lengths.cumsum()
        # Index of each chosen point: its place in the answer, shifted from there to its contour in `_points`.
        shifts = np.repeat(first - (ends - lengths), lengths)
        points = self._points[shifts + np.arange(lengths.sum())]
        parts: list[tuple[Any, str]] = [
            ([len(chosen)], "<u4"),
            (chosen + 1, "<u4"),
            (ends, "<u4"),
            (self._corner[chosen], "<f4"),
            (points, "<u2"),
            (self._type[chosen], "u1"),
        ]
        return b"".join(np.asarray(values).astype(kind).tobytes() for values, kind in parts)

    def density(self, level: int, column: int, row: int) -> bytes | None:
        """Return the numbers of nuclei by class in the cells of one density tile; None if there is no such tile.

        The bytes are an array (class, y, x) of little-endian uint32 with CELLS (128) cells along y and along x.

        `level`: level of the density tiles, whose cells are 2^level level-0 pixels wide. `column`, `row`: position of
        the tile in the grid of tiles of this level.
        """
        side = CELLS << min(level, 32)
        x0, y0 = column * side, row * side
        if not (0 <= x0 < self.table.level0.width and 0 <= y0 < self.table.level0.height):
            return None
        left, right = x0 // self.tile, min((x0 + side - 1) // self.tile, self.columns - 1)
        top, bottom = y0 // self.tile, min((y0 + side - 1) // self.tile, self.rows - 1)
        by_row = []
        for first_tile in range(top * self.columns, (bottom + 1) * self.columns, self.columns):
            start, stop = self._starts[first_tile + left], self._starts[first_tile + right + 1]
            by_row.append(self._order[start:stop])
        chosen = np.concatenate(by_row)
        x = np.floor((self._x[chosen] - x0) / (side / CELLS)).astype(np.int64)
        y = np.floor((self._y[chosen] - y0) / (side / CELLS)).astype(np.int64)
        inside = (x >= 0) & (x < CELLS) & (y >= 0) & (y < CELLS)
        cells = (self._type[chosen].astype(np.int64) * CELLS + y) * CELLS + x
        return np.bincount(cells[inside], minlength=self._classes * CELLS**2).astype("<u4").tobytes()

    def row(self, nucleus_id: int) -> dict[str, Any] | None:
        """Return the values of one nucleus by column, except slide_id, type_id, bbox and geometry.

        Numbers that are not finite become None. The result is None if there is no nucleus with this id.

        SlideError if the file is corrupted.
        """
        if not 1 <= nucleus_id <= self.table.rows:
            return None
        group = int(np.searchsorted(self._first_rows, nucleus_id - 1, side="right")) - 1
        one_row = self._group(group).slice(nucleus_id - 1 - int(self._first_rows[group]), 1)
        [values] = one_row.to_pylist()
        [finite] = self.table.measurements(one_row)
        return {name: finite.get(name) if name in self.table.measured else values[name] for name in values}

    def _read_group(self, number: int) -> pa.RecordBatch:
        """Read the columns of one row group that `row` returns."""
        left_out = ("slide_id", "type_id", "bbox", "geometry")
        try:
            with self._lock:  # an open file may be read by one thread at a time
                columns = [name for name in self.table.schema.names if name not in left_out]
                group = self._file.read_row_group(number, columns=columns).combine_chunks()
                return self.table.checked(group.to_batches()[0])
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self.table.path, error) from error
