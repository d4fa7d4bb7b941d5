"""Prepare a network for inference: fold and merge its layers, leave out the margin, and move it to the device.

The output is that of the network within float32's rounding. This module imports the libraries that build networks,
which takes seconds; a converted network from the cache does not need them.
"""

from __future__ import annotations

import torch
from torch import nn

from hover_batch.config import Precision, Runtime
from hover_batch.model.card import Card
from hover_batch.model.fine_layers import fine_layers_in_fp32
from hover_batch.model.fold import folded
from hover_batch.model.margins import without_margin
from hover_batch.model.upsampling import upsampling_merged


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network on a device, in evaluation mode, folded (see `folded`) and in channels-last memory format.

    `network` itself is set to evaluation mode. If folding made no copy, `network` itself is moved and returned.

    `device`: device on which the network will compute.
    """
    network = folded(network).to(device)
    laid_out: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    return laid_out


def prepared(network: nn.Module, card: Card, device: torch.device, runtime: Runtime, precision: Precision) -> nn.Module:
    """Return a package's network, optimised for inference on a device.

    The result maps RGB in [0, 1], float (b, 3, tile_in, tile_in), to (b, channels, y, x), whose centre holds the kept
    pixels. `network` itself is set to evaluation mode, and may be changed and moved to the device.

    `card`: card of the package. `device`: device on which the network will compute. `runtime`: runtime that will
    compute it; "openvino" needs another form of some layers. `precision`: precision in which autocast will compute it;
    with fp16 and bf16, some layers stay in fp32.
    """
    network = on_device(network, device)
    if runtime == "openvino":  # torch's transposed convolutions depend on the number of threads
        network = upsampling_merged(network)
    if precision != "fp32":
        network = fine_layers_in_fp32(network, card.tile_in)
    return without_margin(network, card.tile_in, card.tile_out)
