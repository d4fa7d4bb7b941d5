"""Instances from markers: a component with one marker is filled, one with several is flooded.

Flooding follows `skimage.segmentation.watershed`, which the reference calls once for the whole window. Water never
crosses from one component to another (both neighbourhoods are 4-connected), so each component is flooded separately,
and one with a single marker becomes that marker's instance as a whole.

The reference differs in ties: it has a single heap, which pops markers of equal value in an order that depends on all
other items, those of other components included. So a pixel half-way between two such markers goes to either one
depending on the rest of the window. Here each component has its own heap, and ties are resolved the same way in every
window. Only equal floats are affected.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def fill_and_flood(
    labels: NDArray[np.int32],
    bounds: NDArray[np.int64],
    pixels: NDArray[np.int64],
    energy: NDArray[np.float32],
    markers: NDArray[np.int32],
    ids: NDArray[np.int32],
    marker_counts: NDArray[np.int64],
    only_id: NDArray[np.int32],
) -> NDArray[np.int32]:
    """Return the instances (y, x) int32, 0 = background, of the components in `labels` (y, x).

    Components without markers become background. `bounds` (n, 4): x0, y0, x1, y1 of each component, half-open. `pixels`
    (n,): its number of pixels. `energy` (y, x): see `energy_of`. `markers` (y, x): marker numbers, 0 = none. `ids`
    (m,): instance of each marker. `marker_counts` (n,): number of markers of each component. `only_id` (n,): instance
    of a component with a single marker. Row 0 of arrays of components and markers is the background.
    """
    height, width = labels.shape
    instances = np.zeros((height, width), np.int32)
    for y in range(height):
        for x in range(width):
            c = labels[y, x]
            if c == 0:
                continue
            if marker_counts[c] == 1:
                instances[y, x] = only_id[c]
            elif marker_counts[c] > 1 and markers[y, x] > 0:
                instances[y, x] = ids[markers[y, x]]
    room = 0
    for c in range(1, len(bounds)):
        if marker_counts[c] > 1:
            room = max(room, pixels[c])
    values, items = np.empty(room), np.empty(room, np.int64)
    for c in range(1, len(bounds)):
        if marker_counts[c] > 1 and not _flood(labels, c, bounds[c], energy, instances, values, items, False):
            for y in range(bounds[c, 1], bounds[c, 3]):
                for x in range(bounds[c, 0], bounds[c, 2]):
                    if labels[y, x] == c:
                        instances[y, x] = ids[markers[y, x]] if markers[y, x] > 0 else 0
            _flood(labels, c, bounds[c], energy, instances, values, items, True)
    return instances


@njit(cache=True, nogil=True)
def _flood(
    labels: NDArray[np.int32],
    component: int,
    bound: NDArray[np.int64],
    energy: NDArray[np.float32],
    instances: NDArray[np.int32],
    values: NDArray[np.float64],
    items: NDArray[np.int64],
    interiors: bool,
) -> bool:
    """Grow the instances of one component from its markers until they fill it, lowest values first.

    The order, and thus every tie, is scikit-image's: a binary heap ordered by value, then age. Markers are pushed
    first, in raster order, all with age 0. Other pixels get their instance and the next age when they are pushed, in
    the order above, left, right, below. A pixel's value is at least that of the pixel it is reached from.

    Popping a pixel in the interior of a marker changes nothing, so interiors need not be queued. But the order in
    which markers of equal value are popped depends on all items of the heap. Equal markers are popped one after the
    other (what they reach comes later), so a tie is detected when it occurs; most ties, between markers at the minimum,
    already while markers are queued. The flood then stops and returns False, and the caller repeats it from the start
    with `interiors` queued, by the same textbook heap operations as in scikit-image. Returns True when finished.
    """
    height, width = labels.shape
    size = 0
    for y in range(bound[1], bound[3]):
        for x in range(bound[0], bound[2]):
            if (
                labels[y, x] == component
                and instances[y, x] > 0
                and (interiors or _has_dry_neighbour(labels, instances, y, x))
            ):
                value = -_depth(energy, y, x)
                if size > 0 and value == values[0] and not interiors:
                    return False
                size = _push(values, items, size, value, y * width + x)
    age = 0
    last_marker = np.inf
    while size > 0:
        level, item = values[0], items[0]
        if item >> 32 == 0:
            if level == last_marker and not interiors:
                return False
            last_marker = level
        size = _pop(values, items, size)
        place = item & 0xFFFFFFFF
        y, x = place // width, place % width
        for ny, nx in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
            if ny < 0 or nx < 0 or ny == height or nx == width:
                continue
            if labels[ny, nx] == component and instances[ny, nx] == 0:
                instances[ny, nx] = instances[y, x]
                age += 1
                value = max(level, -_depth(energy, ny, nx))
                size = _push(values, items, size, value, age << 32 | (ny * width + nx))
    return True


@njit(cache=True, nogil=True)
def _has_dry_neighbour(labels: NDArray[np.int32], instances: NDArray[np.int32], y: int, x: int) -> bool:
    """Whether one of the four neighbours belongs to the same component and to no instance yet."""
    height, width = labels.shape
    c = labels[y, x]
    return bool(
        (y > 0 and labels[y - 1, x] == c and instances[y - 1, x] == 0)
        or (x > 0 and labels[y, x - 1] == c and instances[y, x - 1] == 0)
        or (x + 1 < width and labels[y, x + 1] == c and instances[y, x + 1] == 0)
        or (y + 1 < height and labels[y + 1, x] == c and instances[y + 1, x] == 0)
    )


@njit(cache=True, nogil=True)
def _depth(energy: NDArray[np.float32], y: int, x: int) -> float:
    """Return 1 - energy at one pixel, blurred by the 3×3 Gaussian (¼ ½ ¼) with reflected borders.

    Equals `cv2.GaussianBlur` of the whole map, computed only where a flood arrives. Energies are multiples of 2^-24, so
    no sum is rounded and the order of additions does not matter.
    """
    height, width = energy.shape
    above, below = abs(y - 1), y + 1 if y + 1 < height else max(0, height - 2)
    left, right = abs(x - 1), x + 1 if x + 1 < width else max(0, width - 2)
    above, left = min(above, height - 1), min(left, width - 1)
    one = 1.0
    upper = 0.25 * ((one - energy[above, left]) + (one - energy[above, right])) + 0.5 * (one - energy[above, x])
    here = 0.25 * ((one - energy[y, left]) + (one - energy[y, right])) + 0.5 * (one - energy[y, x])
    lower = 0.25 * ((one - energy[below, left]) + (one - energy[below, right])) + 0.5 * (one - energy[below, x])
    return float(0.25 * (upper + lower) + 0.5 * here)


@njit(cache=True, nogil=True)
def _push(values: NDArray[np.float64], items: NDArray[np.int64], size: int, value: float, item: int) -> int:
    """Push onto a heap of `size` items, smallest (value, age) first; return the new size. Item: age << 32 | pixel."""
    i = size
    while i > 0:
        parent = (i - 1) // 2
        if values[parent] < value or (values[parent] == value and items[parent] >> 32 <= item >> 32):
            break
        values[i], items[i] = values[parent], items[parent]
        i = parent
    values[i], items[i] = value, item
    return size + 1


@njit(cache=True, nogil=True)
def _pop(values: NDArray[np.float64], items: NDArray[np.int64], size: int) -> int:
    """Remove the first item of a heap of `size` items; return the new size.

    The hole sifts down to a leaf along the smaller children (the left one if equal), then the last item sifts up from
    there. It ends where it would if it sifted down from the root, since the items on that path are in order, but with
    fewer comparisons.
    """
    size -= 1
    value, item = values[size], items[size]
    i = 0
    while 2 * i + 2 < size:
        child = 2 * i + 1
        other = child + 1
        if values[other] < values[child] or (
            values[other] == values[child] and items[other] >> 32 < items[child] >> 32
        ):
            child = other
        values[i], items[i] = values[child], items[child]
        i = child
    if 2 * i + 1 < size:
        values[i], items[i] = values[2 * i + 1], items[2 * i + 1]
        i = 2 * i + 1
    while i > 0:
        parent = (i - 1) // 2
        if values[parent] < value or (values[parent] == value and items[parent] >> 32 < item >> 32):
            break
        values[i], items[i] = values[parent], items[parent]
        i = parent
    values[i], items[i] = value, item
    return size
