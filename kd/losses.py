"""The student loss of HoVerNet and HoVer-UNet, branch by branch.

Shapes: b batch, c channel, y, x. Every function takes float32 and returns a scalar.
Sources: Graham et al. 2019, equations 3–6 (what each branch sums, and the weights of 1); the reference
implementation for the gradient kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hover_batch.model.heads import HV, NP, Heads


@dataclass(frozen=True)
class Targets:
    """One batch of targets.

    np: (b, y, x) int64, 1 on nuclei · hv: (b, 2, y, x) float32 · tp: (b, y, x) int64 class ids ·
    has_types: (b,) bool, False where the source annotates no types, so that the branch learns nothing from it.
    """

    np: Tensor
    hv: Tensor
    tp: Tensor
    has_types: Tensor


def dice_loss(probabilities: Tensor, truth: Tensor, eps: float = 1e-3) -> Tensor:
    """Sum over the classes of 1 - (2·Σpt + ε) / (Σp + Σt + ε), each Σ over the batch's pixels (HoVer-Net eq. 6).

    probabilities: (b, c, y, x); truth: (b, y, x) int64.
    """
    one_hot = F.one_hot(truth, probabilities.shape[1]).movedim(-1, 1).to(probabilities.dtype)
    overlap = (probabilities * one_hot).sum((0, 2, 3))
    total = probabilities.sum((0, 2, 3)) + one_hot.sum((0, 2, 3))
    return (1 - (2 * overlap + eps) / (total + eps)).sum()


def gradient_kernels(size: int, like: Tensor) -> Tensor:
    """The derivative kernels (2, 1, size, size) along x and along y: i / (i² + j²), as the reference has them."""
    steps = torch.arange(-(size // 2), size // 2 + 1, dtype=like.dtype, device=like.device)
    v, h = torch.meshgrid(steps, steps, indexing="ij")
    norm = h * h + v * v + 1e-15
    return torch.stack([h / norm, v / norm]).unsqueeze(1)


def msge_loss(hv: Tensor, truth: Tensor, nuclei: Tensor) -> Tensor:
    """Mean squared error of the gradients of h along x and v along y, over nucleus pixels (HoVer-Net eq. 4).

    hv, truth: (b, 2, y, x); nuclei: (b, y, x), 1 where there is a nucleus.
    """
    kernels = gradient_kernels(5, hv)
    error = F.conv2d(hv - truth, kernels, padding=2, groups=2)
    focus = nuclei.unsqueeze(1).to(hv.dtype)
    return (focus * error * error).sum() / (2 * focus.sum() + 1e-8)


def student_loss(output: Tensor, targets: Targets, heads: Heads) -> dict[str, Tensor]:
    """The terms of L_student by name; their plain sum is the loss.

    output: (b, c, y, x) as `heads` lays it out.
    """
    np_logits, hv, tp_logits = output[:, NP], output[:, HV], output[:, heads.tp]
    terms = {
        "np_ce": F.cross_entropy(np_logits, targets.np),
        "np_dice": dice_loss(np_logits.softmax(1), targets.np),
        "hv_mse": F.mse_loss(hv, targets.hv),
        "hv_msge": msge_loss(hv, targets.hv, targets.np),
    }
    if targets.has_types.any():
        tp_logits, tp = tp_logits[targets.has_types], targets.tp[targets.has_types]
        terms["tp_ce"] = F.cross_entropy(tp_logits, tp)
        terms["tp_dice"] = dice_loss(tp_logits.softmax(1), tp)
    return terms
