"""Resample a level to the inference grid, at a phase that depends only on the pixel's own index.

Output pixel i has its centre at (i + 0.5) · step in source pixels. It is a weighted sum of the source pixels around it:
Catmull-Rom's cubic (Keys 1981, a = −1/2), widened by `step` when shrinking to avoid aliasing. Weights and sums
are whole numbers: an integer sum is the same in any order, in any block and on any processor.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

WEIGHT_BITS = 14
"""Binary logarithm of the sum of the weights of one output pixel."""

_ROW_BITS = 6
"""Fractional bits of a row that is filtered vertically: 255 · 64, overshoot included, fits 16 bits, and 16 bits times a
weight, summed over the taps, fits 32."""


def taps(step: float, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return the source pixels and the weights for output pixels `start` … `stop`−1 along one axis.

    The first array, (n,) int64, is the index of the first source pixel of each output pixel; it may lie outside of the
    source. The second array, (n, taps) int32, has the weights of that pixel and those after it. The weights sample
    Catmull-Rom's cubic, which is widened if `step` is above 1, and sum to 2^14 for each output pixel.

    `step`: source pixels per output pixel, above 0.
    """
    width = max(step, 1.0)
    count = math.ceil(4 * width)
    centre = (np.arange(start, stop, dtype=np.int64) + 0.5) * step
    first = np.ceil(centre - 2 * width - 0.5).astype(np.int64)
    distance = np.abs(first[:, None] + np.arange(count) + 0.5 - centre[:, None]) / width
    # Whole numbers before the sum, so that its order cannot change the weights.
    raw = np.rint(_catmull_rom(distance) * (1 << 24)).astype(np.int64)
    weights = np.rint(raw * (1 << WEIGHT_BITS) / raw.sum(axis=1, keepdims=True)).astype(np.int32)
    # The largest weight of each row takes what rounding leaves of the sum.
    largest = weights.argmax(axis=1)
    weights[np.arange(len(weights)), largest] += (1 << WEIGHT_BITS) - weights.sum(axis=1, dtype=np.int32)
    return first, weights


def _catmull_rom(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    d = distance
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    inside: NDArray[np.float64] = np.where(d < 1, near, np.where(d < 2, far, 0.0))
    return inside


@njit(cache=True, nogil=True)
def resample(
    source: NDArray[np.uint8],
    rows: NDArray[np.int64],
    row_weights: NDArray[np.int32],
    columns: NDArray[np.int64],
    column_weights: NDArray[np.int32],
    out: NDArray[np.uint8],
) -> None:
    """Resample `source`, contiguous RGB (y, x, 3) uint8, into `out`, RGB (h, w, 3) uint8, which is changed in place.

    Each output pixel is the weighted sum of source pixels, rounded and clipped to 0 … 255.

    `rows` (h, taps), `columns` (w, taps): int64 indices of the source pixels for each output row and column. They must
    lie inside the source, which is not checked. `row_weights`, `column_weights`: their weights, int32 of the same
    shapes (see `taps`).
    """
    width = source.shape[1] * 3
    flat = source.reshape(source.shape[0], width)
    total = np.empty(width, np.int32)
    row_shift = np.int32(WEIGHT_BITS - _ROW_BITS)
    row_half = np.int32(1 << (WEIGHT_BITS - _ROW_BITS - 1))
    shift = np.int32(WEIGHT_BITS + _ROW_BITS)
    half = np.int32(1 << (WEIGHT_BITS + _ROW_BITS - 1))
    zero = np.int32(0)
    full = np.int32(255)
    for y in range(out.shape[0]):
        total[:] = row_half
        for k in range(rows.shape[1]):
            weight = row_weights[y, k]
            if weight != 0:
                line = flat[rows[y, k]]
                for x in range(width):
                    total[x] += weight * np.int32(line[x])
        for x in range(width):
            total[x] >>= row_shift
        for x in range(out.shape[1]):
            red = half
            green = half
            blue = half
            for k in range(columns.shape[1]):
                weight = column_weights[x, k]
                at = columns[x, k] * 3
                red += weight * total[at]
                green += weight * total[at + 1]
                blue += weight * total[at + 2]
            out[y, x, 0] = np.uint8(min(max(red >> shift, zero), full))
            out[y, x, 1] = np.uint8(min(max(green >> shift, zero), full))
            out[y, x, 2] = np.uint8(min(max(blue >> shift, zero), full))
