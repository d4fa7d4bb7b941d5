"""What an architecture says about its networks, so that nothing else in the program needs to know them.

A network maps RGB in [0, 1], float (b, 3, y, x), to one tensor (b, channel, y, x) with the channels of
`hover_batch.model.heads`: two logits of np, h and v, one logit per class. Systems other than HoVerNet's store something
else in h and v. An architecture whose weights expect another
scaling of the input, or give their channels in another order or after an activation, adapts them in its module. The
output covers the centre of the input; it may be smaller by a margin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hover_batch.config import InferSettings
from hover_batch.model.card import Card


@dataclass(frozen=True)
class Recognised:
    """Network in a checkpoint, as its tensors' names and shapes show it."""

    encoder: str
    """Variant of the architecture for the card; empty if it has none."""
    types: int
    """Number of channels of the type branch, background included; 0 without one."""


class Architecture(ABC):
    """Architecture of networks: how they are built, tiled and recognised."""

    name: str
    """Name in cards."""
    system: str = "hover"
    """What its networks learn and how their output becomes nuclei: a key of `hover_batch.model.heads.SYSTEMS`."""
    tile: tuple[int, int] = (320, 256)
    """`tile_in` and `tile_out` in pixels of new packages. The margin of 32 px is one pixel of the features at 1/32."""
    batch: int = InferSettings.batch
    """Suitable number of tiles per batch on a CPU; small for networks with large features."""
    patch_side: int = 256
    """Side in pixels of the patches on which published networks are compared."""

    @abstractmethod
    def build(self, card: Card, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return the network that `card` describes, with any weights.

        `tensors`: the state dict that will be loaded strictly, whose shapes may decide what the card leaves open; None
        for the published form of the card's classes and encoder. PackageError, or KeyError and the other errors that
        `load_network` names, if card and tensors do not fit each other or this architecture.
        """

    def recognise(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Recognised | None:
        """Return what the state dict of a checkpoint is, or None if it is not of this architecture.

        `record`: everything else in the checkpoint, such as settings of its training. KeyError, IndexError and the like
        if a part of the network is missing or has the wrong shape; PackageError for a form that cannot be imported.
        """
        return None
