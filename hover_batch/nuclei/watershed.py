"""From maps to an instance map: HoVerNet's energy landscape, its markers, and flooding, one component at a time.

The steps are those of HoVerNet's post-processing (Graham et al. 2019, section 3.2; the reference is
`tiatoolbox.models.architecture.hovernet.HoVerNet._proc_np_hv`). Two things differ, so that a nucleus does not depend
on the window that it is looked at through:

- The extremes that scale the two Sobel maps are constants of the model rather than those of the window at hand.
  The reference's normalisation before the Sobel filter is left out: the filter is linear and its weights sum to
  zero, so the one after it cancels the first.
- Everything after the energy is done for one 4-connected component of the foreground at a time. Opening, labelling
  and flooding never leave a component anyway (the opening's ellipse and all neighbourhoods are 4-connected); only
  filling holes does. The reference fills a hole with all that lies in it, hence gives a component *nested* in another
  one's ring to the ring, and merges components that close a ring together by touching diagonally. Here each keeps
  its own.

Every number is exact, whatever the window: Sobel sums of bytes stay below 2^53; scaling is done pixel by pixel;
energies are `1 - float32`, hence multiples of 2^-24, and so their 3×3 blur loses no bit in float64. A component's
instances hang on no pixel further than REACH from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import watershed

from hover_batch.errors import PackageError
from hover_batch.geometry import Box
from hover_batch.model.heads import MapLayout

REACH = 11
"""Pixels beyond a component that bear on its instances: the Sobel radius of 10 at a diagonal neighbour, which the
blur looks at, and the 10 pixels of such a neighbour that tell whether it is large enough to count."""
SOBEL_SIZE = 21
MIN_PIXELS = 10
"""Components and markers of fewer pixels are dropped."""
MARKER_ENERGY = 0.4
"""Foreground of less energy than this marks the inside of a nucleus."""
HV_STEPS = 127
"""Stored integers per unit of h and v."""
_ELLIPSE = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
_ROOM = 3
"""Pixels of background around a component's crop, for the opening (2) and the blur (1)."""


@dataclass(frozen=True)
class SobelConstants:
    """Extremes that scale the 21×21 Sobel maps to [0, 1]: of h along x, of v along y, unscaled, h and v in [-1, 1]."""

    h_min: float
    h_max: float
    v_min: float
    v_max: float

    def __post_init__(self) -> None:
        if not (np.isfinite([self.h_min, self.h_max, self.v_min, self.v_max]).all()):
            raise PackageError(f"{self}: the Sobel constants must be finite; calibrate the model again")
        if self.h_min > self.h_max or self.v_min > self.v_max:
            raise PackageError(f"{self}: a minimum lies above its maximum; calibrate the model again")

    @classmethod
    def of_window(cls, h: NDArray[np.uint8], v: NDArray[np.uint8]) -> Self:
        """The extremes over one window (y, x) of stored maps, as the reference takes them."""
        low_h, high_h, _, _ = cv2.minMaxLoc(_sobel(h, 1, 0))
        low_v, high_v, _, _ = cv2.minMaxLoc(_sobel(v, 0, 1))
        return cls(low_h / HV_STEPS, high_h / HV_STEPS, low_v / HV_STEPS, high_v / HV_STEPS)

    def to_json(self) -> dict[str, float]:
        """For model cards; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        try:
            return cls(**{f.name: float(data[f.name]) for f in fields(cls)})
        except (KeyError, TypeError, ValueError) as error:
            raise PackageError(
                f"Sobel constants {dict(data)}: needs the numbers h_min, h_max, v_min and v_max"
            ) from error


@dataclass(frozen=True)
class Components:
    """The 4-connected components of the foreground of a window; row 0 of each array is the background."""

    labels: NDArray[np.int32]
    """(y, x), 0 = background."""
    bounds: NDArray[np.int64]
    """(n, 4): x0, y0, x1, y1, half-open, in the window's pixels."""
    pixels: NDArray[np.int64]
    """(n,): how many."""

    @classmethod
    def of(cls, np_map: NDArray[np.uint8]) -> Self:
        """Components of np ≥ 0.5 in a stored map (y, x)."""
        foreground = (np_map >= MapLayout.NP_NUCLEUS).view(np.uint8)
        _, labels, stats, _ = cv2.connectedComponentsWithStats(foreground, connectivity=4, ltype=cv2.CV_32S)
        stats = stats.astype(np.int64)
        x, y, width, height, pixels = stats.T
        return cls(labels.astype(np.int32, copy=False), np.stack([x, y, x + width, y + height], 1), pixels)

    @property
    def kept(self) -> NDArray[np.bool_]:
        """(n,): large enough to count; never the background."""
        kept = self.pixels >= MIN_PIXELS
        kept[0] = False
        return kept

    def box(self, component: int) -> Box:
        """The bounding box in the window's pixels."""
        x0, y0, x1, y1 = self.bounds[component].tolist()
        return Box(x0, y0, x1, y1)


