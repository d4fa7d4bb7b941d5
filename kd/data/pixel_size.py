"""The pixel size of annotated images, which a model must share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hover_batch.errors import InputError
from kd.data.samples import MPP

if TYPE_CHECKING:
    from hover_batch.model.package import Card


def check_pixel_size(card: Card, where: str) -> None:
    """Raise InputError, naming `where` (the option and its value), if the model is for pixels of another size."""
    if not math.isclose(card.mpp, MPP, rel_tol=0.02):
        raise InputError(
            f"{where}: is for pixels of {card.mpp:g} µm, but the annotated images have {MPP} µm; give another model"
        )
