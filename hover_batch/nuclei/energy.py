"""Energy landscape from exact 21×21 Sobel maps of h and v, computed row by row.

HoVerNet's Sobel filter is separable: binomial weights of order 20 across the direction of the derivative, and their
differences along it. On stored bytes a column sum stays below 2^31 (127·2^20) and the total below 2^53, so int32 and
then float64 hold every sum without rounding. So the order of additions does not matter, and the result equals
`cv2.Sobel(…, cv2.CV_64F, ksize=21)` bit for bit, at a tenth of its cost. Borders are reflected about the outermost
pixels (OpenCV's BORDER_REFLECT_101).
"""

from __future__ import annotations

import cv2
import numpy as np
from numba import njit
from numpy.typing import NDArray

from hover_batch.model.heads import MapLayout

SOBEL_SIZE = 21
"""Side of the Sobel filter in pixels."""
SOBEL_RADIUS = SOBEL_SIZE // 2
HV_STEPS = 127
"""Stored integer steps per unit of h and v."""

_BINOMIAL = np.array([184756, 167960, 125970, 77520, 38760, 15504, 4845, 1140, 190, 20, 1], np.int64)
"""Weights at distances 0 … 10 across the direction of the derivative; equal on both sides."""
_DIFFERENCE = np.array([0, 16796, 25194, 23256, 15504, 7752, 2907, 798, 152, 18, 1], np.int64)
"""Weights at distances 0 … 10 along the direction of the derivative; negated before the centre."""
_ACROSS, _ALONG = _BINOMIAL.astype(np.int32), _DIFFERENCE.astype(np.int32)
_ACROSS_F64, _ALONG_F64 = _BINOMIAL.astype(np.float64), _DIFFERENCE.astype(np.float64)


