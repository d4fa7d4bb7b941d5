"""Measure the nuclei of a slide, from its table and from the stored maps of a few fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hover_batch.geometry import Box, Grid
from hover_batch.model.heads import MapLayout

FIELD = 512
"""Side in inference pixels of a sampled field: a chunk of the store."""
MAX_FIELDS = 16
"""Maximum number of sampled fields of a slide."""
MIN_NUCLEI = 5
"""Minimum number of nuclei in a sampled field."""
_MEANS = {"h_od": "h_od_mean", "e_od": "e_od_mean", "seg_score": "seg_score", "type_prob": "type_prob"}
_BINNING = 2
"""Inference pixels per pixel whose sharpness is measured: at 0.5 µm, 20× scans are as sharp as 40× scans."""
_MIN_PIXELS = 200


def mean_measures(nuclei: Path) -> dict[str, float]:
    """Return the means over all nuclei of a slide, by name; empty if there are no nuclei.

    The names are h_od and e_od, which are optical densities, and seg_score and type_prob, which are from 0 to 1.

    `nuclei`: path of nuclei.parquet.

    OSError if the table cannot be read.
    """
    sums, count = dict.fromkeys(_MEANS, 0.0), 0
    with pq.ParquetFile(nuclei) as table:
        for batch in table.iter_batches(columns=list(_MEANS.values())):
            count += len(batch)
            for name, column in _MEANS.items():
                sums[name] += float(batch[column].to_numpy().sum(dtype=np.float64))
    return {name: total / count for name, total in sums.items()} if count else {}


def sampled_fields(nuclei: Path, grid: Grid) -> list[Box]:
    """Return up to MAX_FIELDS fields of a slide, as boxes in inference pixels; empty if none has enough nuclei.

    Fields are squares of FIELD inference pixels a side, aligned with the chunks of the store and clipped to the slide.
    From those with at least MIN_NUCLEI nuclei, in raster order, fields at equal steps are chosen.

    `nuclei`: path of nuclei.parquet. `grid`: inference grid of the slide.

    OSError if the table cannot be read.
    """
    counts = np.zeros((-(-grid.size.height // FIELD), -(-grid.size.width // FIELD)), np.int64)
    with pq.ParquetFile(nuclei) as table:
        for batch in table.iter_batches(columns=["centroid_x", "centroid_y"]):
            x_field = (batch["centroid_x"].to_numpy() / grid.scale_x // FIELD).astype(np.int64)
            y_field = (batch["centroid_y"].to_numpy() / grid.scale_y // FIELD).astype(np.int64)
            np.add.at(counts, (np.clip(y_field, 0, counts.shape[0] - 1), np.clip(x_field, 0, counts.shape[1] - 1)), 1)
    rows, columns = np.nonzero(counts >= MIN_NUCLEI)
    evenly_spaced = np.linspace(0, max(0, len(rows) - 1), min(MAX_FIELDS, len(rows)))
    picked = np.unique(evenly_spaced.round().astype(np.int64))
    corners = [(int(columns[i]) * FIELD, int(rows[i]) * FIELD) for i in picked]
    return [Box(x, y, x + FIELD, y + FIELD).intersect(grid.size.box) for x, y in corners]


def field_sharpness(fields: list[Box], read: Callable[[Box], NDArray[np.uint8]], layout: MapLayout) -> list[float]:
    """Return the sharpness of each field, in order, by `sharpness`; fields for which it is None are left out.

    `fields`: boxes in inference pixels. `read`: function that returns the stored maps (plane, y, x) uint8 of a box; its
    exceptions propagate. `layout`: planes of these maps.
    """
    values = [sharpness(maps[layout.hematoxylin], maps[layout.NP] >= layout.NP_NEAR) for maps in map(read, fields)]
    return [value for value in values if value is not None]


def sharpness(hematoxylin: NDArray[np.uint8], near: NDArray[np.bool_]) -> float | None:
    """Return the sharpness of the nuclei of a field; None if too few pixels are near nuclei.

    It is about 2 in a sharp field, 0.5 in a blurred one, and 0 in a uniform one. The field is first reduced to means of
    2 × 2 inference pixels, so that 20× and 40× scans can be compared. The sharpness is the square root of the energy of
    the Laplacian divided by the energy of the gradient, both without the part that comes from rounding the densities.
    It measures the mean spatial frequency, and does not depend on contrast and stain. At least 200 reduced pixels near
    nuclei are needed.

    `hematoxylin`: stored optical densities, (y, x) uint8 in inference pixels. `near`: whether a pixel is near a
    nucleus, where densities are stored, (y, x) bool.
    """
    height, width = (extent // _BINNING for extent in near.shape)
    if not height * width:
        return None

    def binned(plane: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return the means of squares of _BINNING pixels."""
        whole = np.ascontiguousarray(plane[: height * _BINNING, : width * _BINNING], np.float32)
        return np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA), np.float32)

    density = binned(hematoxylin)
    stored = (binned(near) == 1).astype(np.uint8)
    # The neighbours of every pixel that counts must be stored, too; elsewhere the maps are zero.
    inner = cv2.erode(stored, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=(0,)) > 0
    pixels = np.count_nonzero(inner)
    if pixels < _MIN_PIXELS:
        return None
    laplacian = cv2.Laplacian(density, cv2.CV_32F)[inner].astype(np.float64)
    across = cv2.Sobel(density, cv2.CV_32F, 1, 0)[inner].astype(np.float64) / 8
    down = cv2.Sobel(density, cv2.CV_32F, 0, 1)[inner].astype(np.float64) / 8
    # Energy from rounding to whole steps: the variance of a step, 1 / 12, times the squares of the kernels' weights.
    rounding = pixels / 12 / _BINNING**2
    laplacian_energy = float((laplacian**2).sum()) - 20 * rounding
    gradient_energy = float((across**2 + down**2).sum()) - 0.375 * rounding
    return float(np.sqrt(max(0.0, laplacian_energy) / gradient_energy)) if gradient_energy > 0 else 0.0
