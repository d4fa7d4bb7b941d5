"""Tissue mask of a slide: detected on a low-resolution picture of it, or given with the cohort."""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
import shapely.geometry
from numpy.typing import NDArray

from hover_batch.cohort.record import SlideRecord
from hover_batch.config import TissueSettings
from hover_batch.errors import InputError, SlideError
from hover_batch.geometry import Box, Grid, Mpp, Size, qupath_origin
from hover_batch.slide.given_mask import MAX_MASK_SIDE, given_mask
from hover_batch.slide.headers import SlideInfo
from hover_batch.slide.reader import SlideReader, whole_grid

GIVEN_MPP = 2.0
"""Pixel size in µm at which polygons from the cohort are rasterised; it affects which nuclei are in the table."""

SMALL_CANVAS_MM2 = 1.0
"""Area below which a canvas is taken for a tile cut from a slide, without a background to detect."""

_SMALL_CANVAS_TISSUE = 0.02
_SPARSE = 0.25
"""Stained share of a small canvas below which a warning says that its area includes glass."""
_CLOSING_UM = 24.0
_CHROMA = (10, 22)
# Otsu's threshold is limited to this range: glass stays below 10 after white balance, and stained tissue is rarely
# paler than 22, so that a picture of tissue alone is not split in two.
_PEN_GREEN = 12


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Tissue mask that spans the canvas of a slide exactly."""

    array: NDArray[np.bool_]
    """Mask (y, x), True on tissue."""
    level0_per_pixel: tuple[float, float]
    """Level-0 pixels per mask pixel: (x, y)."""
    given: bool = False
    """Whether the user supplied the mask, so that nuclei outside it are removed."""
    stained: float | None = None
    """Stained share (0 to 1) of a small canvas whose tissue was detected; otherwise None."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the user: one if the mask is a small canvas of which little is stained, otherwise none."""
        if self.stained is None or not _SMALL_CANVAS_TISSUE <= self.stained < _SPARSE:
            return ()
        return (
            f"only {self.stained:.0%} of the picture is stained, but pictures below {SMALL_CANVAS_MM2:g} mm² count as "
            "tissue as a whole, so densities include glass; give the tissue's outline as mask_path",
        )

    def meets(self, box: Box, grid: Grid) -> bool:
        """Return whether there is any tissue in `box`; False outside of the canvas.

        `box`: in pixels of `grid`. `grid`: inference grid of the slide.
        """
        return bool(self.meets_product([(box.x0, box.x1)], [(box.y0, box.y1)], grid)[0, 0])

    def meets_product(
        self, columns: list[tuple[int, int]], rows: list[tuple[int, int]], grid: Grid
    ) -> NDArray[np.bool_]:
        """Return whether there is any tissue where each row span crosses each column span, as bool (row, column).

        `columns`, `rows`: spans [start, stop) along x and y, in pixels of `grid`; outside of the canvas, there is no
        tissue. `grid`: inference grid of the slide.
        """
        x0, x1 = _pixels(columns, grid.scale_x / self.level0_per_pixel[0], self.array.shape[1])
        y0, y1 = _pixels(rows, grid.scale_y / self.level0_per_pixel[1], self.array.shape[0])
        found = np.zeros((len(rows), len(columns)), bool)
        for index, (top, bottom) in enumerate(zip(y0, y1, strict=True)):
            columns_before = np.concatenate([[0], self.array[top:bottom].any(axis=0).cumsum()])
            found[index] = columns_before[x1] > columns_before[x0]
        return found

    def contains(self, x: NDArray[np.floating[Any]], y: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Return whether each position lies on tissue, as a bool array of the shape of `x` and `y`.

        Positions outside of the canvas do not lie on tissue.

        `x`, `y`: positions in level-0 pixels, arrays of the same shape.
        """
        column = np.floor(np.asarray(x) / self.level0_per_pixel[0]).astype(np.int64)
        row = np.floor(np.asarray(y) / self.level0_per_pixel[1]).astype(np.int64)
        height, width = self.array.shape
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        found: NDArray[np.bool_] = inside & self.array[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
        return found

    def area_mm2(self, slide_mpp: Mpp) -> float:
        """Return the area of the tissue in mm². `slide_mpp`: size of a level-0 pixel in µm."""
        pixel_um2 = self.level0_per_pixel[0] * slide_mpp.x * self.level0_per_pixel[1] * slide_mpp.y
        return float(np.count_nonzero(self.array) * pixel_um2 / 1e6)

    def polygons(self) -> shapely.MultiPolygon:
        """Return the outline of the tissue in level-0 pixels, along the edges of the mask pixels.

        It is empty if there is no tissue. It has the same area as the tissue pixels of the mask.
        """
        padded = np.pad(self.array, 1).astype(np.int8)
        # Edges between tissue and background, as segments from (x, y) to (x, y).
        horizontal = _runs(np.diff(padded, axis=0)[:, 1:-1])  # (y, first x, last x)
        vertical = _runs(np.diff(padded, axis=1)[1:-1].T)  # (x, first y, last y)
        segments = np.concatenate(
            [
                np.stack([horizontal[:, [1, 0]], horizontal[:, [2, 0]]], axis=1),
                np.stack([vertical[:, [0, 1]], vertical[:, [0, 2]]], axis=1),
            ]
        ).astype(float)
        lines: Any = shapely.linestrings(segments)
        faces = shapely.get_parts(shapely.polygonize(lines))
        # Faces are tissue or holes in it; a point inside each shows which.
        points = shapely.get_coordinates(shapely.point_on_surface(faces)).astype(np.int64)
        tissue = faces[self.array[points[:, 1], points[:, 0]]]
        scale = np.array(self.level0_per_pixel)
        return shapely.MultiPolygon(list(shapely.transform(tissue, lambda xy: xy * scale)))

    def write_geojson(self, path: Path, bounds: Box | None = None) -> None:
        """Write the outline to `path` as a GeoJSON FeatureCollection for QuPath; an existing file is replaced.

        It has one annotation of the class Tissue, or none if there is no tissue. Positions are in level-0 pixels from
        the corner of `bounds`, as the QuPath export of nuclei writes them.

        `bounds`: the slide's non-empty region in level-0 pixels; None if it has none. Positions then start at the
        corner of the canvas.

        OSError if the file cannot be written.
        """
        origin = qupath_origin(bounds)
        outline = shapely.transform(self.polygons(), lambda points: points - origin)
        feature = {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, "hover-batch:tissue")),
            "geometry": shapely.geometry.mapping(outline),
            "properties": {"objectType": "annotation", "classification": {"name": "Tissue", "color": [0, 160, 0]}},
        }
        collection = {"type": "FeatureCollection", "features": [] if outline.is_empty else [feature]}
        path.write_text(json.dumps(collection))


def tissue_mask(reader: SlideReader, record: SlideRecord, settings: TissueSettings) -> TissueMask:
    """Return the tissue mask of a slide.

    If the slide's row of the cohort gives a mask, the result is that mask, with `given` set; its polygons are drawn
    with pixels of GIVEN_MPP. Otherwise the result depends on `settings.tissue`: tissue is detected if it is "auto", and
    the whole canvas counts as tissue if it is "all".

    Tissue is detected by its colour relative to the slide's own background. Grey, black, and green or blue pen are
    excluded, but red pen is not. Gaps up to about 48 µm wide are closed, pieces smaller than `settings.min_tissue_um2`
    are removed, and smaller holes are filled. A canvas below 1 mm² is tissue as a whole if at least 2 % of it is
    stained, and otherwise not at all.

    `reader`: open reader of the slide. `record`: row of the slide in the cohort. `settings`: settings of the tissue
    mask.

    SlideError if the row's mask cannot be used on this slide, or the pixels cannot be read.
    """
    info = reader.info
    if record.mask_path is not None:
        try:
            return read_given_mask(record.mask_path, info)
        except InputError as error:  # not found before the run if the slide is in cloud storage: only this slide fails
            raise SlideError(str(error)) from error
    if settings.tissue == "all":
        return TissueMask(np.ones((1, 1), bool), (float(info.level0.width), float(info.level0.height)))
    return detect_tissue(reader, settings)


def read_given_mask(path: Path, info: SlideInfo) -> TissueMask:
    """Return the mask that the cohort gives in the file `path` for the slide of `info`.

    Errors of `given_mask` propagate.
    """
    array = given_mask(path, info.level0, info.bounds, _mask_scale(info.level0, info.mpp, GIVEN_MPP))
    return TissueMask(array, (info.level0.width / array.shape[1], info.level0.height / array.shape[0]), given=True)


def detect_tissue(reader: SlideReader, settings: TissueSettings) -> TissueMask:
    """Return the tissue of a slide, detected by its colour; see `tissue_mask`.

    The pixels of the mask have sides of `settings.mask_mpp` µm. They are larger if a side of the mask would otherwise
    be longer than MAX_MASK_SIDE pixels, and never smaller than those of the slide.

    `reader`: open reader of the slide. `settings`: settings of the tissue mask; its mode `tissue` is ignored.

    SlideError if the pixels cannot be read.
    """
    info = reader.info
    grid = whole_grid(info, _mask_scale(info.level0, info.mpp, settings.mask_mpp))
    coloured = _coloured(reader.read(grid.size.box, grid))
    canvas_mm2 = info.level0.width * info.mpp.x * info.level0.height * info.mpp.y / 1e6
    if canvas_mm2 < SMALL_CANVAS_MM2:
        scanned = info.bounds or info.level0.box
        rows = slice(math.floor(scanned.y0 / grid.scale_y), math.ceil(scanned.y1 / grid.scale_y))
        columns = slice(math.floor(scanned.x0 / grid.scale_x), math.ceil(scanned.x1 / grid.scale_x))
        array, stained = np.zeros(coloured.shape, bool), float(coloured[rows, columns].mean())
        array[rows, columns] = stained >= _SMALL_CANVAS_TISSUE
        return TissueMask(array, (grid.scale_x, grid.scale_y), stained=stained)
    pixel_um2 = grid.mpp.x * grid.mpp.y
    array = _tidy(coloured, math.sqrt(pixel_um2), settings.min_tissue_um2 / pixel_um2)
    return TissueMask(array, (grid.scale_x, grid.scale_y))


def _mask_scale(level0: Size, mpp: Mpp, mask_mpp: float) -> float:
    """Return the number of level-0 pixels per mask pixel."""
    return max(1.0, mask_mpp / min(mpp.x, mpp.y), max(level0.width, level0.height) / MAX_MASK_SIDE)


def _coloured(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return the stained pixels of an RGB (y, x, 3) picture: more colourful than glass, and not green or blue ink."""
    balanced = cv2.LUT(picture, _white_balance(picture))
    red, green, blue = cv2.split(balanced)
    chroma = cv2.subtract(cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue))
    otsu, _ = cv2.threshold(chroma, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    threshold = min(max(otsu, _CHROMA[0]), _CHROMA[1])
    # Hematoxylin and eosin both absorb green most, so pixels greener than red are ink.
    ink = cv2.subtract(green, red) > _PEN_GREEN
    found: NDArray[np.bool_] = (chroma > threshold) & ~ink
    return found


def _white_balance(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a table (1, 256, 3) that makes the glass white: bright, nearly grey, at least 1 % of the picture."""
    low, high = picture.min(axis=2), picture.max(axis=2)
    glass = picture[(low > 200) & (high - low < 20)]
    white = np.median(glass, axis=0) if len(glass) >= 0.01 * low.size else np.full(3, 255.0)
    table = np.arange(256)[:, None] * (255 / white)
    return np.clip(np.rint(table), 0, 255).astype(np.uint8)[None]


def _tidy(tissue: NDArray[np.bool_], pixel_um: float, min_pixels: float) -> NDArray[np.bool_]:
    """Close gaps, then drop pieces and fill holes smaller than `min_pixels`."""
    radius = round(_CLOSING_UM / pixel_um)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    closed = np.asarray(cv2.morphologyEx(tissue.astype(np.uint8), cv2.MORPH_CLOSE, kernel), np.uint8)
    pieces = _large_pieces(closed, min_pixels, and_at_border=False)
    return ~_large_pieces((~pieces).astype(np.uint8), min_pixels, and_at_border=True)


def _large_pieces(mask: NDArray[np.uint8], min_pixels: float, *, and_at_border: bool) -> NDArray[np.bool_]:
    """Return the connected pieces of at least `min_pixels`, and optionally those at the border, which are not holes."""
    # 4-connected background is the complement of 8-connected tissue.
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4 if and_at_border else 8)
    chosen = stats[:, cv2.CC_STAT_AREA] >= min_pixels
    if and_at_border:
        left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
        right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
        chosen |= (left == 0) | (top == 0) | (right == mask.shape[1]) | (bottom == mask.shape[0])
    chosen[0] = False
    found: NDArray[np.bool_] = chosen[labels]
    return found


def _pixels(spans: list[tuple[int, int]], scale: float, extent: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and one-past-last mask pixel under each span, clipped to the mask."""
    edges = np.array(spans, float).reshape(-1, 2) * scale
    # A sliver of a millionth of a pixel is rounding.
    first = np.floor(edges[:, 0] + 1e-6).astype(np.int64)
    last = np.where(edges[:, 1] > edges[:, 0], np.ceil(edges[:, 1] - 1e-6), first).astype(np.int64)
    start = np.clip(first, 0, extent)
    return start, np.maximum(start, np.clip(last, 0, extent))


def _runs(steps: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return the line, start and stop of each run of equal nonzero values along the second axis: (n, 3).

    The sign of a step shows on which side tissue lies. A run ends where the sign changes, which is where two corners
    touch.
    """
    edges = np.pad(steps, ((0, 0), (1, 1)))
    change = np.diff(edges, axis=1) != 0
    start_line, start = np.nonzero(change & (edges[:, 1:] != 0))
    _, stop = np.nonzero(change & (edges[:, :-1] != 0))
    return np.stack([start_line, start, stop], axis=1).astype(np.int64)
