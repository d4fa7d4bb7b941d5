"""Draws of clusters from a slide on which the number of nuclei in each is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hover_batch.geometry import Grid
from hover_batch.sampling.clusters import area_sums, clusters_of
from hover_batch.sampling.draw import Draw, draw
from hover_batch.sampling.estimate import Sample
from hover_batch.slide.tiles import plan_units
from hover_batch.slide.tissue import TissueMask

TILE = 256


@dataclass(frozen=True)
class Draws:
    """Result of many draws. Those whose interval never was narrow enough are not counted in `stopped`."""

    stopped: int
    covered: int
    """Number of those that stopped with an interval that contains the density of the whole slide."""
    computed: float
    """Mean share of the tiles that they computed, those of the halo included."""


def sample_at(look: int, tissue: NDArray[np.float64], drawn: Draw) -> tuple[Sample, NDArray[np.int64]]:
    """Return the sample of a look, and the indices of its clusters."""
    chosen = drawn.sample(look)
    clusters = np.bincount(drawn.stratum)
    return Sample(look, len(drawn.looks), tissue[chosen], drawn.stratum[chosen], clusters, 0), chosen


def draws(
    anchors: NDArray[np.float64], grid: Grid, mask: TissueMask, side: int, stop_at: float, seeds: int = 200
) -> Draws:
    """Draw clusters of `side` pixels `seeds` times, each time until the density is known within ± `stop_at`.

    `anchors`: (n, 2) positions x, y of all nuclei in inference pixels. The stain of a cluster is its density with
    noise.
    """
    units = plan_units(grid, mask, 4096, TILE)
    clusters = clusters_of(units, grid.size, side)
    tissue = area_sums(mask.array, mask.level0_per_pixel, clusters, grid, side)
    at_row, at_column = (np.array([getattr(unit, name) for unit in clusters]) for name in ("row", "column"))
    edges_y, edges_x = (np.arange(at.max() + 2) * side for at in (at_row, at_column))
    counts = np.histogram2d(anchors[:, 1], anchors[:, 0], [edges_y, edges_x])[0].astype(np.int64)[at_row, at_column]
    assert counts.sum() == len(anchors)
    truth = len(anchors) / tissue.sum()
    noise = np.random.default_rng(0).lognormal(0, 0.5, len(counts))
    stain = counts / np.maximum(tissue, 1) * noise
    tiles = sum(len(unit.tile_cells) for unit in units)
    covered, computed = 0, []
    for seed in range(seeds):
        drawn = draw(tissue, stain, seed)
        for look in range(len(drawn.looks)):
            sample, chosen = sample_at(look, tissue, drawn)
            density = sample.density(counts[chosen])
            if density.is_within(stop_at):
                assert density.low is not None and density.high is not None
                covered += density.low <= truth <= density.high
                computed.append(len({cell for i in chosen for cell in clusters[i].tile_cells}) / tiles)
                break
    result = Draws(len(computed), int(covered), float(np.mean(computed)) if computed else 1.0)
    print(f"{side}² within {stop_at:.0%}: {result}")
    return result