def instance_map(
    np_map: NDArray[np.uint8], h: NDArray[np.uint8], v: NDArray[np.uint8], constants: SobelConstants | None
) -> NDArray[np.int32]:
    """Instances (y, x) int32, 0 = background, of one window of stored maps (y, x) as `MapLayout` quantises them.

    With `constants` the window is taken as a cut of a plane that is zero elsewhere, so that the maps of a whole
    canvas give the instances that any tiling of it gives. Without, Sobel maps are normalised by their own extremes
    and the window's edge is treated as the reference treats it.
    """
    if constants is None:
        components = Components.of(np_map)
        return split(np_map, h, v, components, components.kept, SobelConstants.of_window(h, v))
    frame = Box(0, 0, np_map.shape[1], np_map.shape[0])
    around = frame.expand(REACH)
    np_map, h, v = (np.pad(plane, REACH) for plane in (np_map, h, v))
    components = Components.of(np_map)
    rows, columns = frame.slices_in(around)
    return np.ascontiguousarray(split(np_map, h, v, components, components.kept, constants)[rows, columns])


def without_debris(instances: NDArray[np.int32], min_pixels: int) -> NDArray[np.int32]:
    """The instance map (y, x) without the instances of fewer pixels, the others renumbered 1 … n in their order."""
    kept = np.bincount(instances.ravel()) >= min_pixels
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0).astype(np.int32)[instances]


def split(
    np_map: NDArray[np.uint8],
    h: NDArray[np.uint8],
    v: NDArray[np.uint8],
    components: Components,
    chosen: NDArray[np.bool_],
    constants: SobelConstants,
) -> NDArray[np.int32]:
    """The `chosen` (n,) components of a window's `np_map` (y, x), each split into its instances: (y, x) int32.

    A component of one marker is one instance as a whole (flooding from one marker fills its component), one without
    markers is none. Exact for those that keep REACH pixels of distance to the window's edge.
    """
    energy = _energy(h, v, constants)
    kept = components.kept
    instances = np.zeros(np_map.shape, np.int32)
    last = 0
    frame = Box(0, 0, np_map.shape[1], np_map.shape[0])
    for component in np.flatnonzero(chosen & kept).tolist():
        crop = components.box(component).expand(_ROOM).intersect(frame).slices_in(frame)
        labels = components.labels[crop]
        own = labels == component
        markers = _markers(own & (energy[crop] < MARKER_ENERGY))
        markers[~own] = 0
        ids = np.unique(markers[markers > 0])
        if len(ids) == 0:
            continue
        if len(ids) == 1:
            instances[crop][own] = last + 1
        else:
            # Every component that counts shapes the landscape: a diagonal neighbour shows in the blur.
            inside = (1.0 - energy[crop].astype(np.float64)) * kept[labels]
            blurred = cv2.GaussianBlur(inside, (3, 3), 0)
            flooded = watershed(-blurred, markers=markers, mask=own)  # type: ignore[no-untyped-call]
            instances[crop][own] = last + np.searchsorted(ids, flooded[own]).astype(np.int32) + 1
        last += len(ids)
    return instances


def _sobel(plane: NDArray[np.uint8], dx: int, dy: int) -> NDArray[np.float64]:
    # Integer weights on integers below 2^53: float64 holds every sum exactly.
    signed = plane.view(np.int8).astype(np.int16)
    return np.asarray(cv2.Sobel(signed, cv2.CV_64F, dx, dy, ksize=SOBEL_SIZE), np.float64)


def _energy(h: NDArray[np.uint8], v: NDArray[np.uint8], constants: SobelConstants) -> NDArray[np.float32]:
    """max(1 - Sobel_x(h), 1 - Sobel_y(v)) with each Sobel map scaled to [0, 1], not below 0: (y, x) float32.

    High where the distances to the centroid jump from one nucleus to the next. Beyond the foreground it means nothing.
    """
    energy = _slope(_sobel(h, 1, 0), constants.h_min, constants.h_max)
    np.maximum(energy, _slope(_sobel(v, 0, 1), constants.v_min, constants.v_max), out=energy)
    return np.maximum(energy, 0, out=energy)


def _slope(sobel: NDArray[np.float64], low: float, high: float) -> NDArray[np.float32]:
    # A flat window has no extremes; the reference scales it to 0.
    scale = 1 / (high - low) if high > low else 0.0
    sobel *= scale / HV_STEPS
    sobel -= low * scale
    return np.float32(1) - sobel.astype(np.float32)


def _markers(inside: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Labels (y, x) int32 of the markers: holes filled, opened by the 5×5 ellipse, pieces of MIN_PIXELS or more."""
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
