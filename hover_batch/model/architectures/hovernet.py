"""HoVerNet, the usual teacher, in its two published forms, with all branches in one output tensor.

Source: Graham et al. 2019, Medical Image Analysis 58, 101563: a pre-activated ResNet-50 without its first pooling, and
three decoder branches of dense units without padding. `original` (5×5 kernels; CoNSeP, Kumar, CPM17) and `fast` (3×3;
PanNuke, MoNuSAC) have the same parameter names as hover_net and tiatoolbox and load their state dicts strictly.

**Sizes.** The decoders crop, so the output is smaller than the input by a constant: 92 pixels in `fast`, 190 in
`original`. A side is valid if its features halve evenly three times: a multiple of 8 in `fast`, 6 more than one in
`original`. The published output sizes 164 and 80 do not divide the units of the tile grid, which keeps 256 per tile;
hence larger windows:

========== ============ ============================ ==================================================
form       published    here: input → output → kept  input pixels for each kept one, here and published
========== ============ ============================ ==================================================
fast       256 → 164    352 → 260 → 256              1.9, 2.4 (348 → 256 is excluded: 348 is no multiple of 8)
original   270 → 80     446 → 256 → 256              3.0, 11.4
========== ============ ============================ ==================================================

**Equal pixels.** The decoders do not pad, but the encoder and the last convolution before the output pad with zeros. So
an output pixel depends on the position of the window's edge if it is nearer to the edge than `reach`: 95 pixels for the
left and upper edges and 103 for the others in `fast`, 145 and 153 in `original`. A pixel that is further from the edges
of two windows has the same value in both, if the windows are shifted by multiples of 8, as in the tile grid. In a
published 256 window of `fast` these are the central 58 × 58 pixels, in a 270 window of `original` there are none. All
other published values depend on the published windows, and larger windows do not reproduce them. Larger windows show
each kept pixel at least as much real tissue on every side as the published windows show pixels at the edges of their
output.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from hover_batch.errors import PackageError
from hover_batch.model.architectures.protocol import Architecture, Recognised
from hover_batch.model.card import Card

Form = Literal["fast", "original"]


@dataclass(frozen=True)
class TeacherArch:
    """Architecture of a HoVerNet."""

    form: Form
    """Published form: fast or original."""
    n_types: int | None
    """Number of classes, background included; None without a type branch."""
    width: int = 64
    """Number of channels of the first convolution, to which all others are proportional: 64 in the published networks;
    any multiple of 8 is valid."""

    @property
    def kernel(self) -> int:
        """Side in pixels of the decoder's convolution kernels: 3 in `fast`, 5 in `original`."""
        return 3 if self.form == "fast" else 5

    @property
    def shrink(self) -> int:
        """Number of pixels by which the output's side is smaller than the input's: 92 in `fast`, 190 in `original`."""
        return 92 if self.form == "fast" else 190

    @property
    def excess(self) -> int:
        """Remainder of a valid input side modulo 8: 0 in `fast`, 6 in `original`.

        The first convolution of `original` does not pad.
        """
        return 0 if self.form == "fast" else 6

    @property
    def reach(self) -> tuple[int, int]:
        """Distances in pixels from an edge of the input within which the output depends on the edge's position.

        The first is for the left and upper edges, the second for the right and lower ones: (95, 103) in `fast`, (145,
        153) in `original`.
        """
        return (95, 103) if self.form == "fast" else (145, 153)

    @property
    def tile(self) -> tuple[int, int]:
        """`tile_in` and `tile_out` of packages with this form, in pixels: (352, 256) or (446, 256)."""
        return (352, 256) if self.form == "fast" else (446, 256)


