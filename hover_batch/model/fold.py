"""Fold batch normalisations into the convolutions before them, which saves a pass over each map."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded(network: nn.Module) -> nn.Module:
    """Return the network in evaluation mode, with batch normalisations folded into the convolutions before them.

    Only a BatchNorm2d directly after a Conv2d in a Sequential is folded. The result is a copy whose outputs differ by
    rounding. If there is no such pair, `network` itself is returned. In both cases, `network` is set to evaluation
    mode.
    """
    network = network.eval()
    if next(_pairs(network), None) is None:
        return network
    network = copy.deepcopy(network)
    for parts, i in list(_pairs(network)):
        convolution, normalisation = parts[i], parts[i + 1]
        assert isinstance(convolution, nn.Conv2d) and isinstance(normalisation, nn.BatchNorm2d)
        parts[i], parts[i + 1] = fuse_conv_bn_eval(convolution, normalisation), nn.Identity()
    return network


def _pairs(network: nn.Module) -> Iterator[tuple[nn.Sequential, int]]:
    """Yield each Sequential and index of a convolution directly before a normalisation."""
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            for i in range(len(module) - 1):
                if isinstance(module[i], nn.Conv2d) and isinstance(module[i + 1], nn.BatchNorm2d):
                    yield module, i
