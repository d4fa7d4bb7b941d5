"""The margin of a tile, of which the network sees all and keeps nothing, left out where it is not needed: a seventh of
a student's work.

The encoder sees the whole tile. A decoder's pixel depends on few around it, so that its maps are cut, before each
block, to what the kept pixels depend on. These come out as they would of the whole, within float32's rounding.
"""

from __future__ import annotations

import segmentation_models_pytorch as smp
from torch import Tensor, nn

BLOCKS = 5
"""Of a decoder, from a 32nd of the tile's side to the whole."""
REACH = 2
"""Pixels to each side on which a block's pixel depends: two convolutions of 3 × 3."""
HEAD_REACH = 1

Window = tuple[int, int]
"""From and to, in pixels of a map, along both axes."""


def without_margin(network: nn.Module, tile_in: int, tile_out: int) -> nn.Module:
    """A network that gives only the kept pixels: (b, 3, tile_in, tile_in) → (b, channels, tile_out, tile_out).

    It shares the weights of `network`, which is returned as it is unless it is a U-Net of which each block doubles its
    map and has two convolutions of 3 × 3, as students are.
    """
    if tile_in == tile_out or not isinstance(network, smp.Unet) or network.encoder.output_stride != 2**BLOCKS:
        return network
    return _Kept(network, tile_in, tile_out) if len(network.decoder.blocks) == BLOCKS else network


class _Kept(nn.Module):
    def __init__(self, network: smp.Unet, tile_in: int, tile_out: int) -> None:
        super().__init__()
        self.network = network
        margin = (tile_in - tile_out) // 2
        self.kept = margin, margin + tile_out
        windows = [_wider(self.kept, HEAD_REACH, tile_in)]
        """What is needed of each block's map, the last block's first; behind them, of the encoder's last map."""
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
            # The image itself, the encoder's map of level 0, is nobody's skip.
            skip = _cut(skips[level], seen, (0, skips[level].shape[-1])) if level else None
            maps = block(maps, seen[1] - seen[0], seen[1] - seen[0], skip_connection=skip)
            maps, seen = _cut(maps, self.windows[level], seen), self.windows[level]
        output: Tensor = _cut(self.network.segmentation_head(maps), self.kept, seen)
        return output


def _wider(window: Window, by: int, side: int) -> Window:
    return max(0, window[0] - by), min(side, window[1] + by)


def _cut(maps: Tensor, window: Window, seen: Window) -> Tensor:
    """`window` of maps (b, c, y, x) that show `seen`."""
    start, stop = window[0] - seen[0], window[1] - seen[0]
    return maps[:, :, start:stop, start:stop]
