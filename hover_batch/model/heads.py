"""Channel layout of a network's output, shared by training, inference and post-processing.

One tensor (batch, channel, y, x) carries all HoVerNet branches, as in HoVer-UNet (arXiv 2311.12553, section 2):

====== =============== =======================================================================
branch channels        meaning
====== =============== =======================================================================
np     0, 1            logits: background, nucleus
hv     2, 3            linear, in [-1, 1]: h (signed distance to the centroid along x), v (y)
tp     4 … 4 + n - 1   logits of the classes in the taxonomy's order, background first
====== =============== =======================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

NP = slice(0, 2)
HV = slice(2, 4)
_TP_START = 4


@dataclass(frozen=True)
class System:
    """What a network learns, and how its output becomes nuclei."""

    planes: tuple[str, str]
    """Names of its planes h and v in stored maps."""
    seam_exact: bool = True
    """Whether a nucleus depends on its own connected component alone. False if it is found in each tile that it meets,
    and the pieces are joined by overlap."""
    torch_only: bool = False
    """Whether only torch can run its networks, because the work depends on what is in the image."""


SYSTEMS: Mapping[str, System] = MappingProxyType(
    {
        "hover": System(("h", "v")),
        "dist": System(("distance", "unused_v")),
        "micronet": System(("unused_h", "unused_v")),
        "mask-rcnn": System(("to_centre_x", "to_centre_y"), seam_exact=False, torch_only=True),
    }
)
"""System by its name in cards: HoVerNet's, DIST's (h is the distance to the nucleus's edge divided by DISTANCE_PX),
Micro-Net's, and Mask R-CNN's (h and v are the distances to the centre of the nucleus's box divided by CENTRE_PX)."""
DISTANCE_PX = 32
"""Largest distance to the edge of a nucleus in pixels that DIST stores; a stored step is a quarter of a pixel."""
CENTRE_PX = 127
"""Largest distance to the centre of a nucleus in pixels that Mask R-CNN stores; a stored step is a pixel."""


@dataclass(frozen=True)
class Heads:
    """Channel layout of a network's output for `n_types` classes (see the module's docstring)."""

    n_types: int
    """Number of classes, background included."""

    @property
    def tp(self) -> slice:
        """Channels of the output with the class logits, background first: 4 … 4 + n_types - 1."""
        return slice(_TP_START, _TP_START + self.n_types)

    @property
    def channels(self) -> int:
        """Number of channels of the network's output, 4 + n_types."""
        return _TP_START + self.n_types


@dataclass(frozen=True)
class MapLayout:
    """Planes of the quantised maps (plane, y, x) uint8 that inference stores and post-processing reads.

    ============ ======================= =====================================================================
    plane        index                   value
    ============ ======================= =====================================================================
    np           0                       min(255, floor(256·p)); nucleus ⇔ ≥ 128, exact
    h, v         1, 2                    round(127·clip(x, -1, 1)) as a two's-complement byte (view as int8);
                                         their meaning depends on the system (see SYSTEMS)
    tp           3 … 3 + n - 1           round(255·p) of each class's softmax, background first; 0 where np < 64
    hematoxylin  3 + n                   min(255, round(OD_SCALE·density)); 0 where np < 64
    eosin        4 + n                   the same for eosin
    ============ ======================= =====================================================================
    """

    n_types: int
    """Number of classes, background included."""

    NP = 0
    H = 1
    V = 2
    OD_SCALE = 80
    """Steps per unit of optical density; the maximum 255 / 80 = 3.19 is above what a scanner resolves."""
    NP_NUCLEUS = 128
    """Stored np from which a pixel is foreground: p ≥ 0.5."""
    NP_NEAR = 64
    """Stored np from which classes and densities are stored: all nuclei, and a margin for other thresholds."""

    @property
    def tp(self) -> slice:
        """Planes of the maps with the class probabilities, background first: 3 … 3 + n_types - 1."""
        return slice(3, 3 + self.n_types)

    @property
    def hematoxylin(self) -> int:
        """Index of the plane of the hematoxylin density, 3 + n_types."""
        return 3 + self.n_types

    @property
    def eosin(self) -> int:
        """Index of the plane of the eosin density, 4 + n_types."""
        return 4 + self.n_types

    @property
    def planes(self) -> int:
        """Number of planes of the maps, 5 + n_types."""
        return 5 + self.n_types

    def merge(self, maps: NDArray[np.uint8], ids: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return a copy of maps in which classes are merged, (plane, y, x) uint8 in the layout MapLayout(max(ids) + 1).

        The probabilities of classes with the same new id are added. Sums that rounding brings above 1 are clipped.

        `maps`: (plane, y, x) uint8 in this layout. `ids` (n_types): new id of each class, background included, in the
        order of the old ids. ValueError if `ids` has another length.
        """
        sums = np.zeros((max(ids) + 1, *maps.shape[1:]), np.uint16)
        for plane, new_id in zip(maps[self.tp], ids, strict=True):
            sums[new_id] += plane
        merged_planes = np.minimum(sums, 255).astype(np.uint8)
        return np.concatenate([maps[: self.tp.start], merged_planes, maps[self.tp.stop :]])

    def names(self, classes: tuple[str, ...], system: str = "hover") -> list[str]:
        """Return the names of all planes in order, for the attributes of the stored maps.

        They are np, the system's names of h and v, tp_NAME for each class, hematoxylin and eosin.

        `classes` (n_types): names of the classes, background first. `system`: a key of SYSTEMS; KeyError for others.
        """
        return ["np", *SYSTEMS[system].planes, *(f"tp_{name}" for name in classes), "hematoxylin", "eosin"]
