"""Exports in the libraries that people open them with, without a line that converts them.

Skipped where a library is not installed: uv run --group interop --with squidpy pytest tests/interop.
"""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
from export_tables import annotated, exported, write_table

from hover_batch.cohort.layout import Format
from hover_batch.export.read import NucleiTable
from hover_batch.slide.example import write_pyramidal_tiff

pytestmark = pytest.mark.filterwarnings("ignore")  # these libraries warn of themselves and of each other


def library(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.fixture(scope="module")
def nuclei(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NucleiTable]:
    """The annotated nuclei of a field of 1000 × 1000 pixels."""
    yield write_table(tmp_path_factory.mktemp("table"), *annotated(data))


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    write_pyramidal_tiff(path, np.full((1000, 1000, 3), 230, np.uint8), 0.25)
    return path


def test_wsidata_opens_the_spatialdata_export_as_the_store_of_the_slide(
    nuclei: NucleiTable, slide: Path, tmp_path: Path
) -> None:
    wsidata = library("wsidata")
    path = exported(nuclei, Format.spatialdata, tmp_path)
    wsi = wsidata.open_wsi(slide, store=path)
    assert len(wsi.shapes["nuclei"]) == wsi.tables["table"].n_obs == nuclei.rows
    wanted = geopandas.read_parquet(nuclei.path)
    assert wsi.shapes["nuclei"].geometry.geom_equals(wanted.set_index("nucleus_id").geometry).all()
    assert tuple(wsi.properties.shape) == (1000, 1000)


@pytest.mark.parametrize("file", ["GeoParquet", "GeoJSON"])
def test_lazyslide_loads_nuclei(nuclei: NucleiTable, slide: Path, tmp_path: Path, file: str) -> None:
    wsidata, lazyslide = library("wsidata"), library("lazyslide")
    wanted = geopandas.read_parquet(nuclei.path)
    wsi = wsidata.open_wsi(slide, store=None)
    if file == "GeoParquet":
        lazyslide.io.load_annotations(wsi, wanted, explode=False, key_added="nuclei")
        classes = wsi.shapes["nuclei"]["type"]
    else:
        path = tmp_path / "nuclei.geojson"  # as gunzip leaves it
        path.write_bytes(gzip.decompress(exported(nuclei, Format.qupath, tmp_path).read_bytes()))
        lazyslide.io.load_annotations(wsi, path, explode=False, key_added="nuclei")
        classes = wsi.shapes["nuclei"]["classification_name"]
    assert classes.tolist() == wanted["type"].tolist()
    assert wsi.shapes["nuclei"].geometry.geom_equals(wanted.geometry).all()


def test_squidpy_finds_neighbours_and_enrichment(nuclei: NucleiTable, tmp_path: Path) -> None:
    squidpy, anndata = library("squidpy"), library("anndata")
    table = anndata.read_h5ad(exported(nuclei, Format.anndata, tmp_path))
    squidpy.gr.spatial_neighbors(table, coord_type="generic", delaunay=True)
    squidpy.gr.nhood_enrichment(table, cluster_key="type", n_perms=10, show_progress_bar=False)
    kinds = table.obs["type"].cat.categories
    assert table.uns["type_nhood_enrichment"]["zscore"].shape == (len(kinds), len(kinds))
    squidpy.gr.centrality_scores(table, cluster_key="type", show_progress_bar=False)


def test_sopa_measures_distances_between_classes(nuclei: NucleiTable, tmp_path: Path) -> None:
    sopa, spatialdata = library("sopa"), library("spatialdata")
    sdata = spatialdata.read_zarr(exported(nuclei, Format.spatialdata, tmp_path))
    sopa.spatial.spatial_neighbors(sdata, radius=(0, 200))
    distances = sopa.spatial.mean_distance(sdata["table"], "type")
    present = sdata["table"].obs["type"].nunique()
    assert distances.notna().all(axis=None) and len(distances) >= present > 1


def test_ome_zarr_finds_the_nuclei_where_they_lie(nuclei: NucleiTable, tmp_path: Path) -> None:
    reader, io = library("ome_zarr.reader"), library("ome_zarr.io")
    _, ids, _ = list(reader.Reader(io.parse_url(exported(nuclei, Format.ome_zarr, tmp_path)))())
    wanted = geopandas.read_parquet(nuclei.path)
    points = wanted.geometry.representative_point()
    x, y = (np.floor(values).astype(int) for values in (points.x, points.y))
    found = np.asarray(ids.data[0])[y, x]
    assert np.mean(found == wanted.nucleus_id) > 0.98
