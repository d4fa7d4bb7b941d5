"""Cost of a network: parameters, multiply-accumulates, seconds.

Multiply-accumulates are half of the floating-point operations that torch counts on meta tensors. As in the papers, they
include convolutions and matrix products, but no normalisations and activations.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hover_batch.model.architectures import architecture
from hover_batch.model.card import Card
from hover_batch.model.margins import without_margin
from hover_batch.model.openvino import StoredNetwork, model_macs


@dataclass(frozen=True)
class Cost:
    """Parameters and multiply-accumulates of a network."""

    parameters: int
    """Number of weights, trained or not."""
    patch: int
    """Side in pixels of the image that `macs_per_patch` counts."""
    macs_per_patch: int
    """Multiply-accumulates for one image of `patch` × `patch` pixels."""
    macs_per_kept_pixel: float
    """Multiply-accumulates for a tile, divided by the pixels of its output that are kept: the cost on slides, where
    margins are computed and discarded."""
    tile_in: int
    """Side in pixels of the tiles on slides."""
    tile_out: int
    """Side in pixels of the kept part of their output."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values by name."""
        return asdict(self)


def cost_of(network: nn.Module, card: Card) -> Cost:
    """Return the cost of a package's network. Only shapes are computed; the network is neither run nor changed.

    The patch of a StoredNetwork is a tile, because it takes images of one size only. Its `parameters` are the constants
    of its OpenVINO model.

    `network`: network of the package. `card`: card of the package, for the architecture and the sides of tiles.

    PackageError if the architecture is not known, or the OpenVINO model of a StoredNetwork cannot be read.
    """
    if isinstance(network, StoredNetwork):
        macs, constants = model_macs(network.model())
        return Cost(constants, card.tile_in, macs, macs / card.tile_out**2, card.tile_in, card.tile_out)
    meta_network = copy.deepcopy(network).to("meta").eval()
    patch = patch_side(card)
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()),
        patch=patch,
        macs_per_patch=_macs(meta_network, patch),
        macs_per_kept_pixel=_macs(without_margin(meta_network, card.tile_in, card.tile_out), card.tile_in)
        / card.tile_out**2,
        tile_in=card.tile_in,
        tile_out=card.tile_out,
    )


def patch_side(card: Card) -> int:
    """Return the side in pixels of the patches on which networks of the card's architecture are compared.

    PackageError if the card's architecture is not known.
    """
    return architecture(card.architecture).patch_side or card.tile_in


def _macs(meta_network: nn.Module, side: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        meta_network(torch.empty(1, 3, side, side, device="meta"))
    return int(counter.get_total_flops()) // 2


@torch.inference_mode()
def seconds_per_patch(network: nn.Module, card: Card, batch: int = 16) -> float:
    """Return the network's seconds per patch: the mean over one batch of random patches, after a warm-up.

    It is measured on the device of the network's weights, and in their precision unless torch.autocast is active. Use
    it only to compare networks on one idle machine.

    `network`: network in evaluation mode. `card`: card of the package, for the side of the patches (see `patch_side`).
    `batch`: number of patches.

    PackageError if the card's architecture is not known, torch.OutOfMemoryError if the batch does not fit in the GPU's
    memory.
    """
    weight = next(network.parameters(), torch.empty(0))  # a StoredNetwork has none
    patches = torch.rand(batch, 3, patch_side(card), patch_side(card), device=weight.device, dtype=weight.dtype)
    network(patches if weight.is_cuda else patches[:1])  # a GPU selects kernels by batch size
    _wait(weight.device)
    started = time.perf_counter()
    network(patches)
    _wait(weight.device)
    return (time.perf_counter() - started) / batch


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
