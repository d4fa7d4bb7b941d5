"""Draw pictures for people: the thumbnail with the tissue's outline, and nuclei over a field of the slide.

A whole slide with contours is too large to view, so the overlay shows one field at full resolution: the one with the
most nuclei, which `densest_field` finds. The caller reads the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from hover_batch.export.read import read_polygons, unreadable
from hover_batch.geometry import Box, Size
from hover_batch.taxonomy import Rgb, Taxonomy

OUTLINE: Rgb = (0, 90, 200)
"""Colour of the tissue's outline: a blue that does not occur in H&E."""

_SHIFT = 4
"""Fractional bits of the coordinates that OpenCV draws: sixteenths of a pixel."""
_QUALITY = 92
"""Quality of the JPEGs, 0 to 100."""
_LINE = 22
"""Height in pixels of one line of the legend."""


@dataclass(frozen=True)
class View:
    """Picture of a part of a slide, and its position."""

    image: NDArray[np.uint8]
    """RGB (y, x, 3) uint8."""
    x0: float
    """Left edge in level-0 pixels."""
    y0: float
    """Upper edge in level-0 pixels."""
    scale_x: float
    """Level-0 pixels per pixel of the picture, along x."""
    scale_y: float
    """Level-0 pixels per pixel of the picture, along y."""

    def to_opencv(self, points: NDArray[np.float64]) -> NDArray[np.int32]:
        """Return positions as OpenCV's fixed-point coordinates in the image, (…, 2) int32 in sixteenths of a pixel.

        Half a pixel is subtracted, because integers are pixel centres in OpenCV and pixel corners in our positions.

        `points`: (…, 2) of x, y in level-0 pixels.
        """
        pixels = (points - [self.x0, self.y0]) / [self.scale_x, self.scale_y] - 0.5
        return np.rint(pixels * (1 << _SHIFT)).astype(np.int32)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Part of the slide that the picture shows, as (x0, y0, x1, y1) in level-0 pixels."""
        height, width = self.image.shape[:2]
        return self.x0, self.y0, self.x0 + width * self.scale_x, self.y0 + height * self.scale_y


def write_thumbnail(path: Path, view: View, outline: Sequence[NDArray[np.float64]]) -> None:
    """Write `view` to `path` as a JPEG, with the outline of the tissue drawn on it. An existing file is overwritten.

    `outline`: rings of the tissue and its holes, each (k, 2) of x, y in level-0 pixels.

    OSError if the file cannot be written.
    """
    canvas = view.image.copy()
    _draw(canvas, [view.to_opencv(ring) for ring in outline], OUTLINE, thickness=2)
    _write_jpeg(path, canvas)


def write_overlay(path: Path, view: View, nuclei: Path, taxonomy: Taxonomy) -> int:
    """Write `view` to `path` as a JPEG, with the contours of its nuclei. Return the number of nuclei drawn.

    Contours have the colours of their classes. A legend under the picture gives the number of nuclei of each class.
    Nuclei are drawn and counted if their bounding box reaches into the picture. An existing file is overwritten.

    `nuclei`: path of nuclei.parquet. `taxonomy`: classes of the nuclei.

    SlideError if the table is corrupted, OSError if it is missing or the picture cannot be written.
    """
    canvas, counts = contoured(view, nuclei, taxonomy)
    entries = [(f"{kind.name} {counts[kind.id]:,}", kind.color) for kind in taxonomy.nuclei]
    _write_jpeg(path, np.concatenate([canvas, _legend(entries, canvas.shape[1])]))
    return int(counts.sum())


def contoured(view: View, nuclei: Path, taxonomy: Taxonomy) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw the contours of nuclei, in the colours of their classes, on a copy of the image of `view`.

    Return the picture, RGB (y, x, 3) uint8, and the number of nuclei of each class in it, (classes,) int64 by class id.
    A nucleus counts if its bounding box reaches into the picture.

    `nuclei`: path of nuclei.parquet. `taxonomy`: classes of the nuclei.

    SlideError if the table is corrupted, OSError if it is missing.
    """
    polygons, types = _in_view(view, nuclei)
    canvas = view.image.copy()
    for kind in taxonomy.nuclei:
        _draw_polygons(canvas, view, polygons[types == kind.id], kind.color, thickness=1)
    return canvas, np.bincount(types, minlength=len(taxonomy.classes))


def outlined(view: View, nuclei: Path, color: Rgb, thickness: int) -> NDArray[np.uint8]:
    """Return a copy of the image of `view`, RGB (y, x, 3) uint8, with the contours of its nuclei in one colour.

    `nuclei`: path of nuclei.parquet. `color`: colour of the contours, RGB. `thickness`: width of the lines in pixels of
    the picture.

    SlideError if the table is corrupted, OSError if it is missing.
    """
    canvas = view.image.copy()
    _draw_polygons(canvas, view, _in_view(view, nuclei)[0], color, thickness)
    return canvas


