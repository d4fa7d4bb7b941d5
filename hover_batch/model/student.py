"""Student: a U-Net with a Mix Vision Transformer encoder and all branches as channels of one output.

Source: HoVer-UNet (Tommasino et al., arXiv 2311.12553): encoder and decoder depth 5, single decoder.
The published weights are `smp.Unet('mit_b2', classes=10)` state dicts, which load into this network.
"""

from __future__ import annotations

from dataclasses import dataclass

import segmentation_models_pytorch as smp
from torch import nn

from hover_batch.model.heads import Heads


@dataclass(frozen=True)
class StudentArch:
    """Architecture of a student."""

    encoder: str = "mit_b0"
    """Encoder's name in segmentation-models-pytorch."""
    n_types: int = 5
    """Number of classes, background included."""


def build_student(arch: StudentArch) -> nn.Module:
    """Build the student with random weights. Nothing is downloaded.

    The network takes (batch, 3, y, x) float RGB in [0, 1], y and x multiples of 32, and returns
    (batch, `Heads(n_types).channels`, y, x) float in the layout of `hover_batch.model.heads`. Unknown encoders raise
    KeyError.
    """
    model: nn.Module = smp.Unet(
        arch.encoder,
        encoder_depth=5,
        encoder_weights=None,
        in_channels=3,
        classes=Heads(arch.n_types).channels,
    )
    return model
