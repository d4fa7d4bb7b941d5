"""The energy landscape: 21×21 Sobel maps of h and v, exact, a row at a time.

HoVerNet's Sobel filter is separable into the binomial weights of order 20 across and their differences along the
direction. On stored bytes a column's sum stays below 2^31 (127·2^20) and the whole below 2^53, so int32 and then
float64 hold every sum without rounding: the order of the additions does not matter, and the result is that of
`cv2.Sobel(…, cv2.CV_64F, ksize=21)` bit for bit, at a tenth of its cost. Only two rows of sums exist at a time.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

SOBEL_SIZE = 21
SOBEL_RADIUS = SOBEL_SIZE // 2
HV_STEPS = 127
"""Stored integers per unit of h and v."""

_BINOMIAL = np.array([184756, 167960, 125970, 77520, 38760, 15504, 4845, 1140, 190, 20, 1], np.int64)
"""Weights at distances 0 … 10 across the direction: the same on both sides."""
_DIFFERENCE = np.array([0, 16796, 25194, 23256, 15504, 7752, 2907, 798, 152, 18, 1], np.int64)
"""Weights at distances 0 … 10 along the direction: of the opposite sign on the near side."""
_ACROSS, _ALONG = _BINOMIAL.astype(np.int32), _DIFFERENCE.astype(np.int32)
_ACROSS_F64, _ALONG_F64 = _BINOMIAL.astype(np.float64), _DIFFERENCE.astype(np.float64)


def sobel_extremes(h: NDArray[np.uint8], v: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Minimum and maximum of Sobel_x(h), then of Sobel_y(v), over a window of stored maps (y, x): (4,) float64.

    In stored steps. Beyond the window's edge it is mirrored about its outermost pixels, as OpenCV does.
    """
    return np.asarray(_extremes(_signed(h), _signed(v)), np.float64)


def energy_of(
    h: NDArray[np.uint8],
    v: NDArray[np.uint8],
    inside: NDArray[np.bool_],
    labels: NDArray[np.int32],
    scales: tuple[float, float],
    lows: tuple[float, float],
) -> NDArray[np.float32]:
    """max(1 - Sobel_x(h), 1 - Sobel_y(v), 0), each Sobel map scaled: (y, x) float32, 1 outside of the foreground.

    A Sobel sum s becomes s·scale - low, of h the first `scales` and `lows`, of v the second. High where the distances
    to the centroid jump from one nucleus to the next. Foreground are the components `inside` (n,) of `labels` (y, x);
    elsewhere the reference multiplies by a mask what is made of the energy, which comes to an energy of 1 there, so
    nothing is computed.
    """
    return np.asarray(_energy(_signed(h), _signed(v), inside, labels, scales, lows), np.float32)


def _signed(plane: NDArray[np.uint8]) -> NDArray[np.int8]:
    return np.ascontiguousarray(plane).view(np.int8)


@njit(cache=True, nogil=True)
def _mirrored(i: int, n: int) -> int:
    """The index in [0, n) that a position beyond the edge shows: … 2 1 0 1 2 …"""
    if n == 1:
        return 0
    i %= 2 * (n - 1)
    return i if i < n else 2 * (n - 1) - i


@njit(cache=True, nogil=True)
def _down_columns(
    plane: NDArray[np.int8], y: int, weights: NDArray[np.int32], sign: int, out: NDArray[np.int32]
) -> None:
    """Weighted sums of the 21 rows around row `y`, those above times `sign`: (x,) int32. Two rows a side at once."""
    height, width = plane.shape
    middle = plane[y]
    for x in range(width):
        out[x] = np.int32(weights[0] * middle[x])
    for k in range(1, SOBEL_RADIUS, 2):
        near, far = np.int32(weights[k]), np.int32(weights[k + 1])
        a, b = plane[_mirrored(y - k, height)], plane[_mirrored(y + k, height)]
        c, d = plane[_mirrored(y - k - 1, height)], plane[_mirrored(y + k + 1, height)]
        # Casts at every step, or numba widens to int64 and half as many fit a register.
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
    """Weighted sums of 21 neighbours in a row, those before times `sign`: (x,) from (x + 20,), mirrored here."""
    width = len(out)
    for k in range(1, SOBEL_RADIUS + 1):
        sums[SOBEL_RADIUS - k] = sums[SOBEL_RADIUS + _mirrored(-k, width)]
        sums[SOBEL_RADIUS + width - 1 + k] = sums[SOBEL_RADIUS + _mirrored(width - 1 + k, width)]
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
def _sobel_rows(
    h: NDArray[np.int8],
    v: NDArray[np.int8],
    y: int,
    sums: NDArray[np.int32],
    along_x: NDArray[np.float64],
    along_y: NDArray[np.float64],
) -> None:
    """Row `y` of Sobel_x(h) and Sobel_y(v) into `along_x` and `along_y` (x,); `sums` (x + 20,) is room to work in."""
    columns = sums[SOBEL_RADIUS : SOBEL_RADIUS + h.shape[1]]
    _down_columns(h, y, _ACROSS, 1, columns)
    _along_row(sums, _ALONG_F64, -1, along_x)
    _down_columns(v, y, _ALONG, -1, columns)
    _along_row(sums, _ACROSS_F64, 1, along_y)


@njit(cache=True, nogil=True)
def _extremes(h: NDArray[np.int8], v: NDArray[np.int8]) -> NDArray[np.float64]:
    height, width = h.shape
    sums = np.empty(width + 2 * SOBEL_RADIUS, np.int32)
    along_x, along_y = np.empty(width), np.empty(width)
    found = np.array([np.inf, -np.inf, np.inf, -np.inf])
    for y in range(height):
        _sobel_rows(h, v, y, sums, along_x, along_y)
        low_x, high_x = _least_and_most(along_x)
        low_y, high_y = _least_and_most(along_y)
        found[0], found[1] = min(found[0], low_x), max(found[1], high_x)
        found[2], found[3] = min(found[2], low_y), max(found[3], high_y)
    return found


# There is no NaN among the sums; knowing that, the compiler compares several at once.
@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _least_and_most(row: NDArray[np.float64]) -> tuple[float, float]:
    least, most = row[0], row[0]
    for value in row:
        least = min(least, value)
        most = max(most, value)
    return least, most


@njit(cache=True, nogil=True)
def _energy(
    h: NDArray[np.int8],
    v: NDArray[np.int8],
    inside: NDArray[np.bool_],
    labels: NDArray[np.int32],
    scales: tuple[float, float],
    lows: tuple[float, float],
) -> NDArray[np.float32]:
    height, width = h.shape
    energy = np.ones((height, width), np.float32)
    sums = np.empty(width + 2 * SOBEL_RADIUS, np.int32)
    along_x, along_y = np.empty(width), np.empty(width)
    one = np.float32(1)
    for y in range(height):
        row_is_empty = True
        for x in range(width):
            if inside[labels[y, x]]:
                row_is_empty = False
                break
        if row_is_empty:
            continue
        _sobel_rows(h, v, y, sums, along_x, along_y)
        for x in range(width):
            if inside[labels[y, x]]:
                slope_x = one - np.float32(along_x[x] * scales[0] - lows[0])
                slope_y = one - np.float32(along_y[x] * scales[1] - lows[1])
                energy[y, x] = max(slope_x, slope_y, np.float32(0))
    return energy
