"""Energy landscape from exact 21×21 Sobel maps of h and v, computed row by row.

HoVerNet's Sobel filter is separable: binomial weights of order 20 across the direction, their differences along it. On
stored bytes a column sum stays below 2^31 (127·2^20) and the total below 2^53, so int32 and then float64 hold every sum
without rounding. The order of additions does not matter, and the result equals `cv2.Sobel(…, cv2.CV_64F, ksize=21)` bit
for bit, at a tenth of its cost. Borders are reflected about the outermost pixels (OpenCV's BORDER_REFLECT_101).
"""

from __future__ import annotations

import cv2
import numpy as np
from numba import njit
from numpy.typing import NDArray

from hover_batch.model.heads import MapLayout

SOBEL_SIZE = 21
SOBEL_RADIUS = SOBEL_SIZE // 2
HV_STEPS = 127
"""Stored integer steps per unit of h and v."""

_BINOMIAL = np.array([184756, 167960, 125970, 77520, 38760, 15504, 4845, 1140, 190, 20, 1], np.int64)
"""Weights at distances 0 … 10 across the direction; equal on both sides."""
_DIFFERENCE = np.array([0, 16796, 25194, 23256, 15504, 7752, 2907, 798, 152, 18, 1], np.int64)
"""Weights at distances 0 … 10 along the direction; negated before the centre."""
_ACROSS, _ALONG = _BINOMIAL.astype(np.int32), _DIFFERENCE.astype(np.int32)
_ACROSS_F64, _ALONG_F64 = _BINOMIAL.astype(np.float64), _DIFFERENCE.astype(np.float64)


