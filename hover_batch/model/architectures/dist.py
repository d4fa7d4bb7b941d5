"""DIST: a U-Net that regresses the distance of each nucleus's pixels to its edge and also classifies pixels.

Source: Naylor et al. 2018, IEEE Transactions on Medical Imaging 38(2). The classes are those of HoVerNet's comparison:
channels after that of the distance, with a softmax (`src/model/dist.py` of vqdang/hover_net). Here the U-Net is
segmentation-models-pytorch's, so that encoders and their ImageNet weights are those of the students.

DIST predicts no probability of a nucleus. Its foreground are the pixels with a distance of EDGE_PX and more, so np is a
steep function of the distance that is ½ there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hover_batch.errors import PackageError
from hover_batch.model.architectures.protocol import Architecture
from hover_batch.model.architectures.unet import StudentArch
from hover_batch.model.card import Card
from hover_batch.model.heads import DISTANCE_PX

EDGE_PX = 0.5
"""Smallest distance in pixels of the foreground: half of the distance of the outermost pixels of a nucleus."""
_STEEPNESS = 4.0
"""Logit of np per pixel of distance beyond EDGE_PX; np spans ¼ to ¾ within a quarter of a pixel of EDGE_PX."""


class Arranged(nn.Module):
    """Arrange raw channels in the layout of `hover_batch.model.heads`."""

    def forward(self, raw: Tensor) -> Tensor:
        """Return `raw` in the layout of `hover_batch.model.heads`, (b, 4 + n, y, x) for n classes.

        The channels are two logits of np, the distance / DISTANCE_PX as h, zero as v, and the logits of the classes.

        `raw` (b, 1 + n, y, x): the distance in pixels, then the logits of n classes, background first.
        """
        distance, types = raw[:, :1], raw[:, 1:]
        zero = torch.zeros_like(distance)
        return torch.cat([zero, _STEEPNESS * (distance - EDGE_PX), distance / DISTANCE_PX, zero, types], dim=1)


def build_dist(arch: StudentArch) -> nn.Module:
    """Return DIST with random weights. Nothing is downloaded.

    The network takes RGB in [0, 1], float (batch, 3, y, x), y and x multiples of 32, and returns (batch, 4 + n_types,
    y, x) float in the layout of `hover_batch.model.heads` (see `Arranged`).

    `arch`: encoder, and number of classes with background. KeyError if the encoder is not known.
    """
    import segmentation_models_pytorch as smp  # takes seconds

    model: nn.Module = smp.Unet(
        arch.encoder,
        encoder_depth=5,
        encoder_weights=None,
        in_channels=3,
        classes=1 + arch.n_types,
        activation=Arranged,
    )
    return model


class Dist(Architecture):
    """DIST."""

    name = "dist"
    system = "dist"

    def build(self, card: Card, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return a DIST network with the encoder and classes of `card` and random weights. `tensors` is ignored.

        PackageError if `tile_in` of the card is not a multiple of 32, KeyError if the encoder is not known.
        """
        if card.tile_in % 32:
            raise PackageError(f"package {card.name}: tile_in is {card.tile_in}; that of dist is a multiple of 32")
        return build_dist(StudentArch(card.encoder, len(card.taxonomy.classes)))


ARCHITECTURES = (Dist(),)
