"""Random weights with which a network responds to its input; freshly initialised deep normalised networks hardly do."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw weights and normalisation statistics so that layers keep the scale of their input; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point() or name.endswith("unpool_mat"):
                continue
            if tensor.ndim == 4:
                tensor.copy_((draw(tensor) - 0.5) * (24 / tensor[0].numel()) ** 0.5)
            elif name.endswith(("running_var", "weight")):
                tensor.copy_(0.5 + draw(tensor))
            else:
                tensor.copy_(0.2 * draw(tensor) - 0.1)
    return network.eval().requires_grad_(False)
