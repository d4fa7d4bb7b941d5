"""Skip the decoder's work on the margin of a tile, whose output is not kept: a seventh of a student's work.

The encoder processes the whole tile. A decoder pixel depends only on pixels nearby, so the decoder's maps are cropped
before each block to what the kept pixels depend on. The output is the same within float32's rounding.
"""

from __future__ import annotations

import segmentation_models_pytorch as smp
from torch import Tensor, nn

BLOCKS = 5
"""Number of decoder blocks, from 1/32 of the tile's side to the full side."""
REACH = 2
"""Pixels to each side on which a block's output depends: two 3 × 3 convolutions."""
HEAD_REACH = 1
"""Pixels to each side on which the head's output depends: one 3 × 3 convolution."""

Window = tuple[int, int]
"""Start and stop in pixels of a map, the same along both axes."""


def without_margin(network: nn.Module, tile_in: int, tile_out: int) -> nn.Module:
    """Return a network that computes only the kept pixels, the central `tile_out` × `tile_out` of each tile.

    It maps (b, 3, tile_in, tile_in) to (b, channels, tile_out, tile_out) and shares the weights of `network`. Students
    are U-Nets with BLOCKS (5) decoder blocks. For any other network, and if the tiles have no margin, `network` itself
    is returned.

    `tile_in`, `tile_out`: sides in pixels of a tile and of its kept part.
    """
    if (
        tile_in != tile_out
        and isinstance(network, smp.Unet)
        and network.encoder.output_stride == 2**BLOCKS
        and len(network.decoder.blocks) == BLOCKS
    ):
        return _Kept(network, tile_in, tile_out)
    return network


class _Kept(nn.Module):
    """U-Net that computes only the kept pixels."""

    def __init__(self, network: smp.Unet, tile_in: int, tile_out: int) -> None:
        super().__init__()
        self.network = network
        margin = (tile_in - tile_out) // 2
        self.kept = margin, margin + tile_out
        windows = [_wider(self.kept, HEAD_REACH, tile_in)]
        """Needed part of each block's output, the last block first, then of the encoder's last map."""
        for level in range(BLOCKS):
            start, stop = _wider(windows[-1], REACH, tile_in >> level)
            windows.append((start // 2, -(-stop // 2)))
        self.windows = windows

    def forward(self, image: Tensor) -> Tensor:
        *skips, last = self.network.encoder(image)
        seen = self.windows[-1]
        maps = _cut(self.network.decoder.center(last), seen, (0, last.shape[-1]))
        for level, block in zip(reversed(range(BLOCKS)), self.network.decoder.blocks, strict=True):
            seen = 2 * seen[0], 2 * seen[1]
            # Level 0 of the encoder is the image itself, which has no skip connection.
            skip = _cut(skips[level], seen, (0, skips[level].shape[-1])) if level else None
            maps = block(maps, seen[1] - seen[0], seen[1] - seen[0], skip_connection=skip)
            maps, seen = _cut(maps, self.windows[level], seen), self.windows[level]
        output: Tensor = _cut(self.network.segmentation_head(maps), self.kept, seen)
        return output


def _wider(window: Window, by: int, side: int) -> Window:
    return max(0, window[0] - by), min(side, window[1] + by)


def _cut(maps: Tensor, window: Window, seen: Window) -> Tensor:
    """Return the part `window` of maps (b, c, y, x) that cover `seen`."""
    start, stop = window[0] - seen[0], window[1] - seen[0]
    return maps[:, :, start:stop, start:stop]