class HoVerNet(nn.Module):
    """HoVerNet with random weights.

    It takes (batch, 3, y, x) float RGB in [0, 1] (the published code divides 0 … 255 by 255 itself) and returns the
    output for the input's centre, (batch, `Heads(n).channels`, y - shrink, x - shrink) float, in the layout of
    `hover_batch.model.heads`. The module's docstring gives the valid sides. Without a type branch, n is 2, and the
    types background and nucleus have the logits of np.
    """

    def __init__(self, arch: TeacherArch) -> None:
        super().__init__()
        self.arch = arch
        width = arch.width
        self.conv0 = _chain(("/", _conv(3, width, 7, padding=3 if arch.form == "fast" else 0)), *_norm("", width))
        self.d0 = _Stage(width, width, units=3, stride=1)
        self.d1 = _Stage(4 * width, 2 * width, units=4, stride=2)
        self.d2 = _Stage(8 * width, 4 * width, units=6, stride=2)
        self.d3 = _Stage(16 * width, 8 * width, units=3, stride=2)
        self.conv_bot = _conv(32 * width, 16 * width, 1)
        branches = {"np": 2, "hv": 2} if arch.n_types is None else {"tp": arch.n_types, "np": 2, "hv": 2}
        self.decoder = nn.ModuleDict({name: _branch(width, arch.kernel, n) for name, n in branches.items()})
        self.upsample2x = _Upsample()

    def forward(self, image: Tensor) -> Tensor:
        """Return the outputs of all branches for the centre of `image`.

        The result is (batch, channels, y - shrink, x - shrink) float. The channels of np, hv and tp follow each other
        in this order. Without a type branch, the channels of np are repeated as tp.

        `image`: RGB in [0, 1], float (batch, 3, y, x). ValueError if y or x does not leave `arch.excess` when divided
        by 8.
        """
        if any(side % 8 != self.arch.excess for side in image.shape[2:]):
            raise ValueError(
                f"HoVerNet {self.arch.form} takes sides that leave {self.arch.excess} when divided by 8, "
                f"not {tuple(image.shape[2:])}"
            )
        d0 = self.d0(self.conv0(image))
        d1 = self.d1(d0)
        d2 = self.d2(d1)
        deep = self.upsample2x(self.conv_bot(self.d3(d2))) + d2
        outputs = {}
        for name, branch in self.decoder.items():
            u3, u2, u1, u0 = branch.children()
            middle = self.upsample2x(u3(deep))
            fine = self.upsample2x(u2(middle + _centre(d1, middle)))
            outputs[name] = u0(u1(fine + _centre(d0, fine)))
        return torch.cat([outputs["np"], outputs["hv"], outputs.get("tp", outputs["np"])], dim=1)


def build_teacher(arch: TeacherArch) -> nn.Module:
    """Return a HoVerNet with the architecture `arch` and random weights. See `HoVerNet` for its input and output."""
    return HoVerNet(arch)


def arch_of(weights: Mapping[str, Tensor]) -> TeacherArch:
    """Return the architecture of a HoVerNet from the shapes of the tensors in its state dict.

    `weights`: tensors by name. KeyError if tensors of a HoVerNet are missing.
    """
    kernel = weights["decoder.np.u3.conva.weight"].shape[-1]
    type_biases = weights.get("decoder.tp.u0.conv.bias")
    return TeacherArch(
        form="fast" if kernel == 3 else "original",
        n_types=None if type_biases is None else len(type_biases),
        width=len(weights["conv0.bn.bias"]),
    )


