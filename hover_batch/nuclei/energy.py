"""Energy landscape from exact 21×21 Sobel maps of h and v, computed row by row.

HoVerNet's Sobel filter is separable: binomial weights of order 20 across the direction, their differences along it. On
stored bytes a column sum stays below 2^31 (127·2^20) and the total below 2^53, so int32 and then float64 hold every sum
without rounding. The order of additions does not matter, and the result equals `cv2.Sobel(…, cv2.CV_64F, ksize=21)` bit
for bit, at a tenth of its cost. Only two rows of sums are held at a time.
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

    `h`, `v` (y, x): a window of stored maps, uint8 in two's complement. The extremes are in stored steps (HV_STEPS per
    unit). Borders are reflected about the outermost pixels (OpenCV's BORDER_REFLECT_101).
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
    """Return the energy landscape (y, x) float32: max(1 - Sobel_x(h), 1 - Sobel_y(v), 0) of the scaled Sobel maps.

    It is high where the distances to the centroid jump from one nucleus to the next. `h`, `v` (y, x): stored maps,
    uint8 in two's complement. A Sobel sum s is scaled to s·scale - low; `scales` and `lows` are (for h, for v), as
    `SobelConstants.scaling` gives them. `labels` (y, x): component of each pixel; `inside` (n,): whether a component
    belongs to the foreground. The energy of all other pixels is 1 and is not computed: the reference masks them later,
    with the same effect.
    """
    return np.asarray(_energy(_signed(h), _signed(v), inside, labels, scales, lows), np.float32)


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


def _signed(plane: NDArray[np.uint8]) -> NDArray[np.int8]:
    return np.ascontiguousarray(plane).view(np.int8)


@njit(cache=True, nogil=True)
def _mirrored(i: int, n: int) -> int:
    """Return the index in [0, n) of a position beyond the edge, reflected: … 2 1 0 1 2 …"""
    if n == 1:
        return 0
    i %= 2 * (n - 1)
    return i if i < n else 2 * (n - 1) - i


@njit(cache=True, nogil=True)
def _down_columns(
    plane: NDArray[np.int8], y: int, weights: NDArray[np.int32], sign: int, out: NDArray[np.int32]
) -> None:
    """Write the weighted sums of the 21 rows around row `y` to `out` (x,) int32; `sign` multiplies the rows above."""
    height, width = plane.shape
    middle = plane[y]
    for x in range(width):
        out[x] = np.int32(weights[0] * middle[x])
    for k in range(1, SOBEL_RADIUS, 2):
        near, far = np.int32(weights[k]), np.int32(weights[k + 1])
        a, b = plane[_mirrored(y - k, height)], plane[_mirrored(y + k, height)]
        c, d = plane[_mirrored(y - k - 1, height)], plane[_mirrored(y + k + 1, height)]
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
    """Write the weighted sums of 21 neighbours to `out` (x,); `sign` multiplies those before the centre.

    `sums` (x + 20,): its 10 columns on each side are filled here, by reflection.
    """
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
    """Write row `y` of Sobel_x(h) and Sobel_y(v) to `along_x` and `along_y` (x,); `sums` (x + 20,) is a work buffer."""
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


# No sum is NaN; knowing that, the compiler vectorises the comparisons.
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
