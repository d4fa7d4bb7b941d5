"""HoVerNet's post-processing with its numbers as parameters, on maps of floats: for asking whether they are good ones.

The steps are the reference's (tiatoolbox's `HoVerNet._proc_np_hv`; see `hover_batch.nuclei.watershed`), by the
libraries' own functions over the whole image, some ten times slower than what slides go through, and nothing but the
search uses them. With the reference's numbers and stored maps they give what slides get, but for nested components.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.energy import HV_STEPS, SOBEL_SIZE
from hover_batch.nuclei.markers import MARKER_ENERGY, MIN_PIXELS
from hover_batch.nuclei.watershed import SobelConstants

Maps = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""Of the same pixels (y, x): nucleus probability, h and v in [-1, 1]."""


@dataclass(frozen=True)
class Numbers:
    """The numbers of the post-processing that are HoVerNet's, and not a model's."""

    nucleus: float = MapLayout.NP_NUCLEUS / 256
    """Foreground has at least this probability."""
    marker: float = MARKER_ENERGY
    """Foreground of less energy than this marks the inside of a nucleus."""
    sobel: int = SOBEL_SIZE
    """Side of the Sobel kernel."""
    opening: int = 5
    """Diameter of the ellipse that opens the markers; 0: they are not opened."""


def from_stored(planes: NDArray[np.uint8]) -> Maps:
    """Stored np, h and v (3, y, x) as the numbers that they stand for."""
    hv = planes[1:].view(np.int8).astype(np.float32) / HV_STEPS
    return planes[0].astype(np.float32) / 256, hv[0], hv[1]


def sobel(maps: Maps, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sobel_x(h) and Sobel_y(v) with a kernel of `size` pixels: (y, x) float64."""
    _, h, v = maps
    x = cv2.Sobel(h, cv2.CV_64F, 1, 0, ksize=size)
    return np.asarray(x), np.asarray(cv2.Sobel(v, cv2.CV_64F, 0, 1, ksize=size))


def extremes(maps: Maps, size: int) -> SobelConstants:
    """Those of the two Sobel maps over one image, as `SobelConstants.of_window` takes them of stored maps."""
    x, y = sobel(maps, size)
    return SobelConstants(float(x.min()), float(x.max()), float(y.min()), float(y.max()))


def instances_by(maps: Maps, constants: SobelConstants, numbers: Numbers) -> NDArray[np.int32]:
    """Instances (y, x) int32, 0 = background."""
    foreground = _large(maps[0] >= numbers.nucleus) > 0
    (scale_h, scale_v), (low_h, low_v) = constants.scaling
    x, y = sobel(maps, numbers.sobel)
    slope_h = (x * (scale_h * HV_STEPS) - low_h).astype(np.float32)  # `scaling` is that of stored steps
    slope_v = (y * (scale_v * HV_STEPS) - low_v).astype(np.float32)
    energy = np.maximum(np.maximum(1 - slope_h, 1 - slope_v), 0)
    energy[~foreground] = 1
    landscape = -cv2.GaussianBlur(1 - energy.astype(np.float64), (3, 3), 0)
    inside = ndimage.binary_fill_holes(foreground & (energy < numbers.marker)).astype(np.uint8)
    if numbers.opening:
        ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (numbers.opening, numbers.opening))
        inside = np.asarray(cv2.morphologyEx(inside, cv2.MORPH_OPEN, ellipse), np.uint8)
    flooded = watershed(landscape, _large(inside), mask=foreground)  # type: ignore[no-untyped-call]
    return np.asarray(flooded, np.int32)


def _large(mask: NDArray[np.bool_] | NDArray[np.uint8]) -> NDArray[np.int32]:
    """The 4-connected components of a mask (y, x) that have MIN_PIXELS pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S)
    small = stats[:, cv2.CC_STAT_AREA] < MIN_PIXELS
    labels[small[labels]] = 0
    return np.asarray(labels, np.int32)
