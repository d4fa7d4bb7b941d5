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
from hover_batch.nuclei.components import Components, Splitter
from hover_batch.nuclei.energy import HV_STEPS, energy_around, sobel_extremes
from hover_batch.nuclei.flood import flood
from hover_batch.nuclei.markers import markers_of

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
        """Return the extremes of the Sobel maps of one window, by which the reference implementation normalises them.

        `h`, `v` (y, x) uint8: stored planes of the window.
        """
        return cls(*(sobel_extremes(h, v) / HV_STEPS).tolist())

    @property
    def scaling(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Scales and offsets of the Sobel maps: ((scale_h, scale_v), (offset_h, offset_v)).

        A Sobel sum s of stored steps is scaled to s·scale - offset. A scale is 0 if minimum and maximum are equal.
        """
        scale_h, scale_v = _scale(self.h_min, self.h_max), _scale(self.v_min, self.v_max)
        return (scale_h / HV_STEPS, scale_v / HV_STEPS), (self.h_min * scale_h, self.v_min * scale_v)

    def split(self, planes: NDArray[np.uint8], components: Components, chosen: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Split components of a window into instances. Return the instances (y, x) int32, 0 = background.

        A component with one marker becomes one instance, because flooding from one marker fills its component. A
        component without markers, or of fewer than MIN_PIXELS (10) pixels, is dropped. Instances are numbered 1 … n by
        component, then by the first pixel of their marker. The result is exact for components at least REACH (11)
        pixels from the window's edge.

        `planes` (2, y, x) uint8: stored planes h and v. `components`: components of the same window. `chosen` (n,):
        whether each component is split; the others become background.
        """
        # All components that are large enough enter the energy: the blur reads diagonal neighbours.
        large = components.large
        h, v = np.ascontiguousarray(planes).view(np.int8)
        instances = _split(h, v, components.labels, components.bounds, large, chosen & large, *self.scaling)
        return np.asarray(instances, np.int32)

    def to_json(self) -> dict[str, float]:
        """Return the numbers h_min, h_max, v_min and v_max by name, for model cards; the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the constants from `data`, as `to_json` returns them.

        `data`: the numbers h_min, h_max, v_min and v_max by name. PackageError if one of them is missing or invalid.
        """
        try:
            return cls(**{f.name: float(data[f.name]) for f in fields(cls)})
        except (KeyError, TypeError, ValueError) as error:
            raise PackageError(
                f"Sobel constants {dict(data)}: must be the numbers h_min, h_max, v_min and v_max"
            ) from error


def _scale(low: float, high: float) -> float:
    # The reference scales a constant map to 0.
    return 1 / (high - low) if high > low else 0.0


def instance_map(
    np_map: NDArray[np.uint8], h: NDArray[np.uint8], v: NDArray[np.uint8], splitter: Splitter | None
) -> NDArray[np.int32]:
    """Return the instances of a window, (y, x) int32, numbered 1 … n, 0 = background.

    With a `splitter`, the maps count as zero outside of the window. A whole canvas then gives the same instances as any
    tiling of it. Without one, h, v and the energy are reflected beyond the window's edge, as in the reference
    implementation.

    `np_map`, `h`, `v` (y, x) uint8: stored planes (see `MapLayout`). `splitter`: post-processing of the model's system;
    None for HoVerNet's with Sobel maps normalised by their own extremes.
    """
    if splitter is None:
        components = Components.of(np_map)
        return SobelConstants.of_window(h, v).split(np.stack([h, v]), components, components.large)
    planes = np.pad(np.stack([h, v]), [(0, 0), (REACH, REACH), (REACH, REACH)])
    components = Components.of(np.pad(np_map, REACH))
    padded = splitter.split(planes, components, components.large)
    return np.ascontiguousarray(padded[REACH:-REACH, REACH:-REACH])


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
    """Return the instances of the `chosen` components, as `SobelConstants.split` does.

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
