"""Micro-Net: a network with the image at four scales in its encoder, and auxiliary outputs at three scales.

Source: Raza et al. 2019, Medical Image Analysis 52, 160–173; the network is tiatoolbox's. The classes are those of
HoVerNet's comparison: a softmax over background and classes, whose sum over the classes is the probability of a
nucleus; pixels are divided by 255 (`src/model/micronet.py` of vqdang/hover_net).

Its convolutions do not pad, and its skip connections fit together only if the side is SIDE. Of a tile of 252 pixels,
the central 128 are kept, since 252 does not divide the units of the tile grid. tiatoolbox.models takes a long time to
import, so only `MicroNet` imports it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hover_batch.errors import PackageError
from hover_batch.model.architectures.protocol import Architecture
from hover_batch.model.card import Card
from hover_batch.tiatoolbox_import import importing_tiatoolbox

SIDE, KEPT = 252, 128
"""Side in pixels of the network's input and output, and of the part of a tile that is kept."""


class MicroNet(nn.Module):
    """Micro-Net with random weights.

    It takes (b, 3, SIDE, SIDE) float RGB in [0, 1] and returns (b, channels, SIDE, SIDE) in the layout of
    `hover_batch.model.heads`, with h and v zero. In training mode, the class logits of the three auxiliary outputs
    follow, (b, channels + 3·n, SIDE, SIDE).

    `n_types`: number of classes, background included. `width`: channels of the first convolution, to which all others
    are proportional; 64 in the published network.
    """

    def __init__(self, n_types: int, width: int = 64) -> None:
        super().__init__()
        with importing_tiatoolbox():
            from tiatoolbox.models.architecture import micronet as library

        with torch.device("meta"):  # its layers of the published width are replaced
            self.network = library.MicroNet(num_output_channels=n_types)
        w = width
        layers = {f"b{i}": library.group1_arch_branch(c, 3, o) for i, c, o in _widths(3, w, 2 * w, 4 * w, 8 * w)}
        layers["b5"] = library.group2_arch_branch(16 * w, 32 * w)
        for i, o in enumerate((16 * w, 8 * w, 4 * w, 2 * w), start=6):
            layers[f"b{i}"] = library.group3_arch_branch(2 * o, o, o)
        for i, scale in enumerate((2, 4, 8), start=1):
            layers[f"fm{i}"] = library.group4_arch_branch(scale * w, scale * w // 2, (scale, scale), (scale, scale))
            layers[f"aux_out{i}"] = library.out_arch_branch(scale * w // 2, n_types)
        layers["out"] = library.out_arch_branch(7 * w, n_types)
        for name in ("aux_out1", "aux_out2", "aux_out3", "out"):
            layers[name] = layers[name][:-1]  # without the softmax
        self.network.layer = nn.ModuleDict(layers)

    def forward(self, image: Tensor) -> Tensor:
        """Return the output for a batch, (b, 4 + n, SIDE, SIDE) float, in the layout of `hover_batch.model.heads`.

        h and v are zero. In training mode, the class logits of the three auxiliary outputs follow, n channels each.

        `image`: RGB in [0, 1], float (b, 3, SIDE, SIDE). ValueError if a side is not SIDE.
        """
        if image.shape[2:] != (SIDE, SIDE):
            raise ValueError(f"Micro-Net takes {SIDE} × {SIDE} pixels, not {tuple(image.shape[2:])}")
        types, *auxiliary = self.network(image)
        zero = torch.zeros_like(types[:, :1])
        nucleus = types[:, 1:].logsumexp(1, keepdim=True)
        return torch.cat([types[:, :1], nucleus, zero, zero, types, *(auxiliary if self.training else ())], dim=1)


def _widths(*channels: int) -> list[tuple[int, int, int]]:
    """Return (number from 1 on, channels in, channels out) of the encoder's blocks, whose outputs are doubled."""
    inputs = [channels[0], *(2 * c for c in channels[1:-1])]
    return [(i, c, o) for i, (c, o) in enumerate(zip(inputs, channels[1:], strict=True), start=1)]


def by_tiles(network: nn.Module, image: Tensor) -> Tensor:
    """Return the output of Micro-Net for the centre of an image that is larger than a tile.

    The result is (b, 4 + n, y - SIDE + KEPT, x - SIDE + KEPT) float. The tiles are computed one after the other, and
    the central KEPT × KEPT pixels of each are kept.

    `network`: Micro-Net in evaluation mode. `image`: (b, 3, y, x) float RGB in [0, 1], whose sides are SIDE plus a
    multiple of KEPT.
    """
    edge = (SIDE - KEPT) // 2
    rows = [
        torch.cat(
            [
                network(image[..., y : y + SIDE, x : x + SIDE])[..., edge:-edge, edge:-edge]
                for x in range(0, image.shape[3] - SIDE + 1, KEPT)
            ],
            dim=3,
        )
        for y in range(0, image.shape[2] - SIDE + 1, KEPT)
    ]
    return torch.cat(rows, dim=2)


class MicroNetArchitecture(Architecture):
    """Micro-Net."""

    name = "micronet"
    system = "micronet"
    tile = (SIDE, KEPT)
    patch_side = SIDE

    def build(self, card: Card, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return a Micro-Net with the width of `tensors`; without tensors, with the published width of 64.

        `card`: card with the classes and the tile size. `tensors`: state dict that will be loaded; None for the
        published form.

        PackageError if `tile_in` of the card is not SIDE, KeyError if the tensors are not those of a Micro-Net.
        """
        if card.tile_in != SIDE:
            raise PackageError(f"package {card.name}: tile_in is {card.tile_in}; that of a micronet is {SIDE}")
        width = 64 if tensors is None else len(tensors["network.layer.b1.conv1.0.bias"])
        return MicroNet(len(card.taxonomy.classes), width)

    def untrained(self, n_types: int, *, encoder: str, width: int) -> nn.Module:
        """Return a Micro-Net with random weights.

        `n_types`: number of classes, background included. `width`: channels of its first convolution. `encoder` is
        ignored.
        """
        return MicroNet(n_types, width)


ARCHITECTURES = (MicroNetArchitecture(),)
