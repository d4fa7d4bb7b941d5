"""Instance maps from HoVerNet's maps by energy landscape, markers and flooding, one component at a time.

The steps are those of HoVerNet's post-processing (Graham et al. 2019, section 3.2; the reference is
`tiatoolbox.models.architecture.hovernet.HoVerNet._proc_np_hv`). Two things differ, so that a nucleus does not depend
on the window in which it is processed:

- The extremes that scale the two Sobel maps are constants of the model instead of those of the window.
  The reference's normalisation before the Sobel filter is omitted: the filter is linear and its weights sum to
  zero, so the normalisation after it cancels the first.
- Everything after the energy is done for one 4-connected component of the foreground at a time. Opening, labelling
  and flooding stay within a component anyway (the opening's ellipse and all neighbourhoods are 4-connected); only
  filling holes does not. The reference fills a hole with everything in it, so it assigns a component inside a ring to
  the ring, and merges components that touch diagonally and so enclose a hole. Here each keeps its own pixels.

All numbers are exact in every window: Sobel sums of bytes stay below 2^53; scaling is per pixel; energies are
`1 - float32`, hence multiples of 2^-24, so their 3×3 blur loses no bit in float64. A component's instances depend on no
pixel further than REACH from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hover_batch.errors import PackageError
from hover_batch.geometry import Box
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.energy import HV_STEPS, energy_around, sobel_extremes
from hover_batch.nuclei.flood import flood
from hover_batch.nuclei.markers import MIN_PIXELS, markers_of

REACH = 11
"""Distance in pixels within which a component's instances depend on the maps. The blur reads the energy of diagonal
neighbours, whose Sobel sums have a radius of 10. Whether such a neighbour is foreground depends on no more pixels,
since its own component must have at least MIN_PIXELS, 10."""


@dataclass(frozen=True)
class SobelConstants:
    """Extremes by which the 21×21 Sobel maps are scaled to [0, 1], with h and v in [-1, 1].

    PackageError unless all are finite and each minimum is at most its maximum.
    """

    h_min: float
    """Minimum of Sobel_x(h)."""
    h_max: float
    """Maximum of Sobel_x(h)."""
    v_min: float
    """Minimum of Sobel_y(v)."""
    v_max: float
    """Maximum of Sobel_y(v)."""

    def __post_init__(self) -> None:
        if not (np.isfinite([self.h_min, self.h_max, self.v_min, self.v_max]).all()):
            raise PackageError(f"{self}: the Sobel constants must be finite; calibrate the model again")
        if self.h_min > self.h_max or self.v_min > self.v_max:
            raise PackageError(f"{self}: a minimum lies above its maximum; calibrate the model again")

    @classmethod
    def of_window(cls, h: NDArray[np.uint8], v: NDArray[np.uint8]) -> Self:
        """Return the extremes over one window, as in the reference. `h`, `v` (y, x) uint8: stored maps."""
        return cls(*(sobel_extremes(h, v) / HV_STEPS).tolist())

    @property
    def scaling(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """((scale of h, of v), (offset of h, of v)): a Sobel sum s of stored steps is scaled to s·scale - offset.

        The scale is 0 if minimum and maximum are equal.
        """
        scale_h, scale_v = _scale(self.h_min, self.h_max), _scale(self.v_min, self.v_max)
        return (scale_h / HV_STEPS, scale_v / HV_STEPS), (self.h_min * scale_h, self.v_min * scale_v)

    def to_json(self) -> dict[str, float]:
        """Return the constants by name, for model cards; the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the constants that `to_json` gave as `data`. PackageError if a number is missing or invalid."""
        try:
            return cls(**{f.name: float(data[f.name]) for f in fields(cls)})
        except (KeyError, TypeError, ValueError) as error:
            raise PackageError(
                f"Sobel constants {dict(data)}: must be the numbers h_min, h_max, v_min and v_max"
            ) from error


def _scale(low: float, high: float) -> float:
    # The reference scales a constant map to 0.
    return 1 / (high - low) if high > low else 0.0


@dataclass(frozen=True)
class Components:
    """4-connected components of the foreground of a window, numbered by their first pixels in raster order.

    Row 0 of each array is that of the background, whose values are not used.
    """

    labels: NDArray[np.int32]
    """(y, x): component of each pixel, 0 = background."""
    bounds: NDArray[np.int64]
    """(n, 4): x0, y0, x1, y1, half-open, in pixels of the window."""
    pixels: NDArray[np.int64]
    """(n,): number of pixels of each component."""

    @classmethod
    def of(cls, np_map: NDArray[np.uint8]) -> Self:
        """Label the 4-connected components of the pixels with np ≥ 0.5 in a stored map (y, x)."""
        return cls(*_labelled(np.ascontiguousarray(np_map), MapLayout.NP_NUCLEUS))

    @property
    def large(self) -> NDArray[np.bool_]:
        """Whether each component has at least MIN_PIXELS pixels; False for the background: (n,) bool."""
        large = self.pixels >= MIN_PIXELS
        large[0] = False
        return large

    def box(self, component: int) -> Box:
        """Return the bounding box of the component numbered `component`, in pixels of the window."""
        x0, y0, x1, y1 = self.bounds[component].tolist()
        return Box(x0, y0, x1, y1)


def instance_map(
    np_map: NDArray[np.uint8], h: NDArray[np.uint8], v: NDArray[np.uint8], constants: SobelConstants | None
) -> NDArray[np.int32]:
    """Return the instances (y, x) int32, 0 = background, of a window of stored maps (y, x) uint8 (see `MapLayout`).

    Instances are numbered 1 … n. With `constants`, the maps count as zero outside of the window, so that a whole canvas
    gives the same instances as any tiling of it. With None, the Sobel maps are normalised by their own extremes, and
    the window's edge is treated as in the reference.
    """
    if constants is None:
        components = Components.of(np_map)
        return split_components(h, v, components, components.large, SobelConstants.of_window(h, v))
    np_map, h, v = (np.pad(plane, REACH) for plane in (np_map, h, v))
    components = Components.of(np_map)
    padded = split_components(h, v, components, components.large, constants)
    return np.ascontiguousarray(padded[REACH:-REACH, REACH:-REACH])


def without_debris(instances: NDArray[np.int32], min_pixels: int) -> NDArray[np.int32]:
    """Return the instances (y, x) int32 with at least `min_pixels` pixels, renumbered 1 … n in the order of their ids.

    `instances` (y, x): 0 = background. Smaller instances become background.
    """
    large = np.bincount(instances.ravel()) >= min_pixels
    large[0] = False
    new_ids = np.where(large, np.cumsum(large), 0).astype(np.int32)
    return new_ids[instances]


def split_components(
    h: NDArray[np.uint8],
    v: NDArray[np.uint8],
    components: Components,
    chosen: NDArray[np.bool_],
    constants: SobelConstants,
) -> NDArray[np.int32]:
    """Split the `chosen` (n,) components of a window into instances: (y, x) int32, 0 = background.

    `h`, `v` (y, x): stored maps. A component with one marker becomes one instance (flooding from one marker fills its
    component); a component without markers, or of fewer than MIN_PIXELS pixels, is dropped. Instances are numbered by
    component, then by the first pixel of their marker. The result is exact for components at least REACH pixels from
    the window's edge.
    """
    # All components that are large enough enter the energy: the blur reads diagonal neighbours.
    large = components.large
    signed = (np.ascontiguousarray(plane).view(np.int8) for plane in (h, v))
    instances = _split(*signed, components.labels, components.bounds, large, chosen & large, *constants.scaling)
    return np.asarray(instances, np.int32)


@njit(cache=True, nogil=True)
def _split(
    h: NDArray[np.int8],
    v: NDArray[np.int8],
    labels: NDArray[np.int32],
    bounds: NDArray[np.int64],
    large: NDArray[np.bool_],
    chosen: NDArray[np.bool_],
    scales: tuple[float, float],
    offsets: tuple[float, float],
) -> NDArray[np.int32]:
    """Return the instances of the `chosen` components, as `split_components` does.

    `bounds` (n, 4): bounding boxes of the components. `large` (n,): whether each is in the foreground of the energy.
    """
    height, width = labels.shape
    instances = np.zeros((height, width), np.int32)
    numbered = 0
    for component in np.flatnonzero(chosen):
        x0, y0, x1, y1 = bounds[component]
        own = labels[y0:y1, x0:x1] == component
        energy = energy_around(h, v, large, labels, (x0, y0, x1, y1), scales, offsets)
        markers, number = markers_of(own, energy, (x0 == 0, y0 == 0, x1 == width, y1 == height))
        if number > 1:
            markers = flood(own, energy, markers)
        if number > 0:
            for y in range(y0, y1):
                for x in range(x0, x1):
                    if own[y - y0, x - x0]:
                        instances[y, x] = numbered + (markers[y - y0, x - x0] if number > 1 else 1)
        numbered += number
    return instances


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
