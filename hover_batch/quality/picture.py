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
    """Return the measures `ink`, `brown`, `chroma` and `dark` of a thumbnail, by name.

    Thumbnails with pixels finer than 4 µm are first reduced to 4 µm per pixel, and the measures are taken of the
    reduced thumbnail. Pixels whose R, G and B are all at most 3 count as not scanned. Stained pixels are scanned, have
    an optical density above 0.2 in at least one channel, and differ by more than 20 between channels. Shares are from 0
    to 1.

    - `ink`: share of all pixels that have the colour of a pen (blue, green, red or black) and lie in spots of at least
      3 × 3 such pixels. Black pixels are scanned, have R, G and B below 60, and differ by less than 12 between
      channels.
    - `brown`: share of the stained pixels that absorb more blue than red, and over 10 % more blue than green, as DAB
      does; 0 if no pixel is stained.
    - `chroma`: 95th percentile of the largest of R, G and B minus the smallest (0 to 255), over the scanned pixels or
      over those of them whose R, G and B are below 200, whichever is larger, since a biopsy may cover less than 5 % of
      its slide; 0 if no pixel was scanned.
    - `dark`: share of all pixels whose R, G and B are below 200, including those that were not scanned.

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
    shaded = scanned & (high < 200)
    return {
        "ink": float(spots.mean()),
        "brown": float(brown.sum() / stained.sum()) if stained.any() else 0.0,
        "chroma": max((float(np.percentile(chroma[of], 95)) for of in (scanned, shaded) if of.any()), default=0.0),
        "dark": float((high < 200).mean()),
    }
