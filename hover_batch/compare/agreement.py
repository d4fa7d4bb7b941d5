"""Measure how far two networks agree on nuclei, and locate where they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.compare.timing import SideResult
from hover_batch.metrics import DETECTION_RADIUS_UM, match_centroids, mean_defined, panoptic_quality
from hover_batch.nuclei.measure import Nuclei
from hover_batch.taxonomy import Taxonomy

CELL = 128
"""Side in inference pixels of the cells in which densities and disagreements are counted: 32 µm at 40×."""
MIN_CELLS = 16
"""Minimum number of cells for a correlation of densities; with fewer, it would be mostly chance."""


@dataclass(frozen=True)
class Dispute:
    """Cell of a field, CELL × CELL pixels, in which the two networks disagree."""

    x: int
    """Left edge in inference pixels, from the field's left edge."""
    y: int
    """Upper edge in inference pixels, from the field's upper edge."""
    alone: int
    """Number of nuclei in the cell that only one of them found."""


class Agreement:
    """Agreement of two networks, summed over fields.

    `taxonomies`: classes of the first and of the second network.
    """

    def __init__(self, taxonomies: Sequence[Taxonomy]) -> None:
        self._names = [[c.name for c in taxonomy.nuclei] for taxonomy in taxonomies]
        self._table = np.zeros((len(self._names[0]) + 1, len(self._names[1]) + 1), np.int64)
        self._counts = np.zeros(2, np.int64)
        self._paired = 0
        self._qualities: list[float] = []
        self._densities: list[NDArray[np.int64]] = []

    def add(self, first: SideResult, second: SideResult, mpp: float) -> list[Dispute]:
        """Add one field. Return its cells with nuclei that only one network found, in raster order.

        Nuclei are paired one to one if their centroids are at most DETECTION_RADIUS_UM (3 µm) apart.

        `first`, `second`: results of the networks on this field. `mpp`: size of its inference pixels in µm.
        """
        self._qualities.append(panoptic_quality(first.instances, second.instances).pq)
        both = first.nuclei, second.nuclei
        centroids = [np.stack([nuclei.centroid_x, nuclei.centroid_y], axis=1) for nuclei in both]
        matched = match_centroids(centroids[0], centroids[1], DETECTION_RADIUS_UM / mpp).reshape(-1, 2)
        unmatched = [np.setdiff1d(np.arange(len(nuclei)), matched[:, i]) for i, nuclei in enumerate(both)]
        self._paired += len(matched)
        self._counts += len(first.nuclei), len(second.nuclei)
        rows, columns = (nuclei.type_id.astype(np.int64) - 1 for nuclei in both)  # class k + 1 is at k
        np.add.at(self._table, (rows[matched[:, 0]], columns[matched[:, 1]]), 1)
        np.add.at(self._table[:, -1], rows[unmatched[0]], 1)
        np.add.at(self._table[-1], columns[unmatched[1]], 1)
        shape = first.instances.shape
        self._densities.append(np.stack([_density(nuclei, shape).ravel() for nuclei in both]))
        alone = [nuclei.take(index) for nuclei, index in zip(both, unmatched, strict=True)]
        disputed = _density(alone[0], shape) + _density(alone[1], shape)
        return [
            Dispute(int(x) * CELL, int(y) * CELL, int(disputed[y, x])) for y, x in np.argwhere(disputed > 0).tolist()
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the results by name, as JSON values. Undefined ones are None, such as the F1 without nuclei.

        Call it after at least one `add`.

        `pq`: mean over fields. `detection_f1`: F1 score of detections within DETECTION_RADIUS_UM. Both are 1 for full
        agreement. `nuclei`: number found by each network. `density_correlation`: Pearson correlation of the numbers of
        nuclei per cell; None if there are fewer than MIN_CELLS cells, or a network found the same number in all of
        them.

        `confusion` has the keys `rows` and `columns`, the class names of the first and of the second network, each
        followed by `none`, and `counts`, a list of rows. A count is the number of matched nuclei with these classes;
        unmatched nuclei are in the row or column `none`.
        """
        cells = np.concatenate(self._densities, axis=1).astype(float)
        is_defined = cells.shape[1] >= MIN_CELLS and bool((cells.std(axis=1) > 0).all())
        total = int(self._counts.sum())
        rows, columns = self._names
        return {
            "pq": _defined(mean_defined(self._qualities)),
            "detection_f1": 2 * self._paired / total if total else None,
            "nuclei": [int(n) for n in self._counts],
            "density_correlation": float(np.corrcoef(cells)[0, 1]) if is_defined else None,
            "confusion": {"rows": [*rows, "none"], "columns": [*columns, "none"], "counts": self._table.tolist()},
        }


def _density(nuclei: Nuclei, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the number of nuclei in each cell of a field of `shape` pixels (y, x), as (rows, columns) int64."""
    counts = np.zeros((-(-shape[0] // CELL), -(-shape[1] // CELL)), np.int64)
    rows, columns = ((np.asarray(v) // CELL).astype(int).clip(0) for v in (nuclei.centroid_y, nuclei.centroid_x))
    np.add.at(counts, (rows, columns), 1)
    return counts


def _defined(value: float) -> float | None:
    """Return `value`, or None in place of NaN, which JSON lacks."""
    return None if math.isnan(value) else value
