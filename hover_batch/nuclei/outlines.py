"""Outlines: a closed ring through the centres of each instance's border pixels, always a valid polygon.

Nearly all instances are one piece whose border visits no pixel twice. Their border is followed in place and equals that
of `cv2.findContours(…, RETR_EXTERNAL, CHAIN_APPROX_SIMPLE)` for the crop: the same start, direction and corners.
Such a ring is valid without a test, since a border that visits no pixel twice cannot cross itself: two diagonal steps
would have to cross within a block of four pixels that all belong to the instance, and there border following never
steps diagonally without visiting one of the block's other pixels twice. `_repaired` handles all other instances.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import shapely
from numba import njit
from numpy.typing import NDArray

_DX = np.array([1, 1, 0, -1, -1, -1, 0, 1], np.int64)
_DY = np.array([0, -1, -1, -1, 0, 1, 1, 1], np.int64)
"""Offsets of the eight neighbours, counter-clockwise on the screen from the right (y points down)."""


def outlines(
    instances: NDArray[np.int32],
    bounds: NDArray[np.int64],
    anchor_x: NDArray[np.int64],
    area: NDArray[np.int64],
    origin: tuple[int, int],
) -> list[NDArray[np.float64]]:
    """Return the outline of each instance 1 … n: a closed, valid ring (k, 2) float64 of x, y, in the order of the ids.

    If an instance has several parts, the largest is outlined; parts one pixel wide have no area. The outline of an
    instance without any area is the bounding rectangle of its pixels, edges included.

    `instances` (y, x) int32: instance map. `bounds` (n, 4): x0, y0, x1, y1 of each instance, half-open. `anchor_x`
    (n,): column of its first pixel in raster order. `area` (n,): its number of pixels. `origin`: (x, y), added to all
    points.
    """
    # A column of a table is contiguous if it has one row. Numba would compile another function for that.
    points, ends, plain = _follow(instances, bounds, np.ascontiguousarray(anchor_x), np.ascontiguousarray(area))
    ring_points = points + (np.array(origin) + 0.5)
    starts = np.concatenate([[0], ends])[:-1]
    rings = [ring_points[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    # Rings that are not plain are empty so far.
    to_repair = np.flatnonzero(~plain).tolist()
    crops = [np.s_[y0:y1, x0:x1] for x0, y0, x1, y1 in bounds[to_repair].tolist()]
    repaired = _repaired([instances[crop] == i + 1 for i, crop in zip(to_repair, crops, strict=True)])
    for i, ring in zip(to_repair, repaired, strict=True):
        rings[i] = ring + (bounds[i, :2] + origin)
    return rings


def _repaired(masks: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.float64]]:
    """Return valid rings (k, 2) of x, y of instances of any shape, from the masks (y, x) of their bounding boxes."""
    rings: list[NDArray[np.float64]] = []
    corners: list[NDArray[np.int32]] = []
    mask_of: list[int] = []
    for i, mask in enumerate(masks):
        height, width = mask.shape
        rings.append(np.array([[0, 0], [width, 0], [width, height], [0, height], [0, 0]], np.float64))
        found, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        large = [np.asarray(contour[:, 0], np.int32) for contour in found if len(contour) >= 3]
        corners += large
        mask_of += [i] * len(large)
    if not corners:
        return rings
    lengths = [len(contour) for contour in corners]
    closed = shapely.linearrings(np.concatenate(corners) + 0.5, indices=np.repeat(np.arange(len(corners)), lengths))
    polygons = np.asarray(shapely.polygons(closed), object)
    invalid = ~shapely.is_valid(polygons)
    polygons[invalid] = shapely.make_valid(polygons[invalid])
    # make_valid returns a polygon, a multipolygon, or a collection with lines and both: hence parts of parts.
    parts, polygon_of = shapely.get_parts(polygons, return_index=True)
    parts, part_of = shapely.get_parts(parts, return_index=True)
    area = shapely.area(parts)  # 0 of lines and points
    largest = np.zeros(len(masks))
    for k, polygon in enumerate(polygon_of[part_of].tolist()):
        i = mask_of[polygon]
        if area[k] > largest[i]:
            largest[i] = area[k]
            rings[i] = shapely.get_coordinates(shapely.get_exterior_ring(parts[k]))
    return rings


@njit(cache=True, nogil=True)
def _follow(
    instances: NDArray[np.int32], bounds: NDArray[np.int64], anchor_x: NDArray[np.int64], area: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
    """Return the corners (k, 2) x, y of all plain rings, concatenated and closed; their ends (n,); which are plain.

    Border following after Suzuki and Abe (1985), from the anchor. A ring is plain if it visits no pixel twice and
    encloses the whole instance. By Pick's theorem a ring of area A with B border pixels contains A + B / 2 + 1 pixels.
    If that equals the instance's area, all its pixels are inside; if it is larger, there are holes, and
    `_is_one_piece` decides.
    """
    n = len(bounds)
    room = 0
    for i in range(n):
        room = max(room, (bounds[i, 2] - bounds[i, 0]) * (bounds[i, 3] - bounds[i, 1]))
    seen = np.zeros(room, np.bool_)
    points = np.empty((32 * n + 16, 2), np.int32)
    ends = np.zeros(n, np.int64)
    plain = np.zeros(n, np.bool_)
    size = 0
    for i in range(n):
        x0, y0, x1, y1 = bounds[i]
        width, height = x1 - x0, y1 - y0
        own = instances[y0:y1, x0:x1]
        start = size
        start_x = anchor_x[i] - x0
        x, y, last = start_x, 0, -1
        # No pixel precedes the first in raster order, so the border returns from one of these four directions.
        for d in (5, 6, 7, 0):
            nx, ny = x + _DX[d], y + _DY[d]
            if 0 <= nx < width and ny < height and own[ny, nx] == i + 1:
                last = d
        doubled_area, steps, twice = 0, 0, last < 0
        back = last
        while not twice:
            if seen[y * width + x]:
                twice = True
                break
            seen[y * width + x] = True
            d = (back + 1) % 8
            while True:
                nx, ny = x + _DX[d], y + _DY[d]
                if 0 <= nx < width and 0 <= ny < height and own[ny, nx] == i + 1:
                    break
                d = (d + 1) % 8
            if d != (back + 4) % 8:
                if size + 2 >= len(points):
                    longer = np.empty((2 * len(points), 2), np.int32)
                    longer[:size] = points[:size]
                    points = longer
                points[size, 0], points[size, 1] = x + x0, y + y0
                size += 1
            doubled_area += x * _DY[d] - y * _DX[d]
            steps += 1
            x, y, back = nx, ny, (d + 4) % 8
            if x == start_x and y == 0 and back == last:
                break
        seen[: width * height] = False
        pixels = (abs(doubled_area) + steps) // 2 + 1
        if not twice and size - start >= 3 and pixels >= area[i]:
            plain[i] = pixels == area[i] or _is_one_piece(own, i + 1, start_x, area[i], seen)
        if plain[i]:
            points[size] = points[start]
            size += 1
        else:
            size = start
        ends[i] = size
    return points[:size], ends, plain


@njit(cache=True, nogil=True)
def _is_one_piece(own: NDArray[np.int32], i: int, start_x: int, area: int, seen: NDArray[np.bool_]) -> bool:
    """Whether all `area` pixels of instance `i` in its bounding box (y, x) are 8-connected.

    `start_x`: column of one of them in the first row. `seen` is a work buffer, all False before and after.
    """
    height, width = own.shape
    waiting = np.empty(area, np.int64)
    waiting[0] = start_x
    seen[start_x] = True
    done, found = 0, 1
    while done < found:
        y, x = waiting[done] // width, waiting[done] % width
        done += 1
        for ny in range(max(0, y - 1), min(height, y + 2)):
            for nx in range(max(0, x - 1), min(width, x + 2)):
                if own[ny, nx] == i and not seen[ny * width + nx]:
                    seen[ny * width + nx] = True
                    waiting[found] = ny * width + nx
                    found += 1
    seen[: width * height] = False
    return found == area
