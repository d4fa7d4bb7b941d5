"""NuLite: a U-Net with a FastViT encoder from timm, one decoder, and one head per branch.

Source: Tommasino et al. 2024 (arXiv 2408.01797) and its released code (CosmoIknosLab/NuLite, 601e370), whose state
dicts load strictly. The encoder of the published T is fastvit_s12 (according to the code), that of H fastvit_ma36
(according to the number of parameters). The code does not state the encoders of S and M; all of ENCODERS are accepted.

The tissue classifier is loaded but not run, because its output is not used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hover_batch.errors import PackageError
from hover_batch.model.architectures.protocol import Architecture, Recognised
from hover_batch.model.card import Card
from hover_batch.model.decoder_blocks import ConvBlock, check_normalisation, normalised, upsampling

ENCODERS = {
    (48, 4, 3, False): "fastvit_t8",
    (64, 6, 3, False): "fastvit_t12",
    (64, 6, 4, False): "fastvit_s12",
    (64, 6, 4, True): "fastvit_sa12",
    (64, 12, 4, True): "fastvit_sa24",
    (64, 18, 4, True): "fastvit_sa36",
    (76, 18, 4, True): "fastvit_ma36",
}
"""(channels of the first stage, blocks of the third, expansion in a block, attention in the last) → name in timm."""
TISSUES = 19
"""Number of tissues in PanNuke, which the published networks classify."""


class NuLite(nn.Module):
    """NuLite with random weights.

    It takes RGB in [0, 1], float (batch, 3, y, x), y and x multiples of 32, and returns (batch, 4 + n_types, y, x)
    float in the layout of `hover_batch.model.heads`.
    """

    def __init__(self, encoder: str, n_types: int, tissues: int) -> None:
        import timm  # takes seconds

        super().__init__()
        self.encoder = nn.ModuleDict({"fast_vit": timm.create_model(encoder, features_only=True, pretrained=False)})
        a, b, c, d = self.encoder["fast_vit"].feature_info.channels()  # type: ignore[union-attr,operator]  # timm's
        if tissues:
            self.classifier_head = nn.Linear(d, tissues)
        self.decoder0 = nn.Sequential(ConvBlock(3, a))
        levels = {
            "bottleneck": [ConvBlock(d, c), upsampling(c, c)],
            "decoder4": [ConvBlock(2 * c, c), ConvBlock(c, b), upsampling(b, b)],
            "decoder3": [ConvBlock(2 * b, b), ConvBlock(b, a), upsampling(a, a)],
            "decoder2": [ConvBlock(2 * a, a), upsampling(a, a)],
            "decoder1": [ConvBlock(a, a), upsampling(a, a)],
        }
        self.decoder = nn.Sequential(OrderedDict((f"{k}_upsampler", nn.Sequential(*v)) for k, v in levels.items()))
        self.np_head, self.hv_head, self.tp_head = (
            nn.Sequential(ConvBlock(2 * a, a), nn.Conv2d(a, outputs, 1)) for outputs in (2, 2, n_types)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return the outputs of all branches, (batch, 4 + n_types, y, x) float, in the order np, hv, tp.

        `image`: RGB in [0, 1], float (batch, 3, y, x). y and x are multiples of 32.
        """
        image = normalised(image)
        fine, middle, coarse, maps = self.encoder["fast_vit"](image)
        bottleneck, decoder4, decoder3, decoder2, decoder1 = self.decoder
        maps = decoder4(torch.cat([coarse, bottleneck(maps)], dim=1))
        maps = decoder3(torch.cat([middle, maps], dim=1))
        maps = decoder1(decoder2(torch.cat([fine, maps], dim=1)))
        maps = torch.cat([self.decoder0(image), maps], dim=1)
        return torch.cat([self.np_head(maps), self.hv_head(maps), self.tp_head(maps)], dim=1)


class NuLiteFamily(Architecture):
    """NuLite in all sizes; the encoder in the card gives the size."""

    name = "nulite"

    def build(self, card: Card, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return a NuLite with the encoder and classes of `card`.

        It has a tissue classifier if `tensors` has one, or if there are no tensors.

        `card`: card with the encoder, the classes and the tile size. `tensors`: state dict that will be loaded; None
        for the published form.

        PackageError if the encoder on the card is not one of ENCODERS, or `tile_in` is not a multiple of 32.
        """
        if card.encoder not in ENCODERS.values():
            raise PackageError(f"package {card.name}: the encoder of a nulite is one of {', '.join(ENCODERS.values())}")
        if card.tile_in % 32:
            raise PackageError(f"package {card.name}: tile_in is {card.tile_in}; that of a nulite is a multiple of 32")
        tissues = TISSUES if tensors is None else len(tensors.get("classifier_head.bias", ()))
        return NuLite(card.encoder, len(card.taxonomy.classes), tissues)

    def recognise(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Recognised | None:
        """Return the encoder and the number of types of a NuLite checkpoint; None if it holds another network.

        The shapes of the tensors show the encoder.

        `tensors`: state dict of the checkpoint. `record`: everything else in it.

        PackageError if branches of the encoder are merged, or the checkpoint states another normalisation of the input.
        KeyError or IndexError if tensors are missing or the encoder is not known.
        """
        if not any(name.startswith("encoder.fast_vit.") for name in tensors):
            return None
        if any("reparam_conv" in name for name in tensors):
            raise PackageError("NuLite with merged branches in its encoder; give the checkpoint from before the merge")
        check_normalisation(record)
        stages = "encoder.fast_vit.stages_"
        rows, width = tensors[f"{stages}0.blocks.0.mlp.fc1.weight"].shape[:2]
        depth = len({name.split(".")[4] for name in tensors if name.startswith(f"{stages}2.blocks.")})
        attention = f"{stages}3.blocks.0.token_mixer.qkv.weight" in tensors
        return Recognised(ENCODERS[width, depth, rows // width, attention], len(tensors["tp_head.1.bias"]))


ARCHITECTURES = (NuLiteFamily(),)
