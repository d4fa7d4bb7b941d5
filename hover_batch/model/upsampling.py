"""A decoder's upsampling and the convolution behind it, as one: of the starter's products a quarter less.

Where each pixel is doubled along both axes, the nine taps of a 3 × 3 convolution fall on four different pixels. With
the weights of those that fall together added up, the two are a transposed convolution of 4 × 4 at stride 2, which has
four products for each of nine. The output is the same, within float32's rounding.
"""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import segmentation_models_pytorch as smp
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock
from torch import Tensor, nn


def upsampling_merged(network: nn.Module) -> nn.Module:
    """A copy of a U-Net whose decoder's blocks do both at once; `network` itself where it has no such blocks."""
    if not isinstance(network, smp.Unet) or not all(_doubles(block) for block in network.decoder.blocks):
        return network
    network = copy.deepcopy(network)
    unet: Any = network  # smp has no types
    channels = unet.encoder.out_channels[-1]
    for i, block in enumerate(unet.decoder.blocks):
        unet.decoder.blocks[i] = _MergedBlock(block, channels)
        channels = block.conv2[0].out_channels
    return network


def _doubles(block: nn.Module) -> bool:
    """Whether the block is one that repeats pixels, and then has a plain convolution of 3 × 3."""
    if not isinstance(block, UnetDecoderBlock) or block.interpolation_mode != "nearest":
        return False
    plain = isinstance(block.attention1.attention, nn.Identity)
    return plain and isinstance(block.conv1[0], nn.Conv2d) and block.conv1[0].kernel_size == (3, 3)


class _MergedBlock(nn.Module):
    """`block`, of whose input `channels` are upsampled and the others come from the encoder."""

    def __init__(self, block: UnetDecoderBlock, channels: int) -> None:
        super().__init__()
        convolution, *then = block.conv1
        weight = convolution.weight.detach()
        self.upsampled = nn.ConvTranspose2d(channels, len(weight), 4, 2, 1)
        self.upsampled.weight, self.upsampled.bias = nn.Parameter(_transposed(weight[:, :channels])), convolution.bias
        others = weight.shape[1] - channels
        self.skip = nn.Conv2d(others, len(weight), 3, padding=1, bias=False) if others else None
        if self.skip:
            self.skip.weight = nn.Parameter(weight[:, channels:])
        self.then = nn.Sequential(*then, block.conv2, block.attention2)

    def forward(self, maps: Tensor, height: int, width: int, skip_connection: Tensor | None = None) -> Tensor:
        """maps: (b, channels, height / 2, width / 2); skip_connection: (b, others, height, width)."""
        output = self.upsampled(maps)
        if self.skip and skip_connection is not None:
            output = output + self.skip(skip_connection)
        result: Tensor = self.then(output)
        return result


def _transposed(weight: Tensor) -> Tensor:
    """(out, in, 3, 3) of a convolution with padding → (in, out, 4, 4) of a transposed one at stride 2 with padding."""
    taps = weight.new_zeros(weight.shape[1], weight.shape[0], 4, 4)
    for y, x, row, column in product(range(2), range(2), range(3), range(3)):
        # A doubled pixel of parity y sees, by its tap `row`, the pixel `up` of those before they were doubled …
        up, left = (y + row - 1) // 2, (x + column - 1) // 2
        # … and a transposed convolution has that pixel's share of it at this tap.
        taps[:, :, y - 2 * up + 1, x - 2 * left + 1] += weight[:, :, row, column].T
    return taps
