"""Micro-Net's instances: each component is a nucleus.

Source: Raza et al. 2019, Medical Image Analysis 52, 160–173, and `MicroNet.postproc` of tiatoolbox. The network learns
gaps between nuclei that touch, so nothing has to be split. The outline of a nucleus is that of its component, holes
filled; holes do not count for its area.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hover_batch.nuclei.components import Components


class WholeComponents:
    """Splitter of Micro-Net."""

    def split(self, planes: NDArray[np.uint8], components: Components, chosen: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Return components of a window as one instance each, (y, x) int32, numbered 1 … n, 0 = background.

        Components of fewer than MIN_PIXELS (10) pixels are dropped.

        `planes` is not used. `components`: components of the window. `chosen` (n,): whether each component is kept; the
        others become background.
        """
        kept = chosen & components.large
        return np.where(kept, np.cumsum(kept), 0).astype(np.int32)[components.labels]
