"""Splitters of the systems that cards name (see `hover_batch.model.heads.SYSTEMS`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hover_batch.config import SobelNorm
from hover_batch.model.card import Card
from hover_batch.nuclei.components import Splitter
from hover_batch.nuclei.dist import DynamicWatershed
from hover_batch.nuclei.labels import WholeComponents
from hover_batch.nuclei.mask_rcnn import JoinedPieces
from hover_batch.nuclei.watershed import SobelConstants

_SPLITTERS: dict[str, Callable[[Mapping[str, float]], Splitter]] = {
    "hover": SobelConstants.from_json,
    "dist": lambda _: DynamicWatershed(),
    "micronet": lambda _: WholeComponents(),
    "mask-rcnn": lambda _: JoinedPieces(),
}


def splitter(system: str, sobel: Mapping[str, float]) -> Splitter:
    """Return the post-processing of a system.

    `system`: key of `hover_batch.model.heads.SYSTEMS`. `sobel`: Sobel constants by name (see `Card.sobel`); ignored by
    systems without Sobel maps.

    KeyError if the system is not known, PackageError if its constants are invalid.
    """
    return _SPLITTERS[system](sobel)


def splitter_of(card: Card, sobel_norm: SobelNorm = "fixed") -> Splitter | None:
    """Return the post-processing of a model.

    The result is None for `sobel_norm` "window". `nuclei_of_region` and `instance_map` then apply HoVerNet's
    post-processing, with Sobel maps normalised by each window's extremes.

    `card`: card of the model. `sobel_norm`: "fixed" for the constants on the card, "window" for each window's extremes.

    InputError for "window" if the model has no Sobel maps, PackageError if the constants on the card are invalid.
    """
    card.check_sobel_norm(sobel_norm)
    return splitter(card.system, card.sobel) if sobel_norm == "fixed" else None
