"""Annotated images have pixels of one size, and so must what is run over them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hover_batch.errors import InputError
from kd.data.samples import MPP

if TYPE_CHECKING:
    from hover_batch.model.package import Card


def check_pixel_size(card: Card, said: str) -> None:
    """InputError where the model is for pixels of another size than the annotated images'."""
    if not math.isclose(card.mpp, MPP, rel_tol=0.02):
        raise InputError(f"{said}: is for pixels of {card.mpp:g} µm, the annotated images have {MPP} µm; take another")
