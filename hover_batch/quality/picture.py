"""Measure the thumbnail of a slide: ink, brown stain, colour."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

PICTURE_MEASURES = ("ink", "brown", "chroma", "dark")
"""Names of the measures that `picture_measures` returns."""
_CELL_UM = 4.0
"""Minimum side of a pixel in µm: on finer pixels, dark nuclei look like black ink."""
_PADDING = 3
"""Brightness up to which pixels count as not scanned."""


def picture_measures(image: NDArray[np.uint8], pixel_um: float) -> dict[str, float]:
    """Return the measures of a thumbnail by name.

    Pixels finer than 4 µm are first reduced to this size; the measures refer to the reduced thumbnail. Pixels whose R,
    G and B are all at most 3 count as not scanned. Shares are from 0 to 1.

    - `ink`: share of the pixels with the colours of pens, in spots of at least 3 × 3 pixels: blue, green,
      red, and black, for which R, G and B must be nearly equal, all below 60, and scanned.
    - `brown`: share of the stained pixels that absorb blue most, as DAB does; 0 if no pixels are stained.
    - `chroma`: 95th percentile, over the scanned pixels, of the difference between the largest and the smallest of R, G
      and B (0 to 255); 0 if no pixels were scanned.
    - `dark`: share of the pixels whose R, G and B are all below 200, including those that were not scanned.

    `image`: RGB (y, x, 3) uint8, without drawings. `pixel_um`: side of its pixels in µm.
    """
    scale = min(1.0, pixel_um / _CELL_UM)
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    reduced = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    high = reduced.max(axis=2)
    chroma = high - reduced.min(axis=2)
    od_red, od_green, od_blue = -np.log10((np.moveaxis(reduced, 2, 0) + 1) / 256)
    scanned = high > _PADDING
    stained = scanned & (np.maximum(np.maximum(od_red, od_green), od_blue) > 0.2) & (chroma > 20)
    # Hematoxylin and eosin absorb green most; blue and green ink red, red ink blue as much as green.
    blue_or_green = (od_red > 1.3 * od_green) & (chroma > 70) | (od_red > 1.1 * od_green) & (chroma > 100)
    red = (od_red < 0.25) & (od_green > 0.5) & (od_blue > 0.75 * od_green) & (chroma > 130)
    black = (high < 60) & (chroma < 12) & scanned  # dark nuclei are purple
    spots = cv2.morphologyEx((blue_or_green | red | black).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    brown = stained & (od_blue > 1.1 * od_green) & (od_blue > od_red)
    return {
        "ink": float(spots.mean()),
        "brown": float(brown.sum() / stained.sum()) if stained.any() else 0.0,
        "chroma": float(np.percentile(chroma[scanned], 95)) if scanned.any() else 0.0,
        "dark": float((high < 200).mean()),
    }
