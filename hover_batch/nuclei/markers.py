"""Markers: the low-energy interiors of nuclei, with holes filled, opened and labelled.

The reference processes the mask of the whole window. Here the result is that of each component processed separately,
which differs only where one component lies inside a ring of another (see watershed.py). All components are nevertheless
processed in one pass, since for almost all of them the whole mask gives the same result as their own:

- A bounded gap of the mask whose border belongs to a single component is a hole of that component; this finds all
  holes without other markers inside. Where a border belongs to several components (a ring with something inside, a ring
  closed diagonally), they are *entangled* and are processed one by one in their own crops.
- The opening's ellipse is 4-connected, and so are components. Filled masks of components that are not entangled
  never share an edge, so the ellipse fits only inside one of them, and connected pieces lie inside one of them.
"""

from __future__ import annotations

import cv2
import numpy as np
from numba import njit
from numpy.typing import NDArray

MARKER_ENERGY = 0.4
"""Energy below which a foreground pixel belongs to the interior of a nucleus."""
MIN_PIXELS = 10
"""Smaller components and markers, in pixels, are dropped."""
_ELLIPSE = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
_OUTSIDE = 1
"""Number of the outermost region of gaps: OpenCV numbers regions in raster order, and the frame comes first."""
_ROOM = 3
"""Context in pixels around an entangled component in its crop: the opening's radius plus one."""


def markers_of(
    labels: NDArray[np.int32], bounds: NDArray[np.int64], chosen: NDArray[np.bool_], energy: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the markers (y, x) int32 of the `chosen` (n,) components, and the component (m,) int64 of each marker.

    Marker 0 is the background; unused numbers have component 0. Within a component, numbers increase in the raster
    order of the markers' first pixels. `labels` (y, x): component of each pixel, 0 = background. `bounds` (n, 4): x0,
    y0, x1, y1 of each component, half-open. `chosen` (n,): which components to process. `energy` (y, x): see
    `energy_of`.
    """
    gaps = _gaps(labels, chosen, energy)
    count, regions = cv2.connectedComponents(gaps, connectivity=4, ltype=cv2.CV_32S)
    owners, entangled = _owners(labels, regions, count, len(bounds))
    filled = _filled(gaps, labels, regions, owners, entangled, bool(entangled.any()))
    del gaps
    opened = cv2.morphologyEx(filled, cv2.MORPH_OPEN, _ELLIPSE)
    del filled
    count, markers = cv2.connectedComponents(opened, connectivity=4, ltype=cv2.CV_32S)
    del opened
    components = _assigned(labels, regions, owners, markers, count)
    more: list[int] = []
    for component in np.flatnonzero(entangled).tolist():
        x0, y0, x1, y1 = bounds[component].tolist()
        crop = np.s_[max(0, y0 - _ROOM) : y1 + _ROOM, max(0, x0 - _ROOM) : x1 + _ROOM]
        own = labels[crop] == component
        alone = _markers_alone(own & (energy[crop] < MARKER_ENERGY))
        alone[~own] = 0
        markers[crop][alone > 0] = alone[alone > 0] + (len(components) + len(more) - 1)
        present = np.bincount(alone.ravel())[1:] > 0
        more.extend(np.where(present, component, 0).tolist())
    return np.asarray(markers, np.int32), np.concatenate([components, np.array(more, np.int64)])


@njit(cache=True, nogil=True)
def _gaps(labels: NDArray[np.int32], chosen: NDArray[np.bool_], energy: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return 0 in the interiors of chosen components, else 1: (y + 2, x + 2) uint8, with a frame of 1."""
    height, width = labels.shape
    gaps = np.ones((height + 2, width + 2), np.uint8)
    limit = np.float32(MARKER_ENERGY)
    for y in range(height):
        for x in range(width):
            if energy[y, x] < limit and chosen[labels[y, x]]:
                gaps[y + 1, x + 1] = 0
    return gaps


@njit(cache=True, nogil=True)
def _owners(
    labels: NDArray[np.int32], regions: NDArray[np.int32], count: int, n: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return a component (count,) on the border of each bounded region of gaps, and which of `n` are entangled (n,).

    `regions` (y + 2, x + 2): 0 is the mask itself, _OUTSIDE the region of the frame. If a hole of a component contains
    other pixels of the mask, a path from its border inwards meets them across a region that touches both, so
    inspecting borders finds every entangled component.
    """
    height, width = labels.shape
    owners = np.zeros(count, np.int32)
    entangled = np.zeros(n, np.bool_)
    for y in range(1, height + 1):
        for x in range(1, width + 1):
            region = regions[y, x]
            if region <= _OUTSIDE:
                continue
            for ny, nx in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
                if regions[ny, nx] == 0:
                    component = labels[ny - 1, nx - 1]
                    if owners[region] == 0:
                        owners[region] = component
                    elif owners[region] != component:
                        entangled[owners[region]] = entangled[component] = True
    return owners, entangled


@njit(cache=True, nogil=True)
def _filled(
    gaps: NDArray[np.uint8],
    labels: NDArray[np.int32],
    regions: NDArray[np.int32],
    owners: NDArray[np.int32],
    entangled: NDArray[np.bool_],
    any_entangled: bool,
) -> NDArray[np.uint8]:
    """Return the mask (y, x) uint8 with holes filled, without entangled components."""
    height, width = labels.shape
    filled = np.empty((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            filled[y, x] = 1 - gaps[y + 1, x + 1]
        for x in range(width):
            region = regions[y + 1, x + 1]
            if region > _OUTSIDE:
                filled[y, x] = not entangled[owners[region]]
            elif any_entangled and region == 0:
                filled[y, x] = not entangled[labels[y, x]]
    return filled


@njit(cache=True, nogil=True)
def _assigned(
    labels: NDArray[np.int32],
    regions: NDArray[np.int32],
    owners: NDArray[np.int32],
    markers: NDArray[np.int32],
    count: int,
) -> NDArray[np.int64]:
    """Return the component (m,) of each marker; erase small markers and pixels of other components in place."""
    height, width = labels.shape
    pixels = np.zeros(count, np.int64)
    for y in range(height):
        for x in range(width):
            if markers[y, x] > 0:
                pixels[markers[y, x]] += 1
    components = np.zeros(count, np.int64)
    for y in range(height):
        for x in range(width):
            marker = markers[y, x]
            if marker == 0:
                continue
            region = regions[y + 1, x + 1]
            own = region == 0 or owners[region] == labels[y, x]
            if own and pixels[marker] >= MIN_PIXELS:
                components[marker] = labels[y, x]
            else:
                markers[y, x] = 0
    return components


def _markers_alone(inside: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return the markers (y, x) int32 of the interior (y, x) of a single component, by the same steps."""
    marker = inside.view(np.uint8)
    outside = cv2.copyMakeBorder(marker, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(0,))
    cv2.floodFill(outside, None, (0, 0), (1,), flags=4)
    filled = marker | (outside[1:-1, 1:-1] == 0)
    opened = cv2.morphologyEx(filled, cv2.MORPH_OPEN, _ELLIPSE)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4, ltype=cv2.CV_32S)
    small = stats[:, cv2.CC_STAT_AREA] < MIN_PIXELS
    small[0] = False
    labels[small[labels]] = 0
    return np.asarray(labels, np.int32)