def sobel_extremes(h: NDArray[np.uint8], v: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the extremes (4,) float64 of two Sobel maps: minimum and maximum of Sobel_x(h), then of Sobel_y(v).

    `h`, `v` (y, x): a window of stored maps. The values are in stored steps.
    """
    r = SOBEL_RADIUS
    around = [cv2.copyMakeBorder(np.ascontiguousarray(p), r, r, r, r, cv2.BORDER_REFLECT_101) for p in (h, v)]
    return np.asarray(_extremes(*(plane.view(np.int8) for plane in around)), np.float64)


@njit(cache=True, nogil=True)
def energy_around(
    h: NDArray[np.int8],
    v: NDArray[np.int8],
    inside: NDArray[np.bool_],
    labels: NDArray[np.int32],
    box: tuple[int, int, int, int],
    scales: tuple[float, float],
    lows: tuple[float, float],
) -> NDArray[np.float32]:
    """Return the energy landscape of a box x0, y0, x1, y1 and one pixel around it: (y1 - y0 + 2, x1 - x0 + 2) float32.

    It is max(1 - Sobel_x(h), 1 - Sobel_y(v), 0) of the scaled Sobel maps, which is high where the distances to the
    centroid jump from one nucleus to the next. `h`, `v` (y, x): stored maps of a window. A Sobel sum s is scaled to
    s·scale - low; the first of `scales` and `lows` is for h, the second for v. `labels` (y, x): component of each
    pixel; `inside` (n,): whether a component belongs to the foreground. The energy of all other pixels is 1: the
    reference masks them later, with the same effect. Beyond the window's edge it is reflected.
    """
    height, width = labels.shape
    x0, y0, x1, y1 = box
    rows, columns = y1 - y0 + 2, x1 - x0 + 2
    near_h = _cut(h, x0 - 1 - SOBEL_RADIUS, y0 - 1 - SOBEL_RADIUS, columns + 2 * SOBEL_RADIUS, rows + 2 * SOBEL_RADIUS)
    near_v = _cut(v, x0 - 1 - SOBEL_RADIUS, y0 - 1 - SOBEL_RADIUS, columns + 2 * SOBEL_RADIUS, rows + 2 * SOBEL_RADIUS)
    energy = np.ones((rows, columns), np.float32)
    sums = np.empty(columns + 2 * SOBEL_RADIUS, np.int32)
    along_x, along_y = np.empty(columns), np.empty(columns)
    one = np.float32(1)
    # Without the columns and rows that lie outside of the window.
    left, right = max(0, 1 - x0), min(columns, width + 1 - x0)
    for row in range(max(0, 1 - y0), min(rows, height + 1 - y0)):
        here = labels[y0 - 1 + row, x0 - 1 + left : x0 - 1 + right]
        row_is_empty = True
        for label in here:
            if inside[label]:
                row_is_empty = False
                break
        if row_is_empty:
            continue
        _sobel_row(near_h, near_v, row + SOBEL_RADIUS, sums, along_x, along_y)
        for x in range(left, right):
            if inside[here[x - left]]:
                slope_x = one - np.float32(along_x[x] * scales[0] - lows[0])
                slope_y = one - np.float32(along_y[x] * scales[1] - lows[1])
                energy[row, x] = max(slope_x, slope_y, np.float32(0))
    if y0 == 0:
        energy[0] = energy[_mirrored(-1, height) + 1]
    if y1 == height:
        energy[-1] = energy[_mirrored(height, height) - y0 + 1]
    if x0 == 0:
        energy[:, 0] = energy[:, _mirrored(-1, width) + 1]
    if x1 == width:
        energy[:, -1] = energy[:, _mirrored(width, width) - x0 + 1]
    return energy


def mask_hv(maps: NDArray[np.uint8]) -> None:
    """Zero h and v, in place, where no energy of the foreground depends on them: beyond the reach of its Sobel filters.

    `maps` (plane, y, x) uint8: a unit (see MapLayout). A band along its edges, as wide as the reach, keeps its values
    for the foreground of neighbouring units. Do not use it if Sobel maps will be scaled by the extremes of windows,
    which include the background.
    """
    foreground = (maps[MapLayout.NP] >= MapLayout.NP_NUCLEUS).view(np.uint8)
    near = cv2.dilate(foreground, np.ones((SOBEL_SIZE, SOBEL_SIZE), np.uint8))
    for edge in (near[:SOBEL_RADIUS], near[-SOBEL_RADIUS:], near[:, :SOBEL_RADIUS], near[:, -SOBEL_RADIUS:]):
        edge[:] = 1
    maps[MapLayout.H] *= near
    maps[MapLayout.V] *= near


@njit(cache=True, nogil=True)
def _mirrored(i: int, n: int) -> int:
    """Return the index in [0, n) of a position that may lie beyond the edge, reflected: … 2 1 0 1 2 …"""
    if 0 <= i < n:
        return i
    if n == 1:
        return 0
    i %= 2 * (n - 1)
    return i if i < n else 2 * (n - 1) - i


@njit(cache=True, nogil=True)
def _cut(plane: NDArray[np.int8], x0: int, y0: int, width: int, height: int) -> NDArray[np.int8]:
    """Return a copy (height, width) of a part of a plane, reflected beyond the plane's edges."""
    cut = np.empty((height, width), np.int8)
    of_plane = np.array([_mirrored(x0 + x, plane.shape[1]) for x in range(width)])
    for y in range(height):
        row = plane[_mirrored(y0 + y, plane.shape[0])]
        for x in range(width):
            cut[y, x] = row[of_plane[x]]
    return cut


@njit(cache=True, nogil=True)
def _down_columns(
    plane: NDArray[np.int8], y: int, weights: NDArray[np.int32], sign: int, out: NDArray[np.int32]
) -> None:
    """Write the weighted sums of the 21 rows around row `y` to `out` (x,) int32; `sign` multiplies the rows above."""
    width = plane.shape[1]
    middle = plane[y]
    for x in range(width):
        out[x] = np.int32(weights[0] * middle[x])
    for k in range(1, SOBEL_RADIUS, 2):
        near, far = np.int32(weights[k]), np.int32(weights[k + 1])
        a, b = plane[y - k], plane[y + k]
        c, d = plane[y - k - 1], plane[y + k + 1]
        # Cast at every step: numba widens to int64 otherwise, and half as many values fit a register.
        if sign > 0:
            for x in range(width):
                pairs = np.int32(near * np.int32(b[x] + a[x])) + np.int32(far * np.int32(d[x] + c[x]))
                out[x] = np.int32(out[x] + np.int32(pairs))
        else:
            for x in range(width):
                pairs = np.int32(near * np.int32(b[x] - a[x])) + np.int32(far * np.int32(d[x] - c[x]))
                out[x] = np.int32(out[x] + np.int32(pairs))


@njit(cache=True, nogil=True)
def _along_row(sums: NDArray[np.int32], weights: NDArray[np.float64], sign: int, out: NDArray[np.float64]) -> None:
    """Write the weighted sums of 21 neighbours in `sums` (x + 20,) to `out` (x,); `sign` multiplies those before the
    centre."""
    width = len(out)
    middle = sums[SOBEL_RADIUS : SOBEL_RADIUS + width]
    for x in range(width):
        out[x] = weights[0] * middle[x]
    for k in range(1, SOBEL_RADIUS, 2):
        near, far = weights[k], weights[k + 1]
        a, b = sums[SOBEL_RADIUS - k :][:width], sums[SOBEL_RADIUS + k :][:width]
        c, d = sums[SOBEL_RADIUS - k - 1 :][:width], sums[SOBEL_RADIUS + k + 1 :][:width]
        if sign > 0:
            for x in range(width):
                out[x] += near * np.float64(np.int32(b[x] + a[x])) + far * np.float64(np.int32(d[x] + c[x]))
        else:
            for x in range(width):
                out[x] += near * np.float64(np.int32(b[x] - a[x])) + far * np.float64(np.int32(d[x] - c[x]))


@njit(cache=True, nogil=True)
def _sobel_row(
    h: NDArray[np.int8],
    v: NDArray[np.int8],
    y: int,
    sums: NDArray[np.int32],
    along_x: NDArray[np.float64],
    along_y: NDArray[np.float64],
) -> None:
    """Write row `y` of Sobel_x(h) and Sobel_y(v) to `along_x` and `along_y` (x,), without the outermost 10 columns.

    `h`, `v` (y, x + 20), with at least 10 rows above and below row `y`. `sums` (x + 20,) is a work buffer.
    """
    _down_columns(h, y, _ACROSS, 1, sums)
    _along_row(sums, _ALONG_F64, -1, along_x)
    _down_columns(v, y, _ALONG, -1, sums)
    _along_row(sums, _ACROSS_F64, 1, along_y)


@njit(cache=True, nogil=True)
def _extremes(h: NDArray[np.int8], v: NDArray[np.int8]) -> NDArray[np.float64]:
    """Return the extremes (4,) of the Sobel maps of `h` and `v`, which have 10 pixels of border on all sides."""
    height, width = h.shape
    sums = np.empty(width, np.int32)
    along_x, along_y = np.empty(width - 2 * SOBEL_RADIUS), np.empty(width - 2 * SOBEL_RADIUS)
    found = np.array([np.inf, -np.inf, np.inf, -np.inf])
    for y in range(SOBEL_RADIUS, height - SOBEL_RADIUS):
        _sobel_row(h, v, y, sums, along_x, along_y)
        low_x, high_x = _least_and_most(along_x)
        low_y, high_y = _least_and_most(along_y)
        found[0], found[1] = min(found[0], low_x), max(found[1], high_x)
        found[2], found[3] = min(found[2], low_y), max(found[3], high_y)
    return found


# No sum is NaN; knowing that, the compiler vectorises the comparisons.
@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _least_and_most(row: NDArray[np.float64]) -> tuple[float, float]:
    least, most = row[0], row[0]
    for value in row:
        least = min(least, value)
        most = max(most, value)
    return least, most
