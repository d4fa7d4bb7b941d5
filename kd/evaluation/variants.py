"""HoVerNet's post-processing with all its parameters variable, to test other values.

The steps are those of the reference (tiatoolbox's `HoVerNet._proc_np_hv`; see `hover_batch.nuclei.watershed`), written
with library functions over the whole image. This is about ten times slower than the code for slides, and is used only
in the search. With the reference's parameters and stored maps, the instances are equal to those on slides, except in
nested components.
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
"""Nucleus probability, h and v in [-1, 1], each (y, x)."""


@dataclass(frozen=True)
class Parameters:
    """Parameters of the post-processing, which HoVerNet fixes for all models; the defaults are HoVerNet's values."""

    nucleus: float = MapLayout.NP_NUCLEUS / 256
    """Smallest nucleus probability of foreground pixels."""
    marker: float = MARKER_ENERGY
    """Energy below which foreground pixels become markers."""
    sobel: int = SOBEL_SIZE
    """Side in pixels of the Sobel kernel."""
    opening: int = 5
    """Diameter in pixels of the ellipse that opens the markers; 0: no opening."""


def from_stored(planes: NDArray[np.uint8]) -> Maps:
    """Return np in [0, 1], and h and v in [-1, 1], each (y, x) float32, from stored planes.

    `planes`: stored planes np, h and v, (3, y, x) uint8 (see `MapLayout`).
    """
    hv = planes[1:].view(np.int8).astype(np.float32) / HV_STEPS
    return planes[0].astype(np.float32) / 256, hv[0], hv[1]


def sobel(maps: Maps, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Sobel_x(h) and Sobel_y(v), each (y, x) float64, not normalised.

    Borders are reflected about the outermost pixels.

    `maps`: np, h and v, each (y, x) float32. `size`: side of the kernel in pixels, odd and at most 31.
    """
    _, h, v = maps
    sobel_x = cv2.Sobel(h, cv2.CV_64F, 1, 0, ksize=size)
    sobel_y = cv2.Sobel(v, cv2.CV_64F, 0, 1, ksize=size)
    return np.asarray(sobel_x), np.asarray(sobel_y)


def extremes(maps: Maps, size: int) -> SobelConstants:
    """Return the minimum and maximum of both Sobel maps of one image.

    `SobelConstants.of_window` does the same for stored maps.

    `maps`: np, h and v, each (y, x) float32. `size`: side of the Sobel kernel in pixels, odd and at most 31.
    """
    x, y = sobel(maps, size)
    return SobelConstants(float(x.min()), float(x.max()), float(y.min()), float(y.max()))


def instances_by(maps: Maps, constants: SobelConstants, parameters: Parameters) -> NDArray[np.int32]:
    """Return the instances in the maps of one image, (y, x) int32, numbered 1 … n, 0 = background.

    `maps`: np, h and v, each (y, x) float32. `constants`: extremes by which the Sobel maps are scaled. `parameters`:
    all other parameters.
    """
    foreground = _large(maps[0] >= parameters.nucleus) > 0
    (scale_h, scale_v), (offset_h, offset_v) = constants.scaling
    x, y = sobel(maps, parameters.sobel)
    slope_h = (x * (scale_h * HV_STEPS) - offset_h).astype(np.float32)  # `scaling` is in units of stored steps
    slope_v = (y * (scale_v * HV_STEPS) - offset_v).astype(np.float32)
    energy = np.maximum(np.maximum(1 - slope_h, 1 - slope_v), 0)
    energy[~foreground] = 1
    landscape = -cv2.GaussianBlur(1 - energy.astype(np.float64), (3, 3), 0)
    markers = ndimage.binary_fill_holes(foreground & (energy < parameters.marker)).astype(np.uint8)
    if parameters.opening:
        ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (parameters.opening, parameters.opening))
        markers = np.asarray(cv2.morphologyEx(markers, cv2.MORPH_OPEN, ellipse), np.uint8)
    flooded = watershed(landscape, _large(markers), mask=foreground)  # type: ignore[no-untyped-call]
    return np.asarray(flooded, np.int32)


def _large(mask: NDArray[np.bool_] | NDArray[np.uint8]) -> NDArray[np.int32]:
    """Label the 4-connected components of a mask (y, x) that have at least MIN_PIXELS pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S)
    small = stats[:, cv2.CC_STAT_AREA] < MIN_PIXELS
    labels[small[labels]] = 0
    return np.asarray(labels, np.int32)
