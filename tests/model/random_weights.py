"""Random weights with which a network responds to its input; freshly initialised deep normalised networks hardly do."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from hover_batch.model.architectures.mask_rcnn import MaskRcnn
from hover_batch.model.architectures.unet import StudentArch
from hover_batch.model.card import Card
from hover_batch.model.package import find_package


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


def named_weights(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the same names and shapes, whose values depend on these alone, so that outputs can be recorded.

    They are computed by numpy, whose generators keep their streams across versions.
    """
    drawn = {}
    for name, tensor in like.items():
        values = np.random.default_rng(zlib.crc32(name.encode())).random(tuple(tensor.shape), np.float32)
        if not tensor.is_floating_point():
            values = np.zeros(tensor.shape, np.int64)
        elif tensor.ndim == 4 and not name.endswith("pos_embed"):
            values = (values - 0.5) * (24 / tensor[0].numel()) ** 0.5
        elif tensor.ndim == 2:
            values = (values - 0.5) * (12 / tensor.shape[1]) ** 0.5
        elif name.endswith(("running_var", "weight")):
            values = values + 0.5
        else:
            values = 0.4 * values - 0.2
        drawn[name] = torch.from_numpy(np.asarray(values)).to(tensor.dtype)
    return drawn


def random_mask_rcnn() -> tuple[MaskRcnn, Card]:
    """Return a Mask R-CNN that takes every proposal for a nucleus, most of which fill their boxes, and its card."""
    card = replace(
        find_package("starter").card,
        name="random",
        architecture="mask-rcnn",
        system="mask-rcnn",
        encoder="mit_b0",
        sobel={},
        seam_exact=False,
        tile_in=192,
        tile_out=128,
    )
    torch.manual_seed(0)
    network = MaskRcnn(StudentArch(card.encoder, len(card.taxonomy.classes)), width=8)
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.bias[1:3] += 3
        network.roi_heads.mask_predictor.mask_fcn_logits.bias += 1
    return network.eval().requires_grad_(False), card
