"""Exporting ten times as many nuclei needs no more memory, except with libraries that hold the whole slide."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.exports import annotated_parts, cost_of, replicated_table
from hover_batch.cohort.layout import Format

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

EXTRA = (Format.spatialdata, Format.anndata)
WHOLE = (*EXTRA, Format.dicom)
GROWTH_MB = 64
"""That ten times the nuclei may add: what the allocator does not give back; 40 were seen."""
GROWTH_OF_ROWS_MB = 160
"""That ten times the nuclei may add to OME-Zarr, which holds a row of shards, 3.2 times as long; 81 were seen."""
MB_PER_MILLION = 4000


@pytest.fixture(scope="module")
def tables(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Tables of 1,000, 100,000 and 1,000,000 annotated nuclei."""
    folder, parts = tmp_path_factory.mktemp("tables"), annotated_parts(data / "nuclei")
    return [replicated_table(folder / f"{n}.parquet", n, parts).path for n in (1_000, 100_000, 1_000_000)]


@pytest.mark.parametrize("format", Format)
def test_memory(format: Format, tables: list[Path]) -> None:
    if format in EXTRA:
        pytest.importorskip("spatialdata")
    warm, small, large = tables
    costs = [cost_of(format, table, warm) for table in (small, large)]
    print("\n", format, costs)
    if format in WHOLE:
        assert costs[1].peak_mb < MB_PER_MILLION
    else:
        growth = GROWTH_OF_ROWS_MB if format is Format.ome_zarr else GROWTH_MB
        assert costs[1].peak_mb < costs[0].peak_mb + growth
