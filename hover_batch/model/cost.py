"""What a network costs: parameters, multiply-accumulates, seconds.

Multiply-accumulates are counted by torch on tensors without data, half of its floating-point operations: convolutions
and matrix products, as the papers count them; normalisations and activations are left out.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hover_batch.model.margins import without_margin
from hover_batch.model.package import Card

PATCH = {"hovernet-original": 270}
"""Side in pixels of the patches by which the published networks are compared; 256 of those that are not named."""


@dataclass(frozen=True)
class Cost:
    """`macs_per_patch`: of one `patch` × `patch` image. `macs_per_kept_pixel`: of a tile of `tile_in`, by the pixels
    that are kept of its output; this is what a slide costs, since margins are computed and thrown away."""

    parameters: int
    patch: int
    macs_per_patch: int
    macs_per_kept_pixel: float
    tile_in: int
    tile_out: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cost_of(network: nn.Module, card: Card) -> Cost:
    """Count one package's network. It is neither run nor changed."""
    hollow = copy.deepcopy(network).to("meta").eval()
    patch = patch_of(card)
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()),
        patch=patch,
        macs_per_patch=_macs(hollow, patch),
        macs_per_kept_pixel=_macs(without_margin(hollow, card.tile_in, card.tile_out), card.tile_in) / card.tile_out**2,
        tile_in=card.tile_in,
        tile_out=card.tile_out,
    )


def patch_of(card: Card) -> int:
    """Side in pixels of the patches by which networks of this architecture are compared."""
    return PATCH.get(card.architecture, 256)


def _macs(hollow: nn.Module, side: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        hollow(torch.empty(1, 3, side, side, device="meta"))
    return int(counter.get_total_flops()) // 2


@torch.inference_mode()
def seconds_per_patch(network: nn.Module, card: Card, batch: int = 16) -> float:
    """Seconds of the network alone for one patch: the mean over one batch, once it is warm.

    On the device and with the precision in which the network is. Good for ratios between networks on one idle machine.
    """
    weight = next(network.parameters())
    patches = torch.rand(batch, 3, patch_of(card), patch_of(card), device=weight.device, dtype=weight.dtype)
    network(patches if weight.is_cuda else patches[:1])  # a GPU chooses its kernels by the batch
    _wait(weight.device)
    started = time.perf_counter()
    network(patches)
    _wait(weight.device)
    return (time.perf_counter() - started) / batch


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
