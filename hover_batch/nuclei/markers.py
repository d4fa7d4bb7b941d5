"""Markers: the calm insides of nuclei, holes filled, opened, and labelled.

The reference does this to the mask of the whole window. Here each component is to be taken by itself, which gives the
same except where something lies in a ring (see watershed.py). All components are still done at once, because for
almost all of them the whole window's mask says the same as their own:

- A bounded gap of the mask whose rim belongs to one component is a hole of that component, and all holes with no
  other marker in them are found so. Where a rim belongs to two or more (a ring with something in it, a ring closed
  diagonally) those components are *entangled*, and are done one by one in their own crops.
- The opening's ellipse is 4-connected, and so are components. Filled masks of components that are not entangled
  never touch along an edge, so the ellipse lies in one of them wherever it fits, and so do connected pieces.
"""

from __future__ import annotations

import cv2
import numpy as np
from numba import njit
from numpy.typing import NDArray

MARKER_ENERGY = 0.4
"""Foreground of less energy than this marks the inside of a nucleus."""
MIN_PIXELS = 10
"""Components and markers of fewer pixels are dropped."""
_ELLIPSE = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
_OUTSIDE = 1
"""The region of gaps around everything: OpenCV numbers regions in raster order, and the frame comes first."""
_ROOM = 3
"""Pixels around an entangled component's crop: the opening's radius and one more."""


def markers_of(
    labels: NDArray[np.int32], bounds: NDArray[np.int64], chosen: NDArray[np.bool_], energy: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Markers (y, x) int32 of the `chosen` (n,) components of `labels` (y, x), and the component of each number (m,).

    0 is no marker, and the component of a number that is not in use. Within a component, numbers rise in the raster
    order of the markers' first pixels. `bounds` (n, 4): x0, y0, x1, y1 of each component.
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
    components = _settle(labels, regions, owners, markers, count)
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
    """1 where there is no calm inside of a chosen component: (y + 2, x + 2), a frame of 1 around the window."""
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
    """A component (count,) on the rim of each bounded region of gaps; which of the `n` components are entangled (n,).

    `regions` (y + 2, x + 2): 0 is the mask itself, _OUTSIDE what the frame belongs to. If a hole of a component holds
    other pixels of the mask, walking from its rim inwards one meets them across a region that touches both: so
    looking at rims finds every entangled component.
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
    """The mask with its holes (y, x), entangled components left out."""
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
def _settle(
    labels: NDArray[np.int32],
    regions: NDArray[np.int32],
    owners: NDArray[np.int32],
    markers: NDArray[np.int32],
    count: int,
) -> NDArray[np.int64]:
    """The component (m,) of each marker; small markers, and what is not of its component, are wiped in place."""
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
    """The same steps for the mask (y, x) of one component: labels (y, x) int32."""
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