def sobel_extremes(h: NDArray[np.uint8], v: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the extremes (4,) float64 of two Sobel maps: minimum and maximum of Sobel_x(h), then of Sobel_y(v).

    The values are in stored steps. `h`, `v` (y, x) uint8: stored planes of a window.
    """
    r = SOBEL_RADIUS
    around = [cv2.copyMakeBorder(np.ascontiguousarray(p), r, r, r, r, cv2.BORDER_REFLECT_101) for p in (h, v)]
    return np.asarray(_extremes(*(plane.view(np.int8) for plane in around)), np.float64)


@njit(cache=True, nogil=True)
def energy_around(
    h: NDArray[np.int8],
    v: NDArray[np.int8],
    foreground: NDArray[np.bool_],
    labels: NDArray[np.int32],
    box: tuple[int, int, int, int],
    scales: tuple[float, float],
    offsets: tuple[float, float],
) -> NDArray[np.float32]:
    """Return the energy landscape of a box and one pixel around it: (y1 - y0 + 2, x1 - x0 + 2) float32.

    It is max(1 - Sobel_x(h), 1 - Sobel_y(v), 0), computed from the scaled Sobel maps. It is high where h and v, the
    distances to the centroid, jump from one nucleus to the next. The energy of pixels outside of the foreground is 1.
    (The reference masks them later, with the same effect.) Beyond the window's edge, the energy is reflected.

    `h`, `v` (y, x): stored planes of a window, viewed as int8. `foreground` (n,): whether each component belongs to the
    foreground. `labels` (y, x): component of each pixel. `box`: x0, y0, x1, y1 in pixels of the window, half-open.
    `scales`, `offsets`: for h and for v; a Sobel sum s is scaled to s·scale - offset.
    """
    height, width = labels.shape
    x0, y0, x1, y1 = box
    rows, columns = y1 - y0 + 2, x1 - x0 + 2
    cut_h = _cut(h, x0 - 1 - SOBEL_RADIUS, y0 - 1 - SOBEL_RADIUS, columns + 2 * SOBEL_RADIUS, rows + 2 * SOBEL_RADIUS)
    cut_v = _cut(v, x0 - 1 - SOBEL_RADIUS, y0 - 1 - SOBEL_RADIUS, columns + 2 * SOBEL_RADIUS, rows + 2 * SOBEL_RADIUS)
    energy = np.ones((rows, columns), np.float32)
    sums = np.empty(columns + 2 * SOBEL_RADIUS, np.int32)
    sobel_x, sobel_y = np.empty(columns), np.empty(columns)
    one = np.float32(1)
    # Columns and rows of the energy outside of the window are skipped, and filled at the end.
    left, right = max(0, 1 - x0), min(columns, width + 1 - x0)
    for row in range(max(0, 1 - y0), min(rows, height + 1 - y0)):
        row_labels = labels[y0 - 1 + row, x0 - 1 + left : x0 - 1 + right]
        row_is_empty = True
        for label in row_labels:
            if foreground[label]:
                row_is_empty = False
                break
        if row_is_empty:
            continue
        _sobel_row(cut_h, cut_v, row + SOBEL_RADIUS, sums, sobel_x, sobel_y)
        for x in range(left, right):
            if foreground[row_labels[x - left]]:
                energy_h = one - np.float32(sobel_x[x] * scales[0] - offsets[0])
                energy_v = one - np.float32(sobel_y[x] * scales[1] - offsets[1])
                energy[row, x] = max(energy_h, energy_v, np.float32(0))
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
    """Set h and v to zero, in place, where they do not affect the energy of any foreground pixel.

    These are the pixels that no Sobel filter centred on the foreground reaches. A band of SOBEL_RADIUS pixels along the
    unit's edges keeps its values, for the foreground of neighbouring units.

    Do not use this function if Sobel maps will be scaled by the extremes of windows, because these include the
    background.

    `maps` (plane, y, x) uint8: stored maps of a unit (see `MapLayout`).
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
    columns = np.array([_mirrored(x0 + x, plane.shape[1]) for x in range(width)])
    for y in range(height):
        row = plane[_mirrored(y0 + y, plane.shape[0])]
        for x in range(width):
            cut[y, x] = row[columns[x]]
    return cut


@njit(cache=True, nogil=True)
def _column_sums(
    plane: NDArray[np.int8], y: int, weights: NDArray[np.int32], sign: int, out: NDArray[np.int32]
) -> None:
    """Write the weighted sum of the 21 rows around row `y` to `out` (x,) int32.

    `weights` (11,): by distance from row `y`. `sign`: 1 or -1, which multiplies the weights of the rows above.
    """
    width = plane.shape[1]
    middle = plane[y]
    for x in range(width):
        out[x] = np.int32(weights[0] * middle[x])
    for k in range(1, SOBEL_RADIUS, 2):
        near, far = np.int32(weights[k]), np.int32(weights[k + 1])
        a, b = plane[y - k], plane[y + k]
        c, d = plane[y - k - 1], plane[y + k + 1]
        # Cast at every step: otherwise numba widens to int64, and only half as many values fit into a register.
        if sign > 0:
            for x in range(width):
                pairs = np.int32(near * np.int32(b[x] + a[x])) + np.int32(far * np.int32(d[x] + c[x]))
                out[x] = np.int32(out[x] + np.int32(pairs))
        else:
            for x in range(width):
                pairs = np.int32(near * np.int32(b[x] - a[x])) + np.int32(far * np.int32(d[x] - c[x]))
                out[x] = np.int32(out[x] + np.int32(pairs))


@njit(cache=True, nogil=True)
def _row_sums(sums: NDArray[np.int32], weights: NDArray[np.float64], sign: int, out: NDArray[np.float64]) -> None:
    """Write the weighted sums of 21 neighbours in `sums` (x + 20,) to `out` (x,) float64.

    `weights` (11,): by distance from the centre. `sign`: 1 or -1, which multiplies the weights before the centre.
    """
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
    sobel_x: NDArray[np.float64],
    sobel_y: NDArray[np.float64],
) -> None:
    """Write row `y` of Sobel_x(h) and Sobel_y(v) to `sobel_x` and `sobel_y` (x,), without the outer 10 columns.

    `h`, `v` (y, x + 20): stored maps with at least 10 rows above and below row `y`. `sums` (x + 20,): work buffer.
    """
    _column_sums(h, y, _ACROSS, 1, sums)
    _row_sums(sums, _ALONG_F64, -1, sobel_x)
    _column_sums(v, y, _ALONG, -1, sums)
    _row_sums(sums, _ACROSS_F64, 1, sobel_y)


@njit(cache=True, nogil=True)
def _extremes(h: NDArray[np.int8], v: NDArray[np.int8]) -> NDArray[np.float64]:
    """Return the extremes (4,) as `sobel_extremes` does, of maps with a border of 10 pixels on all sides."""
    height, width = h.shape
    sums = np.empty(width, np.int32)
    sobel_x, sobel_y = np.empty(width - 2 * SOBEL_RADIUS), np.empty(width - 2 * SOBEL_RADIUS)
    extremes = np.array([np.inf, -np.inf, np.inf, -np.inf])
    for y in range(SOBEL_RADIUS, height - SOBEL_RADIUS):
        _sobel_row(h, v, y, sums, sobel_x, sobel_y)
        low_x, high_x = _minimum_and_maximum(sobel_x)
        low_y, high_y = _minimum_and_maximum(sobel_y)
        extremes[0], extremes[1] = min(extremes[0], low_x), max(extremes[1], high_x)
        extremes[2], extremes[3] = min(extremes[2], low_y), max(extremes[3], high_y)
    return extremes


# With fastmath, the compiler vectorises the comparisons; it may assume that no sum is NaN.
@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _minimum_and_maximum(row: NDArray[np.float64]) -> tuple[float, float]:
    least, most = row[0], row[0]
    for value in row:
        least = min(least, value)
        most = max(most, value)
    return least, most
