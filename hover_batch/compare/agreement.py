"""How far two sides find the same nuclei, and where they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.compare.fields import Field
from hover_batch.compare.timing import Seen
from hover_batch.metrics import DETECTION_RADIUS_UM, match_centroids, mean_defined, panoptic_quality
from hover_batch.nuclei.measure import Nuclei
from hover_batch.taxonomy import Taxonomy

CELL = 128
"""Side in pixels of the cells by which densities are compared and disagreements are shown: 32 µm at 40×."""


@dataclass(frozen=True)
class Dispute:
    """A cell of a field, and how many nuclei in it only one of the sides has."""

    field: int
    x: int
    y: int
    alone: int


def agreement(fields: Sequence[Field], pairs: Sequence[tuple[Seen, Seen]], taxonomies: Sequence[Taxonomy]) -> Any:
    """PQ (mean over fields), F1 of detections within 12 px at 40×, counts, correlation of densities over cells, and
    the confusion of classes: rows the first side's, columns the second's, the last of both `none`."""
    names = [[c.name for c in taxonomy.nuclei] for taxonomy in taxonomies]
    table = np.zeros((len(names[0]) + 1, len(names[1]) + 1), np.int64)
    counts = np.zeros(2, np.int64)
    paired = 0
    qualities, densities = [], []
    for field, (first, second) in zip(fields, pairs, strict=True):
        qualities.append(panoptic_quality(first.instances, second.instances).pq)
        matched = _matched(first.nuclei, second.nuclei, field.mpp)
        paired += len(matched)
        counts += len(first.nuclei), len(second.nuclei)
        columns = np.full(len(first.nuclei), len(names[1]), np.int64)
        columns[matched[:, 0]] = second.nuclei.type_id[matched[:, 1]].astype(np.int64) - 1
        np.add.at(table, (first.nuclei.type_id.astype(np.int64) - 1, columns), 1)
        alone = np.setdiff1d(np.arange(len(second.nuclei)), matched[:, 1])
        table[-1] += np.bincount(second.nuclei.type_id[alone].astype(np.int64) - 1, minlength=table.shape[1])
        shape = field.image.shape[:2]
        densities.append(np.stack([_density(seen.nuclei, shape).ravel() for seen in (first, second)]))
    cells = np.concatenate(densities, axis=1).astype(float)
    varied = cells.shape[1] > 1 and bool((cells.std(axis=1) > 0).all())
    total = int(counts.sum())
    return {
        "pq": _defined(mean_defined(qualities)),
        "detection_f1": 2 * paired / total if total else None,
        "nuclei": [int(n) for n in counts],
        "density_correlation": float(np.corrcoef(cells)[0, 1]) if varied else None,
        "confusion": {"rows": [*names[0], "none"], "columns": [*names[1], "none"], "counts": table.tolist()},
    }


def disputes(pairs: Sequence[tuple[Seen, Seen]], mpp: float, most: int) -> list[Dispute]:
    """The cells with most nuclei that only one side has, most first."""
    found = []
    for number, (first, second) in enumerate(pairs):
        shape = first.instances.shape
        matched = _matched(first.nuclei, second.nuclei, mpp)
        unmatched = [np.setdiff1d(np.arange(len(s.nuclei)), matched[:, n]) for n, s in enumerate((first, second))]
        alone = _density(first.nuclei, shape, unmatched[0]) + _density(second.nuclei, shape, unmatched[1])
        found += [Dispute(number, int(x) * CELL, int(y) * CELL, int(alone[y, x])) for y, x in np.argwhere(alone > 0)]
    return sorted(found, key=lambda dispute: (-dispute.alone, dispute.field, dispute.y, dispute.x))[:most]


def _matched(first: Nuclei, second: Nuclei, mpp: float) -> NDArray[np.intp]:
    places = [np.stack([nuclei.centroid_x, nuclei.centroid_y], axis=1) for nuclei in (first, second)]
    return match_centroids(places[0], places[1], DETECTION_RADIUS_UM / mpp).reshape(-1, 2)


def _density(nuclei: Nuclei, shape: tuple[int, ...], chosen: NDArray[np.intp] | None = None) -> NDArray[np.int64]:
    """Nuclei in each cell (y, x) of a field."""
    x, y = (np.asarray(v) if chosen is None else np.asarray(v)[chosen] for v in (nuclei.centroid_x, nuclei.centroid_y))
    counts = np.zeros((-(-shape[0] // CELL), -(-shape[1] // CELL)), np.int64)
    np.add.at(counts, ((y // CELL).astype(int).clip(0), (x // CELL).astype(int).clip(0)), 1)
    return counts


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
