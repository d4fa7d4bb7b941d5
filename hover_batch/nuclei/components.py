"""Components of a window's foreground, and what a system does with them.

A *system* is a way to find nuclei: what its network learns, what is stored of its output, and how the stored maps
become instances. All systems store the probability of a nucleus and of the classes (see `MapLayout`), so that all
share the components and their measurements. They differ in the planes h and v, and in how a component is split into
instances, which is a `Splitter`. What is computed for each component alone does not depend on where seams fall.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hover_batch.geometry import Box
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.markers import MIN_PIXELS


@dataclass(frozen=True)
class Components:
    """4-connected components of the foreground of a window, numbered by their first pixels in raster order.

    Row 0 of each array belongs to the background; its values are not used.
    """

    labels: NDArray[np.int32]
    """(y, x): component of each pixel, 0 = background."""
    bounds: NDArray[np.int64]
    """(n, 4): x0, y0, x1, y1, half-open, in pixels of the window."""
    pixels: NDArray[np.int64]
    """(n,): number of pixels of each component."""

    @classmethod
    def of(cls, np_map: NDArray[np.uint8]) -> Self:
        """Return the 4-connected components of a window's foreground.

        Foreground pixels have a probability of nucleus of at least 0.5. `np_map`: stored plane np (y, x) uint8.
        """
        return cls(*_labelled(np.ascontiguousarray(np_map), MapLayout.NP_NUCLEUS))

    @property
    def large(self) -> NDArray[np.bool_]:
        """True for each component with at least MIN_PIXELS (10) pixels, (n,) bool; False for the background."""
        large = self.pixels >= MIN_PIXELS
        large[0] = False
        return large

    def box(self, component: int) -> Box:
        """Return the bounding box of a component in pixels of the window. `component`: number of the component."""
        x0, y0, x1, y1 = self.bounds[component].tolist()
        return Box(x0, y0, x1, y1)


class Splitter(Protocol):
    """Post-processing of one system: how components become instances."""

    def split(self, planes: NDArray[np.uint8], components: Components, chosen: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Split components of a window into instances. Return the instances (y, x) int32, 0 = background.

        Instances are numbered 1 … n without gaps. Components of fewer than MIN_PIXELS pixels are dropped. The result is
        exact for components at least `regions.MARGIN` (16) pixels from the window's edge.

        `planes` (2, y, x) uint8: stored planes h and v. `components`: components of the same window. `chosen` (n,):
        whether each component is split; the others become background.
        """


def without_debris(instances: NDArray[np.int32], min_pixels: int) -> NDArray[np.int32]:
    """Return the instances (y, x) int32 with at least `min_pixels` pixels, renumbered 1 … n in the order of their ids.

    Smaller instances become background. `instances` (y, x) int32: 0 = background.
    """
    large = np.bincount(instances.ravel()) >= min_pixels
    large[0] = False
    new_ids = np.where(large, np.cumsum(large), 0).astype(np.int32)
    return new_ids[instances]


@njit(cache=True, nogil=True)
def _labelled(
    np_map: NDArray[np.uint8], threshold: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Label the 4-connected components of the pixels ≥ `threshold`, run by run; return the fields of Components.

    A run is joined to the runs that it touches in the row above. Joined runs are identified by the first of them, so
    components are numbered by their first pixels in raster order, as OpenCV does.
    """
    height, width = np_map.shape
    runs = _runs(np_map, threshold)
    size = len(runs)
    above = 0
    for r in range(size):
        y, x0, x1, _ = runs[r]
        while runs[above, 0] < y - 1 or (runs[above, 0] == y - 1 and runs[above, 2] <= x0):
            above += 1
        touching = above
        while runs[touching, 0] == y - 1 and runs[touching, 1] < x1:
            a, b = _first_of(runs, r), _first_of(runs, touching)
            runs[max(a, b), 3] = min(a, b)
            touching += 1
    labels = np.zeros((height, width), np.int32)
    component_of_run = np.zeros(size, np.int64)
    n = 1
    for r in range(size):
        if runs[r, 3] == r:
            component_of_run[r] = n
            n += 1
        else:
            component_of_run[r] = component_of_run[_first_of(runs, r)]
    bounds = np.zeros((n, 4), np.int64)
    pixels = np.zeros(n, np.int64)
    bounds[1:, 0] = width
    for r in range(size):
        y, x0, x1, _ = runs[r]
        i = component_of_run[r]
        labels[y, x0:x1] = i
        if pixels[i] == 0:
            bounds[i, 1] = y
        bounds[i, 0] = min(bounds[i, 0], x0)
        bounds[i, 2] = max(bounds[i, 2], x1)
        bounds[i, 3] = y + 1
        pixels[i] += x1 - x0
    return labels, bounds, pixels


@njit(cache=True, nogil=True)
def _runs(np_map: NDArray[np.uint8], threshold: int) -> NDArray[np.int64]:
    """Return the horizontal runs (n, 4) of pixels ≥ `threshold`, in raster order: y, x0, x1, and the run's number."""
    height, width = np_map.shape
    limit = np.uint8(threshold)
    size = 0
    for y in range(height):
        was_inside = False
        for x in range(width):
            inside = np_map[y, x] >= limit
            size += inside and not was_inside
            was_inside = inside
    runs = np.empty((size, 4), np.int64)
    size = 0
    for y in range(height):
        row = np_map[y]
        x = 0
        while x < width:
            if row[x] < limit:
                x += 1
                continue
            runs[size, 0], runs[size, 1], runs[size, 3] = y, x, size
            while x < width and row[x] >= limit:
                x += 1
            runs[size, 2] = x
            size += 1
    return runs


@njit(cache=True, nogil=True)
def _first_of(runs: NDArray[np.int64], r: int) -> int:
    """Return the first run of the component of run `r`. The links that lead to it are shortened."""
    while runs[r, 3] != r:
        runs[r, 3] = runs[runs[r, 3], 3]
        r = runs[r, 3]
    return r
