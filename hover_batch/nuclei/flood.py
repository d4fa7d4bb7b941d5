"""Instances of one component from its markers, by flooding.

Flooding follows `skimage.segmentation.watershed`, which the reference calls once for the whole window. A flood never
crosses from one component to another (both neighbourhoods are 4-connected), so each component is flooded separately.

Only ties differ from the reference. It has a single heap, which pops marker pixels of equal value in an order that
depends on all other items, those of other components included. So a pixel half-way between two such markers goes to one
or the other, depending on the rest of the window. Here each component has its own heap, and ties are resolved the same
way in every window.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def flood(own: NDArray[np.bool_], energy: NDArray[np.float32], markers: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the instances of a component, grown from its markers until they fill it.

    They are (y, x) int32, 0 outside of the component. Pixels of low energy, after a blur by 3 × 3 pixels, are reached
    first.

    `own` (y, x): the component's pixels in its bounding box. `energy` (y + 2, x + 2) float32: see `energy_around`.
    `markers` (y, x) int32: numbers of the markers, 0 = none; not changed.
    """
    capacity = np.count_nonzero(own)
    values, items = np.empty(capacity), np.empty(capacity, np.int64)
    instances = markers.copy()
    # Without the interiors of markers it is faster, but stops if a tie depends on them.
    if not _flood(own, energy, instances, values, items, False):
        instances[:] = markers
        _flood(own, energy, instances, values, items, True)
    return instances


@njit(cache=True, nogil=True)
def _flood(
    own: NDArray[np.bool_],
    energy: NDArray[np.float32],
    instances: NDArray[np.int32],
    values: NDArray[np.float64],
    items: NDArray[np.int64],
    interiors: bool,
) -> bool:
    """Grow the markers in `instances`, in pixel_index, until they fill the component, lowest values first.

    The order, and thus every tie, is scikit-image's: a binary heap ordered by value, then age. The pixels of markers
    are pushed first, in raster order, all with age 0. Other pixels get their instance and the next age when they are
    pushed, in the order above, left, right, below. A pixel's value is at least that of the pixel it is reached from.

    `interiors`: whether pixels in the interior of markers are pushed, too. Popping them changes nothing, but the order
    in which marker pixels of equal value are popped depends on all items in the heap. Without interiors, the flood
    therefore stops at the first tie between marker pixels and returns False; the caller then repeats it from the start
    with interiors. Otherwise it returns True. Most ties are between pixels at the minimum, and are found while these
    are pushed. Others are found when one such pixel is popped after another: pixels of the same value that are reached
    in between have a higher age, so they are popped later.

    `values`, `items`: buffers for the heap, with capacity for all pixels of the component.
    """
    height, width = own.shape
    size = 0
    for y in range(height):
        for x in range(width):
            if instances[y, x] > 0 and (interiors or _has_free_neighbour(own, instances, y, x)):
                value = -_depth(energy, y, x)
                if size > 0 and value == values[0] and not interiors:
                    return False
                size = _push(values, items, size, value, y * width + x)
    age = 0
    last_marker = np.inf
    while size > 0:
        popped_value, item = values[0], items[0]
        if item >> 32 == 0:
            if popped_value == last_marker and not interiors:
                return False
            last_marker = popped_value
        size = _pop(values, items, size)
        pixel_index = item & 0xFFFFFFFF
        y, x = pixel_index // width, pixel_index % width
        for ny, nx in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
            if ny < 0 or nx < 0 or ny == height or nx == width:
                continue
            if own[ny, nx] and instances[ny, nx] == 0:
                instances[ny, nx] = instances[y, x]
                age += 1
                value = max(popped_value, -_depth(energy, ny, nx))
                size = _push(values, items, size, value, age << 32 | (ny * width + nx))
    return True


@njit(cache=True, nogil=True)
def _has_free_neighbour(own: NDArray[np.bool_], instances: NDArray[np.int32], y: int, x: int) -> bool:
    """Return whether one of the four neighbours belongs to the component and to no instance yet."""
    height, width = own.shape
    return bool(
        (y > 0 and own[y - 1, x] and instances[y - 1, x] == 0)
        or (x > 0 and own[y, x - 1] and instances[y, x - 1] == 0)
        or (x + 1 < width and own[y, x + 1] and instances[y, x + 1] == 0)
        or (y + 1 < height and own[y + 1, x] and instances[y + 1, x] == 0)
    )


@njit(cache=True, nogil=True)
def _depth(energy: NDArray[np.float32], y: int, x: int) -> float:
    """Return 1 - energy at pixel (y, x) of the bounding box, blurred by the 3×3 Gaussian (¼ ½ ¼).

    It equals `cv2.GaussianBlur` of the whole map, but is computed only for pixels that are pushed. Energies are
    multiples of 2^-24, so no sum is rounded and the order of additions does not matter.
    """
    one = 1.0
    upper = 0.25 * ((one - energy[y, x]) + (one - energy[y, x + 2])) + 0.5 * (one - energy[y, x + 1])
    here = 0.25 * ((one - energy[y + 1, x]) + (one - energy[y + 1, x + 2])) + 0.5 * (one - energy[y + 1, x + 1])
    lower = 0.25 * ((one - energy[y + 2, x]) + (one - energy[y + 2, x + 2])) + 0.5 * (one - energy[y + 2, x + 1])
    return float(0.25 * (upper + lower) + 0.5 * here)


@njit(cache=True, nogil=True)
def _push(values: NDArray[np.float64], items: NDArray[np.int64], size: int, value: float, item: int) -> int:
    """Push an item, age << 32 | pixel, onto a heap of `size` items; return the new size.

    The first item has the smallest value and, among equal values, the smallest age.
    """
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

    The hole is moved down to a leaf along the smaller children (the left one if equal), then the last item is moved up
    from there. Since the items on that path are sorted, it ends where it would if it were moved down from the root, but
    fewer comparisons are needed.
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
