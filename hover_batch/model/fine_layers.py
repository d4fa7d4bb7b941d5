"""Compute the first layers of a student's encoder in fp32 while autocast computes the rest in fp16 or bf16.

Rounding in the layers of high resolution changes the outlines of nuclei most: in fp16 throughout, about one nucleus in
150 is split or joined. They are a small part of all products.
"""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

FINE = 4
"""Layers whose output has at least 1/FINE of the tile's side are computed in fp32."""


def fine_layers_in_fp32(network: nn.Module, side: int) -> nn.Module:
    """Return a student in which autocast computes the encoder's convolutions of high resolution in fp32.

    These are the convolutions whose output has at least 1/FINE (a quarter) of the tile's side. The encoder is run once
    to find them. A U-Net of segmentation-models-pytorch is changed in place; any other network is returned unchanged.

    `network`: network in evaluation mode. `side`: side of the tiles in pixels.
    """
    encoder = network.encoder if isinstance(network, smp.Unet) else None
    if encoder is None:
        return network
    fine: set[nn.Module] = set()

    def note(layer: nn.Module, _: object, output: Tensor) -> None:
        if output.shape[-1] * FINE >= side:
            fine.add(layer)

    layers = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.inference_mode():
        encoder(next(network.parameters()).new_zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    for parent in list(encoder.modules()):
        for name, layer in parent.named_children():
            if layer in fine:
                setattr(parent, name, _InFp32(layer))
    return network


class _InFp32(nn.Module):
    """Layer that autocast leaves alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, maps: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):
            output: Tensor = self.layer(maps.float())
        return output
