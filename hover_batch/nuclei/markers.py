"""Markers of one component: the pixels of low energy in its nuclei, with holes filled, opened and labelled.

The reference processes all components of the window together. Here each is processed separately, with the same result
except where one component lies inside a ring of another (see watershed.py).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

MARKER_ENERGY = 0.4
"""Energy below which a foreground pixel belongs to the interior of a nucleus."""
MIN_PIXELS = 10
"""Number of pixels below which components and markers are dropped."""
_RADIUS = 2
"""Radius in pixels of the opening's ellipse, `cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))`: three whole rows,
and the middle pixel of the rows above and below them."""
_ERASED = -1
"""Label of pixels that were visited but belong to no marker."""


@njit(cache=True, nogil=True)
def markers_of(
    own: NDArray[np.bool_], energy: NDArray[np.float32], edges: tuple[bool, bool, bool, bool]
) -> tuple[NDArray[np.int32], int]:
    """Return the markers of a component, (y, x) int32, 0 = none, and their number m.

    Markers are the 4-connected pieces of the pixels with an energy below MARKER_ENERGY, after holes are filled and the
    result is opened by an ellipse of 5 × 5 pixels. They are numbered 1 … m in the order of their first pixels. Only
    pixels of `own` are labelled. Other pixels that filling and opening add are counted in the size of a marker. Markers
    of fewer than MIN_PIXELS (10) pixels, and markers without a pixel of `own`, are dropped.

    `own` (y, x): the component's pixels in its bounding box. `energy` (y + 2, x + 2) float32: see `energy_around`.
    `edges`: whether the box touches the left, upper, right and lower edge of the window; like OpenCV, the erosion
    treats all pixels beyond these edges as set.
    """
    filled = _filled(own, energy)
    height, width = own.shape
    left, upper, right, lower = edges
    if left:
        filled[:, :_RADIUS] = True
    if upper:
        filled[:_RADIUS] = True
    if right:
        filled[:, width + _RADIUS :] = True
    if lower:
        filled[height + _RADIUS :] = True
    eroded = np.zeros_like(filled)
    eroded[_RADIUS : height + _RADIUS, _RADIUS : width + _RADIUS] = ~_dilated(~filled)
    markers, number = _labelled(_dilated(eroded), own)
    return markers, number


@njit(cache=True, nogil=True)
def _filled(own: NDArray[np.bool_], energy: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the low-energy pixels of a component with holes filled, and two pixels of False around: (y + 4, x + 4).

    A pixel is in a hole if no 4-connected path of other pixels leads from it to the outside of the bounding box.
    """
    height, width = own.shape
    limit = np.float32(MARKER_ENERGY)
    filled = np.ones((height + 2 * _RADIUS, width + 2 * _RADIUS), np.bool_)
    filled[0] = filled[-1] = filled[:, 0] = filled[:, -1] = False
    # A flood starts in the frame of one pixel around the box; pixels that it does not reach stay True.
    stack = np.empty((height + 2) * (width + 2), np.int64)
    stride = width + 2 * _RADIUS
    stack[0] = stride + 1
    filled[1, 1] = False
    size = 1
    while size > 0:
        size -= 1
        y, x = stack[size] // stride, stack[size] % stride
        for ny, nx in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
            if not filled[ny, nx]:
                continue
            row, column = ny - _RADIUS, nx - _RADIUS  # in the bounding box
            if 0 <= row < height and 0 <= column < width and own[row, column] and energy[row + 1, column + 1] < limit:
                continue
            filled[ny, nx] = False
            stack[size] = ny * stride + nx
            size += 1
    return filled


@njit(cache=True, nogil=True)
def _dilated(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask (y + 4, x + 4) dilated by the ellipse: (y, x) bool."""
    height, width = mask.shape[0] - 2 * _RADIUS, mask.shape[1] - 2 * _RADIUS
    rows = np.empty((height + 2 * _RADIUS, width), np.bool_)
    for y in range(height + 2 * _RADIUS):
        m = mask[y]
        for x in range(width):
            rows[y, x] = m[x] | m[x + 1] | m[x + 2] | m[x + 3] | m[x + 4]
    dilated = np.empty((height, width), np.bool_)
    for y in range(height):
        for x in range(width):
            dilated[y, x] = mask[y, x + 2] | rows[y + 1, x] | rows[y + 2, x] | rows[y + 3, x] | mask[y + 4, x + 2]
    return dilated


@njit(cache=True, nogil=True)
def _labelled(opened: NDArray[np.bool_], own: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Label the 4-connected pieces of `opened` (y, x) that have at least MIN_PIXELS pixels, and return their number.

    Pixels that are not `own`, which filling and opening added, count towards the size, but are not labelled.
    """
    height, width = own.shape
    markers = np.zeros((height, width), np.int32)
    queue = np.empty(height * width, np.int64)
    number = 0
    for start_y in range(height):
        for start_x in range(width):
            if not opened[start_y, start_x] or markers[start_y, start_x] != 0:
                continue
            markers[start_y, start_x] = number + 1
            queue[0] = start_y * width + start_x
            done, queued, own_pixels = 0, 1, 0
            while done < queued:
                y, x = queue[done] // width, queue[done] % width
                done += 1
                own_pixels += own[y, x]
                for ny, nx in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
                    if 0 <= ny < height and 0 <= nx < width and opened[ny, nx] and markers[ny, nx] == 0:
                        markers[ny, nx] = number + 1
                        queue[queued] = ny * width + nx
                        queued += 1
            keep = queued >= MIN_PIXELS and own_pixels > 0
            for i in range(queued):
                y, x = queue[i] // width, queue[i] % width
                if not (keep and own[y, x]):
                    markers[y, x] = _ERASED
            number += keep
    for y in range(height):
        for x in range(width):
            markers[y, x] = max(markers[y, x], 0)
    return markers, number
