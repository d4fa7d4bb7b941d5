"""Match the nuclei of two tables of the same slide one to one by the IoU of their contours.

Tables are sorted by the upper edge of their nuclei, so both are read from top to bottom together: the contours of only
a band are in memory, and of the whole slide a few numbers per nucleus.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from hover_batch.errors import SlideError
from hover_batch.export.read import NucleiTable, unreadable

MIN_IOU = 0.5
"""Nuclei are paired if their IoU is larger. Disjoint nuclei then have at most one partner, as in panoptic quality."""

_COLUMNS = ("type_id", "area_um2", "centroid_x", "centroid_y", "bbox", "geometry")


@dataclass(frozen=True)
class Nuclei:
    """Nuclei of one table, in its order."""

    type_id: NDArray[np.uint8]
    """Class id of each: (n,)."""
    area_um2: NDArray[np.float32]
    """Area of each in µm²: (n,)."""
    xy: NDArray[np.float64]
    """Centroids: (n, 2) of x, y in level-0 pixels."""

    def __len__(self) -> int:
        return len(self.type_id)


@dataclass(frozen=True)
class Matches:
    """Nuclei of two tables, and which of them are the same."""

    first: Nuclei
    """Nuclei of the first table."""
    second: Nuclei
    """Nuclei of the second table."""
    pairs: NDArray[np.int64]
    """Rows in the first and in the second table of each pair: (k, 2), sorted by the first; each row occurs once."""
    iou: NDArray[np.float64]
    """IoU of each pair: (k,), above MIN_IOU."""

    def unmatched(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows without a partner in the first and in the second table, as two ascending int64 arrays."""
        first, second = (
            np.setdiff1d(np.arange(len(nuclei)), self.pairs[:, side], assume_unique=True)
            for side, nuclei in enumerate((self.first, self.second))
        )
        return first, second


@dataclass(frozen=True)
class _Band:
    """Batch of a table with its contours."""

    start: int
    """Row of its first nucleus in the table."""
    polygons: NDArray[Any]
    """Contours: (n,) polygons in level-0 pixels."""
    area: NDArray[np.float64]
    """Area of each polygon in square pixels: (n,)."""
    box: NDArray[np.float64]
    """Bounding boxes of the polygons: (n, 4) of xmin, ymin, xmax, ymax."""
    top: float
    """Smallest ymin of the nuclei."""
    bottom: float
    """Largest ymax of the nuclei."""

    @classmethod
    def of(cls, table: NucleiTable, batch: pa.RecordBatch, start: int) -> Self:
        """Return a batch that starts at the row `start`. SlideError if a contour is corrupted."""
        polygons = table.polygons(batch)
        low, high = (batch["bbox"].field(name).to_numpy() for name in ("ymin", "ymax"))
        area, box = shapely.area(polygons), shapely.bounds(polygons)
        return cls(start, polygons, area, box, float(low[0]), float(high.max()))


class _Reader:
    """Table that is read band by band; it collects what the result keeps of all nuclei."""

    def __init__(self, table: NucleiTable) -> None:
        self.table = table
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def bands(self) -> Iterator[_Band]:
        """Yield all nuclei in order. SlideError if the table is corrupted, or not sorted by ymin."""
        start, last = 0, -np.inf
        for batch in self.table.batches(_COLUMNS):
            if not len(batch):
                continue
            top = batch["bbox"].field("ymin").to_numpy()
            if top[0] < last or (np.diff(top) < 0).any():
                raise unreadable(self.table.path, ValueError("its nuclei are not sorted by their upper edge"))
            last = top[-1]
            # Copies, since slices would keep the whole batch in memory.
            kept = (batch[name].to_numpy().copy() for name in ("type_id", "area_um2", "centroid_x", "centroid_y"))
            self._parts.append(tuple(kept))
            yield _Band.of(self.table, batch, start)
            start += len(batch)

    def nuclei(self) -> Nuclei:
        """Return the nuclei that were read."""
        if not self._parts:
            return Nuclei(np.empty(0, np.uint8), np.empty(0, np.float32), np.empty((0, 2)))
        type_id, area, x, y = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        return Nuclei(type_id, area, np.stack([x, y], axis=1))


