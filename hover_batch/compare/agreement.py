"""How far two sides find the same nuclei, and where they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.compare.timing import Seen
from hover_batch.metrics import DETECTION_RADIUS_UM, match_centroids, mean_defined, panoptic_quality
from hover_batch.nuclei.measure import Nuclei
from hover_batch.taxonomy import Taxonomy

CELL = 128
"""Side in pixels of the cells by which densities are compared and disagreements are shown: 32 µm at 40×."""


@dataclass(frozen=True)
class Dispute:
    """A cell of a field, by its corner, and how many nuclei in it only one of the sides has."""

    x: int
    y: int
    alone: int


class Agreement:
    """What two sides of these classes have in common, summed up field by field."""

    def __init__(self, taxonomies: Sequence[Taxonomy]) -> None:
        self._names = [[c.name for c in taxonomy.nuclei] for taxonomy in taxonomies]
        self._table = np.zeros((len(self._names[0]) + 1, len(self._names[1]) + 1), np.int64)
        self._counts = np.zeros(2, np.int64)
        self._paired = 0
        self._qualities: list[float] = []
        self._densities: list[NDArray[np.int64]] = []

    def add(self, first: Seen, second: Seen, mpp: float) -> list[Dispute]:
        """Take one field in. Returns its cells in which one side alone has nuclei."""
        self._qualities.append(panoptic_quality(first.instances, second.instances).pq)
        places = [np.stack([seen.nuclei.centroid_x, seen.nuclei.centroid_y], axis=1) for seen in (first, second)]
        matched = match_centroids(places[0], places[1], DETECTION_RADIUS_UM / mpp).reshape(-1, 2)
        alone = [np.setdiff1d(np.arange(len(s.nuclei)), matched[:, n]) for n, s in enumerate((first, second))]
        self._paired += len(matched)
        self._counts += len(first.nuclei), len(second.nuclei)
        types = [seen.nuclei.type_id.astype(np.int64) - 1 for seen in (first, second)]
        np.add.at(self._table, (types[0][matched[:, 0]], types[1][matched[:, 1]]), 1)
        np.add.at(self._table[:, -1], types[0][alone[0]], 1)
        np.add.at(self._table[-1], types[1][alone[1]], 1)
        shape = first.instances.shape
        self._densities.append(np.stack([_density(seen.nuclei, shape).ravel() for seen in (first, second)]))
        disputed = _density(first.nuclei.take(alone[0]), shape) + _density(second.nuclei.take(alone[1]), shape)
        return [
            Dispute(int(x) * CELL, int(y) * CELL, int(disputed[y, x])) for y, x in np.argwhere(disputed > 0).tolist()
        ]

    def to_json(self) -> dict[str, Any]:
        """PQ (mean over fields), F1 of detections within 12 px at 40×, counts, correlation of densities over cells, and
        the confusion of classes: rows the first side's, columns the second's, the last of both `none`."""
        cells = np.concatenate(self._densities, axis=1).astype(float)
        varied = cells.shape[1] > 1 and bool((cells.std(axis=1) > 0).all())
        total = int(self._counts.sum())
        rows, columns = self._names
        return {
            "pq": _defined(mean_defined(self._qualities)),
            "detection_f1": 2 * self._paired / total if total else None,
            "nuclei": [int(n) for n in self._counts],
            "density_correlation": float(np.corrcoef(cells)[0, 1]) if varied else None,
            "confusion": {"rows": [*rows, "none"], "columns": [*columns, "none"], "counts": self._table.tolist()},
        }


def _density(nuclei: Nuclei, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Nuclei in each cell (y, x) of a field."""
    counts = np.zeros((-(-shape[0] // CELL), -(-shape[1] // CELL)), np.int64)
    rows, columns = ((np.asarray(v) // CELL).astype(int).clip(0) for v in (nuclei.centroid_y, nuclei.centroid_x))
    np.add.at(counts, (rows, columns), 1)
    return counts


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
