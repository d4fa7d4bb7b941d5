"""Markers of one component: the low-energy interiors of its nuclei, with holes filled, opened and labelled.

The reference processes the mask of the whole window. Here the result is that of each component processed on its own,
which differs only where one component lies inside a ring of another (see watershed.py).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

MARKER_ENERGY = 0.4
"""Energy below which a foreground pixel belongs to the interior of a nucleus."""
MIN_PIXELS = 10
"""Smaller components and markers, in pixels, are dropped."""
_RADIUS = 2
"""Radius in pixels of the opening's ellipse, `cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))`: three whole rows,
and the middle pixel of the rows above and below them."""
_ERASED = -1


@njit(cache=True, nogil=True)
def markers_of(
    own: NDArray[np.bool_], energy: NDArray[np.float32], edges: tuple[bool, bool, bool, bool]
) -> tuple[NDArray[np.int32], int]:
    """Return the markers (y, x) int32 of a component, 0 = none, and their number m: 1 … m by their first pixels.

    `own` (y, x): the component's pixels in its bounding box. `energy` (y + 2, x + 2): see `energy_around`. `edges`:
    whether the box touches the left, upper, right and lower edge of the window, beyond which the opening takes all
    pixels for set, as OpenCV does.
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
    """Return the interior of a component with holes filled, and two pixels of False around it: (y + 4, x + 4) bool.

    A pixel is in a hole if no path of 4-connected pixels outside of the interior leads from it to the frame.
    """
    height, width = own.shape
    limit = np.float32(MARKER_ENERGY)
    filled = np.ones((height + 2 * _RADIUS, width + 2 * _RADIUS), np.bool_)
    filled[0] = filled[-1] = filled[:, 0] = filled[:, -1] = False
    # Flooded from the frame of one pixel around the box; True is what the flood has not reached.
    waiting = np.empty((height + 2) * (width + 2), np.int64)
    stride = width + 2 * _RADIUS
    waiting[0] = stride + 1
    filled[1, 1] = False
    size = 1
    while size > 0:
        size -= 1
        y, x = waiting[size] // stride, waiting[size] % stride
        for ny, nx in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
            if not filled[ny, nx]:
                continue
            if 2 <= ny < height + 2 and 2 <= nx < width + 2 and own[ny - 2, nx - 2] and energy[ny - 1, nx - 1] < limit:
                continue
            filled[ny, nx] = False
            waiting[size] = ny * stride + nx
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
    """Return the 4-connected pieces of `opened` (y, x) with at least MIN_PIXELS pixels, and their number.

    Pixels that are not `own` count for the size, and are then erased.
    """
    height, width = own.shape
    markers = np.zeros((height, width), np.int32)
    waiting = np.empty(height * width, np.int64)
    number = 0
    for start_y in range(height):
        for start_x in range(width):
            if not opened[start_y, start_x] or markers[start_y, start_x] != 0:
                continue
            markers[start_y, start_x] = number + 1
            waiting[0] = start_y * width + start_x
            done, found, mine = 0, 1, 0
            while done < found:
                y, x = waiting[done] // width, waiting[done] % width
                done += 1
                mine += own[y, x]
                for ny, nx in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
                    if 0 <= ny < height and 0 <= nx < width and opened[ny, nx] and markers[ny, nx] == 0:
                        markers[ny, nx] = number + 1
                        waiting[found] = ny * width + nx
                        found += 1
            keep = found >= MIN_PIXELS and mine > 0
            for i in range(found):
                y, x = waiting[i] // width, waiting[i] % width
                if not (keep and own[y, x]):
                    markers[y, x] = _ERASED
            number += keep
    for y in range(height):
        for x in range(width):
            markers[y, x] = max(markers[y, x], 0)
    return markers, number
