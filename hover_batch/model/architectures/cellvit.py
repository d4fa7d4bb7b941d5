"""CellViT: a vision transformer, and one decoder of transposed convolutions with skip connections per branch.

Source: Hörst et al. 2024, Medical Image Analysis 94, 103143, and its released code (TIO-IKIM/CellViT, 05097e1), whose
state dicts load strictly. The encoder is ViT-256, or Segment Anything's in sizes B, L and H. The latter attends within
windows of 14 × 14 patches, except in four blocks, and adds relative positions. Tensors of any width and depth can be
loaded if the skip connections are taken after each quarter of the blocks.

**Sizes.** CellViT was trained on 256 pixels; the released code runs it on windows of 1024 that overlap by 64. Here,
tiles of 320 overlap by 64, which is closer to the training: the transformer sees 20 × 20 patches instead of 16 × 16.

The tissue classifier is loaded but not run, because its output is not used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention

from hover_batch.errors import PackageError
from hover_batch.model.architectures.protocol import Architecture, Recognised
from hover_batch.model.card import Card
from hover_batch.model.decoder_blocks import ConvBlock, check_normalisation, normalised, upsampling

PATCH = 16
"""Side in pixels of a patch, whose features are one token."""
BRANCHES = ("nuclei_binary_map_decoder", "hv_map_decoder", "nuclei_type_maps_decoder")
"""Names of the decoders of np, hv and tp."""
SAM_SIZES = {12: "SAM-B", 24: "SAM-L", 32: "SAM-H"}
"""Number of blocks → encoder."""


@dataclass(frozen=True)
class CellViTArch:
    """Architecture of a CellViT."""

    dim: int
    """Number of channels of a token."""
    heads: int
    """Number of attention heads."""
    windows: tuple[int, ...]
    """Side in tokens of the attention windows of each block; 0 for attention to all tokens."""
    grid: int
    """Side in tokens of the image for which positions were learned."""
    types: int
    """Number of channels of the type branch, background included."""
    tissues: int = 19
    """Number of classes of the tissue classifier; 0 if there is none."""
    np_channels: int = 2
    """Number of channels of the np branch: 2, or 4 with a regression branch, whose output is not used."""
    sam: bool = False
    """Whether the encoder is Segment Anything's."""

    @property
    def encoder(self) -> str:
        """Name of the encoder, as in model cards.

        It is ViT-256, or SAM-B, SAM-L or SAM-H for Segment Anything's encoder with 12, 24 or 32 blocks. For any other
        number N of blocks, it is SAM-N-blocks.
        """
        depth = len(self.windows)
        return SAM_SIZES.get(depth, f"SAM-{depth}-blocks") if self.sam else "ViT-256"