def _in_view(view: View, nuclei: Path) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Return the polygons and class ids, each (n,), of the nuclei whose bounding box reaches into `view`."""
    x0, y0, x1, y1 = view.extent
    in_view = (
        (pc.field("bbox", "xmin") < x1)
        & (pc.field("bbox", "xmax") > x0)
        & (pc.field("bbox", "ymin") < y1)
        & (pc.field("bbox", "ymax") > y0)
    )
    # No partitioning: else a folder named key=value would become a column.
    try:
        table = pq.read_table(nuclei, columns=["type_id", "geometry"], filters=in_view, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        if getattr(error, "errno", None):  # such as a missing file; errors of corrupted pages have no number
            raise
        raise unreadable(nuclei, error) from error
    return read_polygons(nuclei, table["geometry"]), table["type_id"].to_numpy()


def _draw_polygons(canvas: NDArray[np.uint8], view: View, polygons: NDArray[Any], color: Rgb, thickness: int) -> None:
    """Draw the contours of polygons in level-0 pixels on the canvas, a copy of the image of `view`."""
    points, ring_of_point = shapely.get_coordinates(polygons, return_index=True)
    starts = np.flatnonzero(np.diff(ring_of_point)) + 1
    _draw(canvas, np.split(view.to_opencv(points), starts), color, thickness)


def densest_field(nuclei: Path, side: int, canvas: Size) -> Box:
    """Return the square of a slide that contains the most nucleus centroids, as a box in level-0 pixels.

    Squares are tried at steps of a quarter of `side`. If several have the same number, the first in raster order is
    returned; without nuclei, the square in the middle of the slide. A square that extends beyond the slide is moved
    inside, and clipped if the slide is smaller.

    `nuclei`: path of nuclei.parquet. `side`: side of the square in level-0 pixels. `canvas`: size of the slide in
    level-0 pixels.

    OSError if the table cannot be read, pyarrow.ArrowInvalid if it is corrupted.
    """
    step = max(1, side // 4)
    counts = np.zeros((-(-canvas.height // step), -(-canvas.width // step)), np.int64)
    with pq.ParquetFile(nuclei) as table:
        for batch in table.iter_batches(columns=["centroid_x", "centroid_y"]):
            x, y = (batch.column(i).to_numpy() // step for i in range(2))
            rows = np.clip(y, 0, counts.shape[0] - 1).astype(np.int64)
            columns = np.clip(x, 0, counts.shape[1] - 1).astype(np.int64)
            np.add.at(counts, (rows, columns), 1)
    if counts.any():
        # Summed-area table, padded so that a square may start at any cell.
        total = np.pad(counts, ((1, 3), (1, 3))).cumsum(axis=0).cumsum(axis=1)
        in_square = total[4:, 4:] - total[:-4, 4:] - total[4:, :-4] + total[:-4, :-4]
        row, column = np.unravel_index(int(in_square.argmax()), in_square.shape)
        x0, y0 = int(column) * step, int(row) * step
    else:
        x0, y0 = (canvas.width - side) // 2, (canvas.height - side) // 2
    x0 = max(0, min(x0, canvas.width - side))
    y0 = max(0, min(y0, canvas.height - side))
    return Box(x0, y0, x0 + side, y0 + side).intersect(canvas.box)


def _draw(canvas: NDArray[np.uint8], rings: Sequence[NDArray[np.int32]], color: Rgb, thickness: int) -> None:
    """Draw closed rings, in fixed-point coordinates, on the canvas."""
    cv2.polylines(canvas, rings, True, color, thickness, lineType=cv2.LINE_AA, shift=_SHIFT)


def _legend(entries: Sequence[tuple[str, Rgb]], width: int) -> NDArray[np.uint8]:
    """Draw a white strip (y, width, 3) uint8 with a coloured square and a text per entry, on one or more lines."""
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.45
    placed: list[tuple[int, int, str, Rgb]] = []
    x, line = 8, 0
    for text, color in entries:
        needed = 20 + cv2.getTextSize(text, font, size, 1)[0][0] + 16
        if x > 8 and x + needed > width:
            x, line = 8, line + 1
        placed.append((x, line * _LINE, text, color))
        x += needed
    strip = np.full(((line + 1) * _LINE, width, 3), 255, np.uint8)
    for x, y, text, color in placed:
        cv2.rectangle(strip, (x, y + 6), (x + 11, y + 17), color, cv2.FILLED)
        cv2.putText(strip, text, (x + 18, y + 16), font, size, (40, 40, 40), 1, cv2.LINE_AA)
    return strip


def _write_jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an RGB image (y, x, 3) uint8 as a JPEG."""
    # Full chroma: the usual half resolution smears one-pixel contours into their neighbours.
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    _, encoded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY, *sampling])
    path.write_bytes(encoded.tobytes())