def match_tables(first: NucleiTable, second: NucleiTable) -> Matches:
    """Match the nuclei of two tables of the same slide one to one.

    Two nuclei are a pair if their IoU is above MIN_IOU (0.5) and neither has a partner with a higher IoU. The second
    condition matters only where contours of one table overlap. The result does not depend on the order of the tables.

    `first`, `second`: the tables, whose nuclei are sorted by their upper edges.

    SlideError if a table is corrupted or not sorted, or a contour crosses itself.
    """
    readers = _Reader(first), _Reader(second)
    found = [np.empty((0, 3))]
    waiting: list[_Band] = []
    rest = readers[1].bands()
    for band in readers[0].bands():
        waiting = [other for other in waiting if other.bottom > band.top]
        while not waiting or waiting[-1].top < band.bottom:
            if (following := next(rest, None)) is None:
                break
            waiting.append(following)
        tree = shapely.STRtree(band.polygons)
        for other in waiting:
            if other.bottom > band.top:
                found.append(_overlaps(band, tree, other, first, second))
    for _ in rest:  # nuclei below the last one of the first table
        pass
    candidates = np.concatenate(found)
    pairs, iou = _mutual_best(candidates[:, :2].astype(np.int64), candidates[:, 2])
    return Matches(readers[0].nuclei(), readers[1].nuclei(), pairs, iou)


def _overlaps(
    band: _Band, tree: shapely.STRtree, other: _Band, first: NucleiTable, second: NucleiTable
) -> NDArray[np.float64]:
    """Return the pairs of two bands with an IoU above MIN_IOU: (k, 3) of row, row, IoU."""
    j, i = tree.query(other.polygons)
    smaller, larger = np.minimum(band.area[i], other.area[j]), np.maximum(band.area[i], other.area[j])
    sides = np.minimum(band.box[i, 2:], other.box[j, 2:]) - np.maximum(band.box[i, :2], other.box[j, :2])
    # The intersection is at most that of the boxes, and the union at least the larger area: most neighbours leave here.
    possible = np.minimum(smaller, sides.prod(axis=1)) > MIN_IOU * larger
    same = shapely.equals_exact(band.polygons[i], other.polygons[j])
    i, j, same = (values[possible | same] for values in (i, j, same))
    iou = np.ones(len(i))
    a, b = band.polygons[i[~same]], other.polygons[j[~same]]
    try:
        shared = shapely.area(shapely.intersection(a, b))
    except shapely.errors.ShapelyError as error:
        raise SlideError(
            f"{first.path} or {second.path}: has a contour that crosses itself ({error}); remove the table and repeat "
            "the segment command"
        ) from error
    iou[~same] = shared / (band.area[i[~same]] + other.area[j[~same]] - shared)
    kept = iou > MIN_IOU
    return np.stack([i[kept] + band.start, j[kept] + other.start, iou[kept]], axis=1)


def _mutual_best(pairs: NDArray[np.int64], iou: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Keep the pairs (k, 2) in which each is the other's partner of highest IoU, sorted by the first row.

    Of equal ones, the pair with the lower sum of rows counts, so that exchanging the tables changes nothing.
    """
    order = np.lexsort((pairs.sum(axis=1), -iou))
    pairs, iou = pairs[order], iou[order]
    is_best = np.zeros((2, len(pairs)), bool)
    for side in range(2):
        is_best[side, np.unique(pairs[:, side], return_index=True)[1]] = True
    kept = np.flatnonzero(is_best.all(axis=0))
    kept = kept[np.argsort(pairs[kept, 0])]
    return pairs[kept], iou[kept]
