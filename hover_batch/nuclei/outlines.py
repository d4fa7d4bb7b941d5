"""Outlines: a ring through the centres of each instance's outermost pixels, closed and always a valid polygon.

Nearly all instances are one piece whose border passes no pixel twice. Their border is followed in place, and is what
`cv2.findContours(…, RETR_EXTERNAL, CHAIN_APPROX_SIMPLE)` gives for the crop: the same start, direction and corners.
It needs no test of validity, for a border that passes no pixel twice cannot cross itself: two diagonal steps would
have to cross within a block of four pixels that are all of the instance, and there the follower never steps diagonally
without having met one of the block's other pixels twice. The others are cut out, outlined and mended by `_mended`.
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
"""The eight neighbours, counter-clockwise from the right as one sees them (y runs down)."""


def outlines(
    instances: NDArray[np.int32],
    bounds: NDArray[np.int64],
    anchor_x: NDArray[np.int64],
    area: NDArray[np.int64],
    origin: tuple[int, int],
) -> list[NDArray[np.float64]]:
    """n rings (k, 2) float64 of x, y, closed and valid, of the instances 1 … n in (y, x).

    `bounds` (n, 4): x0, y0, x1, y1; `anchor_x` (n,): column of the first pixel in raster order; `area` (n,): pixels;
    `origin` (x, y) is added. Parts one pixel wide have no area and fall away, of several parts the largest stays; what
    has no area at all becomes the bounding rectangle, edges included.
    """
    points, ends, plain = _follow(instances, bounds, anchor_x, area)
    ring_points = points + (np.array(origin) + 0.5)
    starts = np.concatenate([[0], ends])[:-1]
    rings = [ring_points[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    rest = np.flatnonzero(~plain).tolist()
    crops = [np.s_[y0:y1, x0:x1] for x0, y0, x1, y1 in bounds[rest].tolist()]
    mended = _mended([instances[crop] == i + 1 for i, crop in zip(rest, crops, strict=True)])
    for i, ring in zip(rest, mended, strict=True):
        rings[i] = ring + (bounds[i, :2] + origin)
    return rings


def _mended(masks: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.float64]]:
    """Rings (k, 2) of x, y round instances of whatever shape, each given by the pixels (y, x) of its bounding box."""
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
    # Mending gives a polygon, several, or a collection of lines and several: hence the parts of the parts.
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
    """Corners (k, 2) x, y of all plain rings one after the other, each closed; where each ends (n,); which are plain.

    Suzuki and Abe's border following, from the anchor. A ring is plain if it passes no pixel twice and encloses all
    of the instance. By Pick's theorem it holds A + B / 2 + 1 pixels, B of them on itself: where that is the
    instance's number, all are in it; where it is larger there are holes, and the one piece is counted.
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
        # Before the first pixel in raster order lies nothing: the border comes back from one of these four.
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
    """Whether all `area` pixels of instance `i` in its box (y, x) hang together, diagonals included.

    `start_x`: the column of one of them in the first row. `seen` is room to work in, and is left all False.
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
