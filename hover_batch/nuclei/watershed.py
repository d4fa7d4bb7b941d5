"""Instance maps from HoVerNet's maps by energy landscape, markers and flooding, one component at a time.

The steps are those of HoVerNet's post-processing (Graham et al. 2019, section 3.2; the reference is
`tiatoolbox.models.architecture.hovernet.HoVerNet._proc_np_hv`). Two things differ, so that a nucleus does not depend
on the window in which it is processed:

- The extremes that scale the two Sobel maps are constants of the model instead of those of the window.
  The reference's normalisation before the Sobel filter is omitted: the filter is linear and its weights sum to
  zero, so the normalisation after it cancels the first.
- Everything after the energy is done for one 4-connected component of the foreground at a time. Opening, labelling
  and flooding stay within a component anyway (the opening's ellipse and all neighbourhoods are 4-connected); only
  filling holes does not. The reference fills a hole with everything in it, so it assigns a component *nested* in a
  ring to the ring, and merges components that close a ring by touching diagonally. Here each keeps its own pixels.

All numbers are exact in every window: Sobel sums of bytes stay below 2^53; scaling is per pixel; energies are
`1 - float32`, hence multiples of 2^-24, so their 3×3 blur loses no bit in float64. A component's instances depend on no
pixel further than REACH from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import cv2
import numpy as np
from numba import njit
from numpy.typing import NDArray

from hover_batch.errors import PackageError
from hover_batch.geometry import Box
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.energy import HV_STEPS, energy_of, sobel_extremes
from hover_batch.nuclei.flood import fill_and_flood
from hover_batch.nuclei.markers import MIN_PIXELS, markers_of

REACH = 11
"""Distance in pixels within which a component's instances depend on the maps: the blur reads diagonal neighbours, whose
Sobel sums have a radius of 10, and whose component counts if it has at least 10 pixels."""


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
    """4-connected components of the foreground of a window, numbered from 1; row 0 of arrays is the background."""

    labels: NDArray[np.int32]
    """(y, x): component of each pixel, 0 = background."""
    bounds: NDArray[np.int64]
    """(n, 4): x0, y0, x1, y1, half-open, in pixels of the window."""
    pixels: NDArray[np.int64]
    """(n,): number of pixels of each component."""

    @classmethod
    def of(cls, np_map: NDArray[np.uint8]) -> Self:
        """Label the 4-connected components of the pixels with p ≥ 0.5. `np_map` (y, x) uint8: stored np."""
        foreground = (np_map >= MapLayout.NP_NUCLEUS).view(np.uint8)
        count, labels = cv2.connectedComponents(foreground, connectivity=4, ltype=cv2.CV_32S)
        return cls(np.asarray(labels, np.int32), *_extents(labels, count))

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
        return split_components(np_map, h, v, components, components.large, SobelConstants.of_window(h, v))
    frame = Box(0, 0, np_map.shape[1], np_map.shape[0])
    around = frame.expand(REACH)
    np_map, h, v = (np.pad(plane, REACH) for plane in (np_map, h, v))
    components = Components.of(np_map)
    rows, columns = frame.slices_in(around)
    return np.ascontiguousarray(split_components(np_map, h, v, components, components.large, constants)[rows, columns])


def without_debris(instances: NDArray[np.int32], min_pixels: int) -> NDArray[np.int32]:
    """Return the instances (y, x) int32 of at least `min_pixels` pixels, renumbered 1 … n in the order of their ids."""
    large = np.bincount(instances.ravel()) >= min_pixels
    large[0] = False
    return np.where(large, np.cumsum(large), 0).astype(np.int32)[instances]


def split_components(
    np_map: NDArray[np.uint8],
    h: NDArray[np.uint8],
    v: NDArray[np.uint8],
    components: Components,
    chosen: NDArray[np.bool_],
    constants: SobelConstants,
) -> NDArray[np.int32]:
    """Split the `chosen` (n,) components of a window into instances: (y, x) int32, 0 = background.

    `np_map`, `h`, `v` (y, x) uint8: stored maps of the window. A component with one marker becomes one instance
    (flooding from one marker fills its component); a component without markers is dropped. Instances are numbered by
    component, then by the first pixel of their marker. The result is independent of the window for components at least
    REACH pixels from its edge.
    """
    labels, bounds, large = components.labels, components.bounds, components.large
    # All components that are large enough enter the energy: the blur reads diagonal neighbours.
    energy = energy_of(h, v, large, labels, *constants.scaling)
    markers, owners = markers_of(labels, bounds, chosen & large, energy)
    return flood_components(components, energy, markers, owners)


def flood_components(
    components: Components, energy: NDArray[np.float32], markers: NDArray[np.int32], owners: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Grow the markers of each component into instances: (y, x) int32, 0 = background.

    `energy`, `markers` (y, x): see `energy_of` and `markers_of`. `owners` (m,): component of each marker, 0 for unused
    numbers.
    """
    n = len(components.bounds)
    used = np.flatnonzero(owners)
    ids = np.zeros(len(owners), np.int32)
    ids[used[np.argsort(owners[used], kind="stable")]] = np.arange(1, len(used) + 1)
    counts = np.bincount(owners[used], minlength=n)
    first_ids = (np.cumsum(counts) - counts + 1).astype(np.int32)
    instances = fill_and_flood(
        components.labels, components.bounds, components.pixels, energy, markers, ids, counts, first_ids
    )
    return np.asarray(instances, np.int32)


@njit(cache=True, nogil=True)
def _extents(labels: NDArray[np.int32], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return bounds (n, 4) x0, y0, x1, y1 and numbers of pixels (n,) of the labels 0 … n - 1 in (y, x), run by run."""
    height, width = labels.shape
    bounds = np.zeros((n, 4), np.int64)
    pixels = np.zeros(n, np.int64)
    for y in range(height):
        start = 0
        while start < width:
            i = labels[y, start]
            end = start + 1
            while end < width and labels[y, end] == i:
                end += 1
            if pixels[i] == 0:
                bounds[i, 0], bounds[i, 1], bounds[i, 2] = start, y, end
            bounds[i, 0] = min(bounds[i, 0], start)
            bounds[i, 2] = max(bounds[i, 2], end)
            bounds[i, 3] = y + 1
            pixels[i] += end - start
            start = end
    return bounds, pixels
