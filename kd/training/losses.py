"""The losses of HoVerNet and HoVer-UNet, branch by branch, and their sum.

Shapes: b batch, c channel, y, x. Every function takes float32 and returns a scalar. p and q are softmax probabilities,
t and s truths, i pixels of the batch (N of them), c classes (C of them).
Sources: Graham et al. 2019 (HoVer-Net), equations 3–6, with weights of 1 as in the reference implementation, which
also has the gradient kernel; Hinton et al. 2015, equation 1; Tommasino et al. (HoVer-UNet, arXiv 2311.12553),
equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hover_batch.model.heads import HV, NP, Heads
from kd.training.config import TrainConfig

UNKNOWN = -1
"""In place of a class: nothing is to be learnt from the pixel."""


@dataclass(frozen=True)
class Targets:
    """One batch of targets.

    np: (b, y, x) int64, 1 on nuclei · hv: (b, 2, y, x) float32 · tp: (b, y, x) int64 class ids, 0 on nuclei that the
    classes have no name for, from which the type branch learns nothing ·
    has_types: (b,) bool, False where the source annotates no types, so that the branch learns nothing from it ·
    teacher: (b, c, y, x) float32, the teacher's output as `hover_batch.model.heads` lays it out, or None.
    """

    np: Tensor
    hv: Tensor
    tp: Tensor
    has_types: Tensor
    teacher: Tensor | None = None


@dataclass(frozen=True)
class BranchWeights:
    """Weights of the classes in the cross-entropies: np (2,), tp (n_types,); None weighs all alike."""

    np: Tensor | None = None
    tp: Tensor | None = None


def weighted_ce(logits: Tensor, truth: Tensor, weight: Tensor | None = None) -> Tensor:
    """CE = -Σ_i w_{t_i} log p_i(t_i) / Σ_i w_{t_i} (HoVer-Net eq. 5, weighted), over pixels that are not UNKNOWN.

    logits: (b, c, y, x); truth: (b, y, x) int64; weight: (c,), or None for 1.
    """
    return F.cross_entropy(logits, truth, weight, ignore_index=UNKNOWN)


def dice_loss(probabilities: Tensor, truth: Tensor, eps: float = 1e-3) -> Tensor:
    """Dice = Σ_c 1 - (2·Σ_i p_ic t_ic + ε) / (Σ_i p_ic + Σ_i t_ic + ε) (HoVer-Net eq. 6, for each class), over
    pixels that are not UNKNOWN.

    probabilities: (b, c, y, x); truth: (b, y, x) int64.
    """
    known = (truth != UNKNOWN).unsqueeze(1).to(probabilities.dtype)
    one_hot = F.one_hot(truth.clamp(min=0), probabilities.shape[1]).movedim(-1, 1).to(probabilities.dtype) * known
    probabilities = probabilities * known
    overlap = (probabilities * one_hot).sum((0, 2, 3))
    total = probabilities.sum((0, 2, 3)) + one_hot.sum((0, 2, 3))
    return (1 - (2 * overlap + eps) / (total + eps)).sum()


def mse_loss(hv: Tensor, truth: Tensor) -> Tensor:
    """MSE = 1/(2N)·Σ_i (h_i - h'_i)² + (v_i - v'_i)² (HoVer-Net eq. 3, over both maps). Both (b, 2, y, x)."""
    return F.mse_loss(hv, truth)


def gradient_kernels(size: int, like: Tensor) -> Tensor:
    """The derivative kernels (2, 1, size, size) along x and along y, with the reference's weights i / (i² + j²).

    That of h runs along x and that of v along y, as eq. 4 says; the reference's meshgrid has them the other way.
    """
    steps = torch.arange(-(size // 2), size // 2 + 1, dtype=like.dtype, device=like.device)
    v, h = torch.meshgrid(steps, steps, indexing="ij")
    norm = h * h + v * v + 1e-15
    return torch.stack([h / norm, v / norm]).unsqueeze(1)


def msge_loss(hv: Tensor, truth: Tensor, nuclei: Tensor) -> Tensor:
    """MSGE = 1/(2M)·Σ_{i∈M} (∂x h_i - ∂x h'_i)² + (∂y v_i - ∂y v'_i)², M the nucleus pixels (HoVer-Net eq. 4).

    hv, truth: (b, 2, y, x); nuclei: (b, y, x), 1 where there is a nucleus.
    """
    kernels = gradient_kernels(5, hv)
    error = F.conv2d(hv - truth, kernels, padding=2, groups=2)
    focus = nuclei.unsqueeze(1).to(hv.dtype)
    return (focus * error * error).sum() / (2 * focus.sum() + 1e-8)


def kl_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0, mean: str = "pixels") -> Tensor:
    """KL = 1/N·Σ_i Σ_c p_ic log(p_ic / q_ic), with p = softmax(teacher / T) and q = softmax(logits / T)
    (softened as in Hinton et al. eq. 1). Without a factor of T.

    Both (b, c, y, x). mean `elements`: 1/(N·C) in place of 1/N, as the released code reduces.
    """
    p, q = (F.log_softmax(z / temperature, dim=1) for z in (teacher, logits))
    each = F.kl_div(q, p, reduction="none", log_target=True)
    return each.sum(1).mean() if mean == "pixels" else each.mean()


def student_loss(
    output: Tensor, targets: Targets, heads: Heads, weights: BranchWeights | None = None
) -> dict[str, Tensor]:
    """The terms by name of L_student = (CE + Dice)_np + (MSE + MSGE)_hv + (CE + Dice)_tp, their plain sum.

    output: (b, c, y, x) as `heads` lays it out.
    """
    weights = weights or BranchWeights()
    np_logits, hv, tp_logits = output[:, NP], output[:, HV], output[:, heads.tp]
    terms = {
        "np_ce": weighted_ce(np_logits, targets.np, weights.np),
        "np_dice": dice_loss(np_logits.softmax(1), targets.np),
        "hv_mse": mse_loss(hv, targets.hv),
        "hv_msge": msge_loss(hv, targets.hv, targets.np),
    }
    if targets.has_types.any():
        tp_logits, tp = tp_logits[targets.has_types], targets.tp[targets.has_types]
        nameless = (targets.np[targets.has_types] == 1) & (tp == 0)
        tp = tp.masked_fill(nameless, UNKNOWN)
        terms["tp_ce"] = weighted_ce(tp_logits, tp, weights.tp)
        terms["tp_dice"] = dice_loss(tp_logits.softmax(1), tp)
    return terms


def distill_loss(
    output: Tensor,
    teacher: Tensor,
    heads: Heads,
    weights: BranchWeights | None = None,
    temperature: float = 1.0,
    kl_scale: str = "1/T²",
    kl_mean: str = "pixels",
) -> dict[str, Tensor]:
    """The terms by name of L_distill = (CE + k·KL)_np + (MSE + MSGE)_hv + (CE + k·KL)_tp, their plain sum.

    k is 1/T², as the paper states, or T², as Hinton et al. and the released code have it. The truth of CE is the
    class that the teacher prefers, of MSE and MSGE the teacher's h and v, MSGE over its nucleus pixels. The teacher
    has types for every image, so that the type branch learns from images whose annotations have none.
    output, teacher: (b, c, y, x) as `heads` lays it out.
    """
    weights = weights or BranchWeights()
    factor = temperature**2 if kl_scale == "T²" else temperature**-2
    nuclei = teacher[:, NP].argmax(1)
    terms = {}
    for branch, part, weight in (("np", NP, weights.np), ("tp", heads.tp, weights.tp)):
        logits, soft = output[:, part], teacher[:, part]
        terms[f"{branch}_ce"] = weighted_ce(logits, soft.argmax(1), weight)
        terms[f"{branch}_kl"] = factor * kl_loss(logits, soft, temperature, kl_mean)
    terms["hv_mse"] = mse_loss(output[:, HV], teacher[:, HV])
    terms["hv_msge"] = msge_loss(output[:, HV], teacher[:, HV], nuclei)
    return terms


@dataclass(frozen=True)
class Loss:
    """L = α·L_student + (1 - α)·L_distill (HoVer-UNet eq. 1), as a configuration has it."""

    heads: Heads
    config: TrainConfig
    student_weights: BranchWeights = field(default_factory=BranchWeights)
    distill_weights: BranchWeights = field(default_factory=BranchWeights)

    def __call__(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The terms by name, those of L_distill as `kd_…`, and `loss`, which is to be made small."""
        ours, theirs = self.config.loss_shares
        terms = student_loss(output, targets, self.heads, self.student_weights)
        loss = ours * torch.stack(list(terms.values())).sum()
        if theirs:
            assert targets.teacher is not None, "crops of a configuration that distils have the teacher's output"
            config = self.config
            distilled = distill_loss(
                output,
                targets.teacher,
                self.heads,
                self.distill_weights,
                config.temperature,
                config.kl_scale,
                config.kl_mean,
            )
            loss = loss + theirs * torch.stack(list(distilled.values())).sum()
            terms |= {f"kd_{name}": term for name, term in distilled.items()}
        return terms | {"loss": loss}
