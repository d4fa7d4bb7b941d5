"""Merge a decoder's upsampling with the convolution after it, which saves a quarter of the starter's products.

After nearest-neighbour upsampling by 2, the nine taps of a 3 × 3 convolution fall on four different pixels. Adding up
the weights of taps on the same pixel turns both into one 4 × 4 transposed convolution of stride 2, with four products
instead of nine. The output is the same within float32's rounding.
"""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import segmentation_models_pytorch as smp
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock
from torch import Tensor, nn


def upsampling_merged(network: nn.Module) -> nn.Module:
    """Return a copy of a U-Net in which each decoder block's upsampling is merged with the convolution after it.

    The output is the same up to rounding. If `network` is not a U-Net of segmentation-models-pytorch, or one of its
    blocks cannot be merged, `network` itself is returned unchanged.
    """
    if not isinstance(network, smp.Unet) or not all(_doubles(block) for block in network.decoder.blocks):
        return network
    network = copy.deepcopy(network)
    unet: Any = network  # smp ships no types
    upsampled_channels = unet.encoder.out_channels[-1]
    for i, block in enumerate(unet.decoder.blocks):
        unet.decoder.blocks[i] = _MergedBlock(block, upsampled_channels)
        upsampled_channels = block.conv2[0].out_channels
    return network


def _doubles(block: nn.Module) -> bool:
    """Whether the block upsamples by nearest neighbour and then has a plain 3 × 3 convolution."""
    if not isinstance(block, UnetDecoderBlock) or block.interpolation_mode != "nearest":
        return False
    plain = isinstance(block.attention1.attention, nn.Identity)
    return plain and isinstance(block.conv1[0], nn.Conv2d) and block.conv1[0].kernel_size == (3, 3)


class _MergedBlock(nn.Module):
    """Merged `block`; `channels` of its input are upsampled, the others come from the encoder."""

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
        """Take maps (b, channels, height / 2, width / 2) and skip_connection (b, others, height, width)."""
        output = self.upsampled(maps)
        if self.skip and skip_connection is not None:
            output = output + self.skip(skip_connection)
        result: Tensor = self.then(output)
        return result


def _transposed(weight: Tensor) -> Tensor:
    """Convert weights (out, in, 3, 3) of a padded convolution to (in, out, 4, 4) of a transposed one of stride 2."""
    taps = weight.new_zeros(weight.shape[1], weight.shape[0], 4, 4)
    for y, x, row, column in product(range(2), range(2), range(3), range(3)):
        # Tap `row` of an upsampled pixel of parity y reads the pixel at offset `up` before upsampling …
        up, left = (y + row - 1) // 2, (x + column - 1) // 2
        # … whose contribution a transposed convolution has at this tap.
        taps[:, :, y - 2 * up + 1, x - 2 * left + 1] += weight[:, :, row, column].T
    return taps
