"""Base class of architectures: everything that the rest of the program needs to know about their networks.

A network maps RGB in [0, 1], float (b, 3, y, x), to one tensor (b, channel, y, x) with the channels of
`hover_batch.model.heads`: two logits of np, h and v, one logit per class. Systems other than HoVerNet's store something
else in h and v. If published weights need another scaling of the input, or return the channels in another order or
after an activation, the network converts them itself. The output covers the centre of the input and may be smaller than
it by a margin.
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
    """Network that was recognised in a checkpoint by the names and shapes of its tensors."""

    encoder: str
    """Variant of the architecture for the card; empty if it has none."""
    types: int
    """Number of channels of the type branch, background included; 0 without one."""


class Architecture(ABC):
    """Architecture of networks: how they are built, tiled and recognised."""

    name: str
    """Name in model cards: that of the file, or one that begins with it and a hyphen."""
    system: str = "hover"
    """What its networks learn and how their output becomes nuclei: a key of `hover_batch.model.heads.SYSTEMS`."""
    tile: tuple[int, int] = (320, 256)
    """`tile_in` and `tile_out` of new packages, in pixels. The margin of 32 is one pixel of the features at 1/32."""
    batch: int = InferSettings.batch
    """Suitable number of tiles per batch on a CPU; small for networks with large features."""
    patch_side: int = 256
    """Side in pixels of the patches on which published networks are compared; 0: that of a tile."""

    @abstractmethod
    def build(self, card: Card, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return the network that `card` describes. Its weights do not matter, because they are loaded afterwards.

        `card`: card with the encoder, the classes and the tile sizes. `tensors`: state dict that will be loaded
        strictly; its shapes may decide what the card does not state. None for the published form with the card's
        classes and encoder.

        PackageError, KeyError or another error of the libraries if card and tensors do not fit each other or this
        architecture; `load_network` converts all of them to PackageError.
        """

    def untrained(self, n_types: int, *, encoder: str, width: int) -> nn.Module:
        """Return a network with random weights, in training mode, for `kd train`.

        `n_types`: number of classes, background included. `encoder`, `width`: values of --encoder and --width of `kd
        train`; an architecture ignores the one that it does not have. NotImplementedError for architectures that `kd
        train` cannot train, KeyError or another error of segmentation-models-pytorch if the encoder is not known or
        does not fit.
        """
        raise NotImplementedError(f"{self.name} cannot be trained")

    def recognise(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Recognised | None:
        """Return the encoder and the number of types of a checkpoint, or None if it is of another architecture.

        `tensors`: state dict of the checkpoint. `record`: everything else in it, such as the settings of its training.

        KeyError, IndexError or a similar error if a part of the network is missing or has a wrong shape; PackageError
        for a form that cannot be imported.
        """
        return None