def _sam(dim: int, heads: int, depth: int, types: int) -> CellViTArch:
    windows = tuple(0 if i % (depth // 4) == depth // 4 - 1 else 14 for i in range(depth))
    return CellViTArch(dim, heads, windows, 64, types, sam=True)


def published(encoder: str, types: int) -> CellViTArch:
    """Return the architecture of the published CellViT with the encoder `encoder`.

    `encoder`: ViT-256, SAM-B, SAM-L or SAM-H; KeyError for others. `types`: number of channels of the type branch,
    background included.
    """
    return {
        "ViT-256": CellViTArch(384, 6, (0,) * 12, 14, types),
        "SAM-B": _sam(768, 12, 12, types),
        "SAM-L": _sam(1024, 16, 24, types),
        "SAM-H": _sam(1280, 16, 32, types),
    }[encoder]


def arch_of(weights: Mapping[str, Tensor]) -> CellViTArch:
    """Return the architecture of a CellViT from the shapes of the tensors in its state dict.

    `weights`: tensors by name. KeyError or IndexError if tensors are missing or have the wrong number of dimensions.
    """
    sam = "encoder.cls_token" not in weights
    dim = len(weights["encoder.patch_embed.proj.bias"])
    positions = weights["encoder.pos_embed"].shape[1]
    grid = positions if sam else isqrt(positions - 1)
    depth = len({name.split(".")[2] for name in weights if name.startswith("encoder.blocks.")})
    tables = [weights[f"encoder.blocks.{i}.attn.rel_pos_h"] for i in range(depth)] if sam else []
    sides = [(len(table) + 1) // 2 for table in tables]
    return CellViTArch(
        dim=dim,
        heads=dim // tables[0].shape[1] if sam else 6,
        windows=tuple(side if side < grid else 0 for side in sides) if sam else (0,) * depth,
        grid=grid,
        types=len(weights[f"{BRANCHES[2]}.decoder0_header.2.bias"]),
        tissues=len(weights.get("classifier_head.bias" if sam else "encoder.head.bias", ())),
        np_channels=len(weights[f"{BRANCHES[0]}.decoder0_header.2.bias"]),
        sam=sam,
    )


class CellViT(nn.Module):
    """CellViT with random weights.

    It takes RGB in [0, 1], float (batch, 3, side, side), side a multiple of 16, and returns (batch, 4 + types, side,
    side) float in the layout of `hover_batch.model.heads`.
    """

    def __init__(self, arch: CellViTArch) -> None:
        super().__init__()
        self.arch = arch
        self.encoder = _Encoder(arch)
        if arch.sam and arch.tissues:
            self.classifier_head = nn.Linear(_Encoder.NECK, arch.tissues)
        dim = arch.dim
        low, middle, high = (256, 128, 312) if dim < 512 else (512, 256, 512)
        self.decoder0 = nn.Sequential(ConvBlock(3, 32), ConvBlock(32, 64))
        self.decoder1 = _raised(dim, low, middle, 128)
        self.decoder2 = _raised(dim, low, 256)
        self.decoder3 = _raised(dim, high)
        for name, outputs in zip(BRANCHES, (arch.np_channels, 2, arch.types), strict=True):
            self.add_module(name, _branch(dim, high, outputs))

    def forward(self, image: Tensor) -> Tensor:
        """Return the outputs of all branches, (batch, 4 + types, side, side) float, in the order np, hv, tp.

        `image`: RGB in [0, 1], float (batch, 3, side, side). The side is a multiple of 16 pixels, and with a SAM
        encoder at most 16·`arch.grid`.
        """
        image = normalised(image)
        first, second, third, last = self.encoder(image)
        skips = [self.decoder3(third), self.decoder2(second), self.decoder1(first), self.decoder0(image)]
        outputs = []
        for name in BRANCHES:
            bottom, *blocks = self.get_submodule(name).children()
            maps = bottom(last)
            for skip, block in zip(skips, blocks, strict=True):
                maps = block(torch.cat([skip, maps], dim=1))
            outputs.append(maps)
        return torch.cat([outputs[0][:, :2], *outputs[1:]], dim=1)


def _raised(*channels: int) -> nn.Sequential:
    """Return blocks that each double the side; `channels`: those of the input, then those after each block."""
    pairs = zip(channels, channels[1:], strict=False)
    return nn.Sequential(*(ConvBlock(inputs, outputs, upsample=True) for inputs, outputs in pairs))


def _branch(dim: int, high: int, outputs: int) -> nn.Sequential:
    def level(inputs: int, blocks: int, raised: int) -> nn.Sequential:
        first, *others = [ConvBlock(2 * inputs, inputs), *(ConvBlock(inputs, inputs) for _ in range(blocks - 1))]
        return nn.Sequential(first, *others, upsampling(inputs, raised))

    header = nn.Sequential(ConvBlock(128, 64), ConvBlock(64, 64), nn.Conv2d(64, outputs, 1))
    return nn.Sequential(
        OrderedDict(
            bottleneck_upsampler=upsampling(dim, high),
            decoder3_upsampler=level(high, 3, 256),
            decoder2_upsampler=level(256, 2, 128),
            decoder1_upsampler=level(128, 2, 64),
            decoder0_header=header,
        )
    )


class _Encoder(nn.Module):
    """Vision transformer that returns the tokens after each quarter of its blocks, as maps (b, dim, y, x)."""

    NECK = 256
    """Number of channels of Segment Anything's last layers, which feed only the tissue classifier."""

    def __init__(self, arch: CellViTArch) -> None:
        super().__init__()
        dim, grid = arch.dim, arch.grid
        self.arch = arch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, PATCH, stride=PATCH)})
        self.blocks = nn.ModuleList(_Block(arch, window) for window in arch.windows)
        if arch.sam:
            self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
            first, second = (nn.Conv2d(dim, self.NECK, 1, bias=False), nn.Conv2d(self.NECK, self.NECK, 3, bias=False))
            # Layer normalisations; as the classifier is not run, only their parameters matter.
            self.neck = nn.Sequential(first, nn.GroupNorm(1, self.NECK), second, nn.GroupNorm(1, self.NECK))
        else:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.pos_embed = nn.Parameter(torch.zeros(1, grid**2 + 1, dim))
            self.norm = nn.LayerNorm(dim)
            if arch.tissues:
                self.head = nn.Linear(dim, arch.tissues)

    def forward(self, image: Tensor) -> list[Tensor]:
        tokens = self.patch_embed["proj"](image).permute(0, 2, 3, 1)
        side = int(tokens.shape[1])  # when torch traces the network for OpenVINO, shapes are tensors
        if self.arch.sam:
            tokens = tokens + self.pos_embed[:, :side, :side]
        else:
            begin = self.cls_token + self.pos_embed[:, :1]
            tokens = (tokens + self._positions(side)).flatten(1, 2)
            tokens = torch.cat([begin.expand(len(tokens), -1, -1), tokens], dim=1)
        taken = []
        for i, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if i % (len(self.blocks) // 4) == 0:
                maps = tokens if self.arch.sam else tokens[:, 1:].unflatten(1, (side, side))
                taken.append(maps.permute(0, 3, 1, 2))
        return taken

    def _positions(self, side: int) -> Tensor:
        """Return the learned positions (1, side, side, dim) of ViT-256, interpolated as in DINO's released code."""
        grid = self.arch.grid
        learnt = self.pos_embed[:, 1:].view(1, grid, grid, -1)
        if side == grid:
            return learnt
        # DINO adds 0.1 to prevent rounding down; the weights were trained with this scale, so it must be the same.
        scale = (side + 0.1) / grid
        return interpolate(learnt.permute(0, 3, 1, 2), scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1)


class _Block(nn.Module):
    """Transformer block: attention, within windows or to all tokens, and a perceptron, each added to its input."""

    def __init__(self, arch: CellViTArch, window: int) -> None:
        super().__init__()
        dim, hidden = arch.dim, 4 * arch.dim
        first, second = ("lin1", "lin2") if arch.sam else ("fc1", "fc2")
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(arch, window or arch.grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        layers = [(first, nn.Linear(dim, hidden)), ("act", nn.GELU()), (second, nn.Linear(hidden, dim))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Take and return tokens: (b, y, x, dim) for Segment Anything, (b, n, dim) for ViT-256."""
        normed = self.norm1(tokens)
        attended = self._in_windows(normed) if self.window else self.attn(normed)
        tokens = tokens + attended
        result: Tensor = tokens + self.mlp(self.norm2(tokens))
        return result

    def _in_windows(self, tokens: Tensor) -> Tensor:
        """Attend within each window. The image is padded with zeros on the right and below to whole windows."""
        batch, height, width, dim = tokens.shape
        side = self.window
        tokens = pad(tokens, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = tokens.shape[1] // side, tokens.shape[2] // side
        windows = tokens.view(batch, rows, side, columns, side, dim).transpose(2, 3).flatten(0, 2)
        windows = self.attn(windows).view(batch, rows, columns, side, side, dim).transpose(2, 3)
        image: Tensor = windows.reshape(batch, rows * side, columns * side, dim)[:, :height, :width]
        return image


class _Attention(nn.Module):
    """Self-attention; for Segment Anything with relative positions along both axes, learned for `side` tokens."""

    def __init__(self, arch: CellViTArch, side: int) -> None:
        super().__init__()
        self.heads, self.sam = arch.heads, arch.sam
        self.qkv = nn.Linear(arch.dim, 3 * arch.dim)
        self.proj = nn.Linear(arch.dim, arch.dim)
        if self.sam:
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(torch.zeros(2 * side - 1, arch.dim // arch.heads)) for _ in range(2)
            )

    def forward(self, tokens: Tensor) -> Tensor:
        flat = tokens.flatten(1, 2) if self.sam else tokens
        query, key, value = self.qkv(flat).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self._bias(query, *tokens.shape[1:3]) if self.sam else None
        attended = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        result: Tensor = self.proj(attended.transpose(1, 2).flatten(2)).view(tokens.shape)
        return result

    def _bias(self, query: Tensor, height: int, width: int) -> Tensor:
        """Return the terms (b, heads, y · x, y · x) that relative positions add to the attention of each query."""
        along_y = query.view(*query.shape[:2], height, width, -1)
        rows = torch.einsum("bnyxc,ykc->bnyxk", along_y, _relative(self.rel_pos_h, height))
        columns = torch.einsum("bnyxc,xkc->bnyxk", along_y, _relative(self.rel_pos_w, width))
        return (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)


def _relative(table: Tensor, side: int) -> Tensor:
    """Return the embedding (side, side, channel) of each offset between two tokens, interpolated to the side."""
    offsets = 2 * side - 1
    if len(table) != offsets:
        table = interpolate(table.T[None], size=offsets, mode="linear")[0].T
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place[None, :] + side - 1]


class CellViTFamily(Architecture):
    """CellViT with the encoders ViT-256, SAM-B, SAM-L and SAM-H."""

    name = "cellvit"
    batch = 2

    def build(self, card: Card, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return a CellViT with the width and depth of `tensors`; without tensors, the published one.

        `card`: card with the encoder, the classes and the tile size. `tensors`: state dict that will be loaded; None
        for the published form.

        PackageError if the encoder or the number of classes on the card differs from that of the tensors, or the
        network cannot take tiles of `tile_in` pixels. KeyError if tensors are missing or, without tensors, the encoder
        is not known.
        """
        types = len(card.taxonomy.classes)
        arch = published(card.encoder, types) if tensors is None else arch_of(tensors)
        if (arch.encoder, arch.types) != (card.encoder, types):
            raise PackageError(
                f"package {card.name}: the card says cellvit {card.encoder} with {types} classes, the tensors are "
                f"{arch.encoder}'s with {arch.types}"
            )
        if card.tile_in % PATCH or (arch.sam and card.tile_in > arch.grid * PATCH):
            raise PackageError(
                f"package {card.name}: tile_in is {card.tile_in}; that of a cellvit is a multiple of {PATCH}, at most "
                f"{arch.grid * PATCH} with SAM"
            )
        return CellViT(arch)

    def recognise(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Recognised | None:
        """Return the encoder and the number of types of a CellViT checkpoint; None if it holds another network.

        `tensors`: state dict of the checkpoint. `record`: everything else in it.

        PackageError if the network has one decoder for all branches, or the checkpoint states another normalisation of
        the input. KeyError or IndexError if tensors are missing.
        """
        if "encoder.patch_embed.proj.weight" not in tensors:
            return None
        if any(name.startswith("decoder.") for name in tensors):
            raise PackageError("CellViT with one decoder for all branches; only that with three can be imported")
        check_normalisation(record)
        arch = arch_of(tensors)
        return Recognised(arch.encoder, arch.types)


ARCHITECTURES = (CellViTFamily(),)
