"""Tables of nuclei for tests of exports: drawn or annotated, written as the pipeline writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import geopandas
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import shapely
from annotated import nuclei_from
from numpy.typing import NDArray

from hover_batch.cohort.layout import Format
from hover_batch.export.read import NucleiTable
from hover_batch.exporting import writer
from hover_batch.geometry import Box, Grid, Mpp, Size
from hover_batch.nuclei.table import TableContext, merge_parts, to_arrow, write_part
from hover_batch.taxonomy import CONSEP

MERGED = np.array([0, 1, 2, 3, 3, 4, 4, 4], np.uint8)
"""CoNSeP's codes → its merged classes."""
BOUNDS = Box(130, 70, 900, 800)


def drawn() -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Instance and type map (300, 400) of rectangles, some of them single pixels or lines."""
    random = np.random.default_rng(5)
    instances = np.zeros((300, 400), np.int32)
    for label, (x, y) in enumerate(np.argwhere(np.ones((20, 15))) * 20, start=1):
        width, height = random.integers(1, 20, 2)
        instances[y : y + height, x : x + width] = label
    return instances, (instances % 4 + 1).astype(np.uint8)


def write_table(
    folder: Path,
    instances: NDArray[Any],
    types: NDArray[np.uint8],
    scale: float = 1.0,
    bounds: Box | None = None,
    nan: bool = False,
) -> NucleiTable:
    nuclei = nuclei_from(instances, types, len(CONSEP.classes))
    if nan:
        nuclei.h_od[1::2] = np.nan
    size = Size(instances.shape[1], instances.shape[0])
    level0 = Size(round(size.width * scale), round(size.height * scale))
    slide_mpp = Mpp(0.25 / scale, 0.25 / scale)
    grid = Grid(level0, scale, scale, Mpp(0.25, 0.25), size)
    context = TableContext("slide-1", CONSEP, grid, slide_mpp, "file", bounds, "starter", "ab" * 32, "0.1.0")
    write_part(folder / "part.parquet", to_arrow(nuclei, context))
    merge_parts([(0, folder / "part.parquet")], folder / "nuclei.parquet", context)
    return NucleiTable.open(folder / "nuclei.parquet")


def annotated(data: Path) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    rows = pd.read_csv(data / "nuclei" / "dataset.csv")
    row = rows[rows.source == "consep"].iloc[0]
    labels, types = (cv2.imread(str(data / "nuclei" / row[name]), cv2.IMREAD_UNCHANGED) for name in ("labels", "types"))
    assert labels is not None and types is not None
    return labels.astype(np.int32), MERGED[types]


def exported(nuclei: NucleiTable, format: Format, folder: Path) -> Path:
    path = folder / f"nuclei.{format.suffix}"
    writer(format)(nuclei, path)
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == [], "a temporary file stayed"
    return path


def expected(nuclei: NucleiTable) -> geopandas.GeoDataFrame:
    frame = geopandas.read_parquet(nuclei.path)  # without the bbox, which to geopandas is an index
    assert len(frame) == nuclei.rows > 200 and frame["type"].nunique() > 1
    return frame


def boxes_of(nuclei: NucleiTable) -> list[dict[str, float]]:
    boxes: list[dict[str, float]] = pq.read_table(nuclei.path, columns=["bbox"])["bbox"].to_pylist()
    return boxes


def same_polygons(found: Any, wanted: Any) -> None:
    assert len(found) == len(wanted)
    assert shapely.equals_exact(np.asarray(found), np.asarray(wanted), 0.0).all()
