"""Make the pictures inside a page, as data URIs: density heatmaps, and smaller copies of a run's JPEGs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hover_batch.report.charts import nice_ceiling
from hover_batch.report.measure import Measured
from hover_batch.slide.tissue import TissueMask
from hover_batch.taxonomy import NucleusClass

_QUALITY = 75


@dataclass(frozen=True)
class Heatmap:
    """Density of one class as a picture."""

    kind: NucleusClass | None
    """Class that is shown; None for all classes together."""
    picture: str
    """PNG data URI, one pixel per cell."""
    top: float | None
    """Nuclei per mm² from which on the brightest colour is used; None if there are no nuclei."""


def heatmaps(measured: Measured, classes: Sequence[NucleusClass], tissue: TissueMask | None) -> list[Heatmap]:
    """Return a density heatmap of all classes together, then one of each of `classes`.

    Cells with neither tissue nor nuclei are transparent. If `tissue` is None, all cells are opaque.

    `measured`: counts by class and cell. `classes`: classes of nuclei, without the background. `tissue`: where the run
    searched for nuclei; None if unknown.
    """
    cells = measured.cells
    shown = np.ones(cells.shape, bool) if tissue is None else tissue.meets_product(*cells.spans, cells.grid)
    return [
        _heatmap(kind, (measured.counts[kind.id] if kind else measured.counts.sum(axis=0)) / cells.mm2, shown)
        for kind in (None, *classes)
    ]


def _heatmap(kind: NucleusClass | None, density: NDArray[np.float64], shown: NDArray[np.bool_]) -> Heatmap:
    """Draw one heatmap. `density`: nuclei per mm², and `shown`: whether it is tissue, of each cell (rows, columns)."""
    taken = density[density > 0]
    # Not the maximum: one crowded cell, or one that is cut to a sliver, would leave all others dark.
    top = nice_ceiling(float(np.quantile(taken, 0.99))) if taken.size else None
    grey = np.rint(np.minimum(density / (top or 1), 1) * 255).astype(np.uint8)
    bgr = cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)
    alpha = np.where(shown | (density > 0), 255, 0).astype(np.uint8)
    return Heatmap(kind, data_uri(np.dstack([bgr, alpha]), ".png"), top)


def reduced_picture(path: Path, max_side: int) -> str | None:
    """Return the picture at `path` as a JPEG data URI, reduced so that its longer side has at most `max_side` pixels.

    It is never enlarged. None if the file is missing or corrupted.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR) if path.is_file() else None
    if image is None:
        return None
    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))  # the slide may be a thin strip
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return data_uri(np.asarray(image, np.uint8), ".jpg")


def data_uri(image: NDArray[np.uint8], suffix: str) -> str:
    """Return an image as a data URI in PNG or JPEG format.

    `image`: BGR (y, x, 3) uint8 or, for .png only, BGRA (y, x, 4) uint8. `suffix`: .png or .jpg.
    """
    # Full chroma: the usual half resolution smears thin contours into their neighbours.
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    settings = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY, *sampling] if suffix == ".jpg" else []
    _, encoded = cv2.imencode(suffix, image, settings)
    kind = {".jpg": "jpeg", ".png": "png"}[suffix]
    return f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}"
