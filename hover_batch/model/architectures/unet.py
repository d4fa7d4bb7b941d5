"""Student: a U-Net with a Mix Vision Transformer encoder and all branches as channels of one output.

Source: HoVer-UNet (Tommasino et al., arXiv 2311.12553): encoder and decoder depth 5, single decoder.
The published weights are `smp.Unet('mit_b2', classes=10)` state dicts, which load into this network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hover_batch.errors import PackageError
from hover_batch.model.architectures.protocol import Architecture, Recognised
from hover_batch.model.card import Card
from hover_batch.model.heads import Heads


@dataclass(frozen=True)
class StudentArch:
    """Architecture of a student."""

    encoder: str = "mit_b0"
    """Encoder's name in segmentation-models-pytorch."""
    n_types: int = 5
    """Number of classes, background included."""


def build_student(arch: StudentArch) -> nn.Module:
    """Return a student network with random weights. Nothing is downloaded.

    The network takes RGB in [0, 1], float (batch, 3, y, x), y and x multiples of 32, and returns (batch, 4 + n_types,
    y, x) float in the layout of `hover_batch.model.heads`.

    `arch`: encoder, and number of classes with background. KeyError if the encoder is not known.
    """
    return build_unet(arch.encoder, Heads(arch.n_types).channels)


def build_unet(encoder: str, channels: int, activation: type[nn.Module] | None = None) -> nn.Module:
    """Return a U-Net with random weights. Nothing is downloaded.

    `encoder`: its name in segmentation-models-pytorch. `channels`: number of output channels. `activation`: module
    after the last layer; None for logits.

    KeyError if the encoder is not known.
    """
    import segmentation_models_pytorch as smp  # takes seconds

    model: nn.Module = smp.Unet(
        encoder, encoder_depth=5, encoder_weights=None, in_channels=3, classes=channels, activation=activation
    )
    return model


class UNet(Architecture):
    """Student. HoVer-UNet's checkpoints are recognised; their encoder is a Mix Vision Transformer."""

    name = "unet"

    def build(self, card: Card, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return a U-Net with the encoder and classes of `card` and random weights. `tensors` is ignored.

        PackageError if `tile_in` of the card is not a multiple of 32, KeyError if the encoder is not known.
        """
        if card.tile_in % 32:
            raise PackageError(
                f"package {card.name}: tile_in is {card.tile_in}; that of {self.name} is a multiple of 32"
            )
        return self.untrained(len(card.taxonomy.classes), encoder=card.encoder)

    def untrained(self, n_types: int, *, encoder: str, width: int = 0) -> nn.Module:
        """Return a student with random weights.

        `n_types`: number of classes, background included. `encoder`: its name in segmentation-models-pytorch. `width`
        is ignored. KeyError or another error of segmentation-models-pytorch if the encoder is not known or does not
        fit.
        """
        return build_student(StudentArch(encoder, n_types))

    def recognise(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Recognised | None:
        """Return the encoder and the number of types of a HoVer-UNet checkpoint; None if it holds another network.

        The encoder, mit_b0 … mit_b5, is recognised by its width and by the depth of its third stage.

        `tensors`: state dict of the checkpoint. `record` is not used. KeyError if tensors are missing or the encoder is
        not known.
        """
        if "encoder.patch_embed1.proj.weight" not in tensors:
            return None
        return Recognised(_encoder(tensors), len(tensors["segmentation_head.0.bias"]) - Heads(0).channels)


def _encoder(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the Mix Vision Transformer from the depth of its third stage and its width."""
    depth = len({name.split(".")[2] for name in tensors if name.startswith("encoder.block3.")})
    if depth == 2:
        return "mit_b0" if len(tensors["encoder.patch_embed1.proj.weight"]) == 32 else "mit_b1"
    return {6: "mit_b2", 18: "mit_b3", 27: "mit_b4", 40: "mit_b5"}[depth]


ARCHITECTURES = (UNet(),)
