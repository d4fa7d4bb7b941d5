"""DIST: a U-Net that regresses the distance of each nucleus's pixels to its edge and also classifies pixels.

Source: Naylor et al. 2018, IEEE Transactions on Medical Imaging 38(2). The classes are those of HoVerNet's comparison:
channels after that of the distance, with a softmax (`src/model/dist.py` of vqdang/hover_net). Here the U-Net is
segmentation-models-pytorch's, so that encoders and their ImageNet weights are those of the students.

DIST predicts no probability of a nucleus. Its foreground are the pixels with a distance of EDGE_PX and more, so np is a
steep function of the distance that is ½ there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hover_batch.model.architectures.protocol import Recognised
from hover_batch.model.architectures.unet import UNet, build_unet
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


class Dist(UNet):
    """DIST, which is built from its card like a student. No weights are published."""

    name = "dist"
    system = "dist"

    def untrained(self, n_types: int, *, encoder: str, width: int = 0) -> nn.Module:
        """Return a DIST with random weights; arguments and errors are those of a student (see `UNet.untrained`)."""
        return build_unet(encoder, 1 + n_types, Arranged)

    def recognise(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Recognised | None:
        """Return None, since there are no checkpoints to import."""
        return None


ARCHITECTURES = (Dist(),)