class HoverNetForm(Architecture):
    """One of HoVerNet's two published forms. Checkpoints are hover_net's and tiatoolbox's."""

    batch = 2

    def __init__(self, form: Form) -> None:
        self.form = form
        self.name = f"hovernet-{form}"
        self.tile = TeacherArch(form, None).tile
        self.patch_side = 256 if form == "fast" else 270

    def build(self, card: Card, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return a HoVerNet with the width of the tensors, and with a type branch if they have one.

        Without tensors, it has the published width, and a type branch if the card has several classes of nuclei.

        `card`: card with the classes and tile sizes. `tensors`: state dict that will be loaded; None for the published
        width.

        PackageError if the state dict lacks a tensor of a HoVerNet, belongs to the other form (fast or original), or
        has another number of classes than the card, or if the tile sizes on the card are not valid for this form.
        """
        n_types = len(card.taxonomy.classes)
        try:
            arch = TeacherArch(self.form, n_types if n_types > 2 else None) if tensors is None else arch_of(tensors)
        except KeyError as error:
            raise PackageError(f"package {card.name}: {self.name} needs the tensor {error}") from error
        if arch.form != self.form or n_types != (arch.n_types or 2):
            raise PackageError(
                f"package {card.name}: the card says {self.name} with {n_types} classes, the tensors are "
                f"hovernet-{arch.form}'s with {arch.n_types or 2}"
            )
        if card.tile_in % 8 != arch.excess or card.tile_in - arch.shrink < card.tile_out:
            raise PackageError(
                f"package {card.name}: {self.name} cannot keep {card.tile_out} of {card.tile_in} pixels; "
                f"it keeps {arch.tile[1]} of {arch.tile[0]}"
            )
        return build_teacher(arch)

    def untrained(self, n_types: int, *, encoder: str, width: int) -> nn.Module:
        """Return a HoVerNet with random weights and a type branch.

        `n_types`: number of classes, background included. `width`: channels of its first convolution. `encoder` is
        ignored.
        """
        return build_teacher(TeacherArch(self.form, n_types, width))

    def recognise(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Recognised | None:
        """Return the number of types of a checkpoint of this form of HoVerNet; None if it holds another network.

        The size of the decoder's kernels shows the form. The encoder of the result is empty, and `types` is 0 without a
        type branch.

        `tensors`: state dict of the checkpoint. `record` is not used. PackageError for HoVerNet+, which cannot be
        imported; KeyError if tensors are missing.
        """
        if "decoder.np.u3.conva.weight" not in tensors:
            return None
        if any(name.startswith("decoder.ls.") for name in tensors):
            raise PackageError("HoVerNet+, which has a layer branch, cannot be imported; HoVerNet without it can")
        arch = arch_of(tensors)
        return Recognised("", arch.n_types or 0) if arch.form == self.form else None


class _Stage(nn.Module):
    """Residual units of 1×1, 3×3 and 1×1 convolutions; with a stride of 2 the first halves the resolution."""

    def __init__(self, inputs: int, inner: int, units: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * inner
        self.shortcut = _conv(inputs, outputs, 1, stride=stride)
        first = self._unit(inputs, inner, stride)
        # The previous stage ends with a normalisation, so only the later units begin with one.
        later = [_chain(*_norm("preact/", outputs), *self._unit(outputs, inner, 1)) for _ in range(units - 1)]
        self.units = nn.ModuleList([_chain(*first), *later])
        self.blk_bna = _chain(*_norm("", outputs))

    @staticmethod
    def _unit(inputs: int, inner: int, stride: int) -> list[tuple[str, nn.Module]]:
        """Return the layers of a unit. Padding is TensorFlow's `same`: with a stride of 2 only after the last pixel."""
        pad = nn.ZeroPad2d((0, 1, 0, 1) if stride == 2 else 1)
        return [
            ("conv1", _conv(inputs, inner, 1)),
            *_norm("conv1/", inner),
            ("conv2/pad", pad),
            ("conv2", _conv(inner, inner, 3, stride=stride)),
            *_norm("conv2/", inner),
            ("conv3", _conv(inner, 4 * inner, 1)),
        ]

    def forward(self, features: Tensor) -> Tensor:
        total = self.shortcut(features) + self.units[0](features)
        for unit in list(self.units)[1:]:
            total = total + unit(total)
        return self.blk_bna(total)  # type: ignore[no-any-return]  # nn.Module's call


class _Dense(nn.Module):
    """Dense units: each appends width / 2 channels, computed from all previous ones, which are cropped to its size."""

    def __init__(self, width: int, inputs: int, kernel: int, units: int) -> None:
        super().__init__()
        self.units = nn.ModuleList()
        for index in range(units):
            channels = inputs + width // 2 * index
            self.units.append(
                _chain(
                    *_norm("preact_bna/", channels),
                    ("conv1", _conv(channels, 2 * width, 1)),
                    *_norm("conv1/", 2 * width),
                    ("conv2", _conv(2 * width, width // 2, kernel, groups=4)),
                )
            )
        self.blk_bna = _chain(*_norm("", inputs + width // 2 * units))

    def forward(self, features: Tensor) -> Tensor:
        for unit in self.units:
            added = unit(features)
            features = torch.cat([_centre(features, added), added], dim=1)
        return self.blk_bna(features)  # type: ignore[no-any-return]  # nn.Module's call


class _Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2."""

    unpool_mat: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unpool_mat", torch.ones(2, 2))  # part of published state dicts; not used here

    def forward(self, features: Tensor) -> Tensor:
        return interpolate(features, scale_factor=2, mode="nearest")


def _branch(width: int, kernel: int, outputs: int) -> nn.Module:
    """Build one decoder: u3 and u2 crop, u1 pads, u0 is the linear output layer."""

    def cropping(inputs: int, inner: int, units: int) -> nn.Module:
        return _chain(
            ("conva", _conv(inputs, inner, kernel)),
            ("dense", _Dense(width, inner, kernel, units)),
            ("convf", _conv(2 * inner, 2 * inner, 1)),
        )

    return _chain(
        ("u3", cropping(16 * width, 4 * width, 8)),
        ("u2", cropping(8 * width, 2 * width, 4)),
        ("u1", _chain(("conva", _conv(4 * width, width, kernel, padding=kernel // 2)))),
        ("u0", _chain(*_norm("", width), ("conv", nn.Conv2d(width, outputs, 1)))),
    )


def _chain(*steps: tuple[str, nn.Module]) -> nn.Sequential:
    """Build a Sequential with the names in published state dicts."""
    return nn.Sequential(OrderedDict(steps))


def _norm(prefix: str, channels: int) -> list[tuple[str, nn.Module]]:
    return [(f"{prefix}bn", nn.BatchNorm2d(channels)), (f"{prefix}relu", nn.ReLU(inplace=True))]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)


def _centre(features: Tensor, like: Tensor) -> Tensor:
    """Crop (b, c, y, x) centrally to the size of `like`."""
    height, width = like.shape[2:]
    top, left = (features.shape[2] - height) // 2, (features.shape[3] - width) // 2
    return features[:, :, top : top + height, left : left + width]


ARCHITECTURES = (HoverNetForm("fast"), HoverNetForm("original"))
