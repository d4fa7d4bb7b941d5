"""The estimator keeps its promise on point patterns of known clustering, and its clusters cover a slide once."""

from __future__ import annotations

import numpy as np
import pytest
from draws import TILE, draws, sample_at
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hover_batch.geometry import Grid, Mpp, Size, cell_box
from hover_batch.sampling.clusters import HALO, area_sums, clusters_of
from hover_batch.sampling.draw import BY_STAIN, BY_TISSUE, draw
from hover_batch.sampling.estimate import MIN_CLUSTERS_WITH, Density, Sample
from hover_batch.slide.tiles import plan_units
from hover_batch.slide.tissue import TissueMask

MPP = Mpp(0.25, 0.25)
SIDE = 1024


def slide(clusters: int) -> tuple[Grid, TissueMask]:
    """A slide of `clusters` × `clusters` squares of SIDE with tissue in a disc, and its mask of 8 µm."""
    extent = clusters * SIDE
    grid = Grid.over(Size(extent, extent), MPP, 0.25)
    centres = (np.arange(extent // 32) + 0.5) / (extent // 32) - 0.5
    return grid, TissueMask(centres[:, None] ** 2 + centres**2 < 0.48**2, (32.0, 32.0))


def thomas(rng: np.random.Generator, extent: int, groups: float, each: float, spread: float) -> NDArray[np.float64]:
    """Points (n, 2) of a Thomas process: `groups` per cluster of SIDE, `each` points in one, `spread` of SIDE wide."""
    rim = 2 * SIDE
    centres = rng.uniform(-rim, extent + rim, (rng.poisson(groups * ((extent + 2 * rim) / SIDE) ** 2), 2))
    sizes = rng.poisson(each, len(centres))
    return np.repeat(centres, sizes, axis=0) + rng.normal(0, spread * SIDE, (int(sizes.sum()), 2))


@pytest.mark.parametrize(
    ("groups", "each", "spread", "stop_at", "most_computed"),
    [
        pytest.param(40, 10, 0.2, 0.05, 0.25, id="even tissue"),
        pytest.param(4, 100, 0.15, 0.15, 1, id="glands"),
        pytest.param(0.5, 400, 0.3, 0.25, 1, id="islands"),
        pytest.param(0.2, 15, 0.1, 0.6, 1, id="a rare class"),
    ],
)
def test_the_interval_covers_the_density_of_the_whole_slide(
    groups: float, each: float, spread: float, stop_at: float, most_computed: float
) -> None:
    """200 draws on one slide. The share that is computed counts the tiles of the halo, too."""
    grid, mask = slide(24)
    points = thomas(np.random.default_rng(3), grid.size.width, groups, each, spread)
    result = draws(points[mask.contains(points[:, 0], points[:, 1])], grid, mask, SIDE, stop_at)
    assert result.stopped >= 150
    assert result.covered >= 0.9 * result.stopped
    assert result.computed <= most_computed


@pytest.mark.parametrize("stop_at", [0.3, 0.5])
def test_a_few_rich_clusters_do_not_end_a_slide_too_early(stop_at: float) -> None:
    """200 draws on a slide whose clusters differ by a lognormal factor (σ = 1.2): a ninth has half of the nuclei.

    A slide that is processed whole because it never was precise enough has its density exactly.
    """
    grid, mask = slide(24)
    rng = np.random.default_rng(3)
    numbers = rng.poisson(200 * rng.lognormal(0, 1.2, 24 * 24))
    corner = np.stack(np.divmod(np.arange(24 * 24), 24), axis=1)[:, ::-1]
    points = (np.repeat(corner, numbers, axis=0) + rng.uniform(0, 1, (int(numbers.sum()), 2))) * SIDE
    result = draws(points[mask.contains(points[:, 0], points[:, 1])], grid, mask, SIDE, stop_at)
    assert result.stopped >= 150
    assert result.covered + 200 - result.stopped >= 0.9 * 200


def test_all_clusters_together_give_the_density_itself() -> None:
    rng = np.random.default_rng(0)
    tissue, counts = rng.uniform(0, 1, 60), rng.poisson(20, 60)
    stratum = draw(tissue, tissue, 0).stratum
    density = Sample(0, 4, tissue, stratum, np.bincount(stratum), 0).density(counts)
    assert density.per_mm2 == pytest.approx(counts.sum() / tissue.sum())
    assert density.low == density.high == density.per_mm2 and density.is_within(0.001)


def test_a_class_in_few_clusters_has_no_interval() -> None:
    tissue = np.ones(60)
    sample, chosen = sample_at(0, tissue, draw(tissue, tissue, 0))
    counts = np.zeros(len(chosen), np.int64)
    assert sample.density(counts) == Density(0, None, None) and not sample.density(counts).is_within(0.5)
    counts[: MIN_CLUSTERS_WITH - 1] = 1
    assert sample.density(counts).high is None
    counts[:MIN_CLUSTERS_WITH] = 1
    assert sample.density(counts).high is not None


@settings(max_examples=40)
@given(clusters=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1))
def test_samples_grow_and_every_stratum_has_its_share(clusters: int, seed: int) -> None:
    rng = np.random.default_rng(clusters)
    drawn = draw(rng.uniform(0, 1, clusters), rng.uniform(0, 1, clusters), seed)
    assert bool(drawn.looks) == (clusters >= 50)
    sizes = np.bincount(drawn.stratum)
    before: set[int] = set()
    for look, size in enumerate(drawn.looks):
        sample = drawn.sample(look)
        share = np.bincount(drawn.stratum[sample]) / sizes
        assert before <= set(sample.tolist()) and size <= len(sample) < size + BY_TISSUE * BY_STAIN + 6
        assert np.all(np.abs(share - size / clusters) * sizes <= 2)
        before = set(sample.tolist())


@settings(max_examples=40)
@given(
    width=st.integers(300, 5000),
    height=st.integers(300, 5000),
    side=st.sampled_from([256, 1024]),
    seed=st.integers(0, 2**32 - 1),
)
def test_clusters_hold_all_tiles_once_and_all_tissue(width: int, height: int, side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = Grid.over(Size(width, height), MPP, 0.25)
    shape = rng.integers(2, 20, 2)
    mask = TissueMask(rng.random(shape) < 0.3, (width / shape[1], height / shape[0]))
    units = plan_units(grid, mask, 2048, TILE)
    clusters = clusters_of(units, grid.size, side)

    planned = {cell for unit in units for cell in unit.tile_cells}
    in_core: list[tuple[int, int]] = []
    for cluster in clusters:
        core = cell_box(cluster.column, cluster.row, side)
        in_core += (cell for cell in core.cells(TILE) if cell in planned)
        context = core.expand(HALO).intersect(grid.size.box)
        assert cluster.box.contains_box(context)
        assert set(cluster.tile_cells) == planned.intersection(context.cells(TILE))
    assert sorted(in_core) == sorted(planned)
    areas = area_sums(mask.array, mask.level0_per_pixel, clusters, grid, side)
    assert areas.sum() == pytest.approx(np.count_nonzero(mask.array) * np.prod(mask.level0_per_pixel), abs=1e-3)
