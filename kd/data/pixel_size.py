"""Check that a model is for the pixel size of the annotated images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hover_batch.errors import InputError
from kd.data.samples import MPP

if TYPE_CHECKING:
    from hover_batch.model.card import Card


def check_pixel_size(card: Card, where: str) -> None:
    """Check that the model of `card` is for pixels of MPP (0.25 µm) ± 2 %.

    `where`: option that named the model, and its value, for the message.

    Raises InputError if the model is for pixels of another size.
    """
    if not math.isclose(card.mpp, MPP, rel_tol=0.02):
        raise InputError(
            f"{where}: is for pixels of {card.mpp:g} µm, but the annotated images have {MPP} µm; give another model"
        )
