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

    np: (b, y, x) int64, 1 on nuclei, 0 on the background, UNKNOWN where the image is not annotated; there hv counts
    neither · hv: (b, 2, y, x) float32 · tp: (b, y, x) int64 class ids, UNKNOWN where the class is not annotated ·
    teacher: (b, c, y, x) float32, the teacher's output as `hover_batch.model.heads` lays it out, NaN outside its image,
    or None.
    """

    np: Tensor
    hv: Tensor
    tp: Tensor
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


def dice_loss(probabilities: Tensor, truth: Tensor, over: str = "sum", eps: float = 1e-3) -> Tensor:
    """Dice = Σ_c 1 - (2·Σ_i p_ic t_ic + ε) / (Σ_i p_ic + Σ_i t_ic + ε) (HoVer-Net eq. 6, for each class), over
    pixels that are not UNKNOWN.

    probabilities: (b, c, y, x); truth: (b, y, x) int64. over `present`: the mean over the classes that `truth` holds
    in place of the sum over all, so that a class that is absent from the batch does not count as a miss.
    """
    known = (truth != UNKNOWN).unsqueeze(1).to(probabilities.dtype)
    one_hot = F.one_hot(truth.clamp(min=0), probabilities.shape[1]).movedim(-1, 1).to(probabilities.dtype) * known
    probabilities = probabilities * known
    overlap = (probabilities * one_hot).sum((0, 2, 3))
    total = probabilities.sum((0, 2, 3)) + one_hot.sum((0, 2, 3))
    each = 1 - (2 * overlap + eps) / (total + eps)
    if over == "sum":
        return each.sum()
    present = (one_hot.sum((0, 2, 3)) > 0).to(each.dtype)
    return (each * present).sum() / present.sum().clamp(min=1)


def mse_loss(hv: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """MSE = 1/(2N)·Σ_i (h_i - h'_i)² + (v_i - v'_i)² (HoVer-Net eq. 3, over both maps), over the N `known` pixels.

    hv, truth: (b, 2, y, x); known: (b, y, x) bool.
    """
    error = _where(known, hv - truth)
    return (error * error).sum() / (2 * known.sum()).clamp(min=1)


def gradient_kernels(size: int, like: Tensor) -> Tensor:
    """The derivative kernels (2, 1, size, size) along x and along y, with the reference's weights i / (i² + j²).

    That of h runs along x and that of v along y, as eq. 4 says; the reference's meshgrid has them the other way.
    """
    steps = torch.arange(-(size // 2), size // 2 + 1, dtype=like.dtype, device=like.device)
    v, h = torch.meshgrid(steps, steps, indexing="ij")
    norm = h * h + v * v + 1e-15
    return torch.stack([h / norm, v / norm]).unsqueeze(1)


def msge_loss(hv: Tensor, truth: Tensor, nuclei: Tensor, known: Tensor) -> Tensor:
    """MSGE = 1/(2M)·Σ_{i∈M} (∂x h_i - ∂x h'_i)² + (∂y v_i - ∂y v'_i)², M the nucleus pixels (HoVer-Net eq. 4).

    hv, truth: (b, 2, y, x); nuclei, known: (b, y, x) bool. Pixels that are not known count as without error.
    """
    kernels = gradient_kernels(5, hv)
    error = F.conv2d(_where(known, hv - truth), kernels, padding=2, groups=2)
    focus = (nuclei & known).unsqueeze(1).to(hv.dtype)
    return (focus * error * error).sum() / (2 * focus.sum() + 1e-8)


def kl_loss(logits: Tensor, teacher: Tensor, known: Tensor, temperature: float = 1.0, mean: str = "pixels") -> Tensor:
    """KL = 1/N·Σ_i Σ_c p_ic log(p_ic / q_ic), with p = softmax(teacher / T) and q = softmax(logits / T)
    (softened as in Hinton et al. eq. 1), over the N `known` pixels. Without a factor of T.

    logits, teacher: (b, c, y, x); known: (b, y, x) bool. mean `elements`: 1/(N·C) in place of 1/N, as the released
    code reduces.
    """
    p, q = (F.log_softmax(z / temperature, dim=1) for z in (teacher, logits))
    each = _where(known, F.kl_div(q, p, reduction="none", log_target=True))
    elements = 1 if mean == "pixels" else logits.shape[1]
    return each.sum() / (known.sum() * elements).clamp(min=1)


def student_loss(
    output: Tensor, targets: Targets, heads: Heads, weights: BranchWeights | None = None, dice_over: str = "sum"
) -> dict[str, Tensor]:
    """The terms by name of L_student = (CE + Dice)_np + (MSE + MSGE)_hv + (CE + Dice)_tp, their plain sum.

    Without those of np and hv where no pixel of the batch is annotated, without those of tp where none has a class.
    output: (b, c, y, x) as `heads` lays it out. dice_over: see `dice_loss`.
    """
    weights = weights or BranchWeights()
    np_logits, hv, tp_logits = output[:, NP], output[:, HV], output[:, heads.tp]
    known = targets.np != UNKNOWN
    terms = {}
    if known.any():
        terms["np_ce"] = weighted_ce(np_logits, targets.np, weights.np)
        terms["np_dice"] = dice_loss(np_logits.softmax(1), targets.np, dice_over)
        terms["hv_mse"] = mse_loss(hv, targets.hv, known)
        terms["hv_msge"] = msge_loss(hv, targets.hv, targets.np == 1, known)
    if (targets.tp != UNKNOWN).any():
        terms["tp_ce"] = weighted_ce(tp_logits, targets.tp, weights.tp)
        terms["tp_dice"] = dice_loss(tp_logits.softmax(1), targets.tp, dice_over)
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
    output, teacher: (b, c, y, x) as `heads` lays it out; where the teacher is NaN, nothing is learnt.
    """
    weights = weights or BranchWeights()
    factor = temperature**2 if kl_scale == "T²" else temperature**-2
    known = teacher.isfinite().all(1)
    teacher = _where(known, teacher)
    terms = {}
    for branch, part, weight in (("np", NP, weights.np), ("tp", heads.tp, weights.tp)):
        logits, soft = output[:, part], teacher[:, part]
        preferred = soft.argmax(1).masked_fill(~known, UNKNOWN)
        terms[f"{branch}_ce"] = weighted_ce(logits, preferred, weight)
        terms[f"{branch}_kl"] = factor * kl_loss(logits, soft, known, temperature, kl_mean)
    terms["hv_mse"] = mse_loss(output[:, HV], teacher[:, HV], known)
    terms["hv_msge"] = msge_loss(output[:, HV], teacher[:, HV], teacher[:, NP].argmax(1) == 1, known)
    return terms


def _where(known: Tensor, planes: Tensor) -> Tensor:
    """Planes (b, c, y, x) with zeros where `known` (b, y, x) is False; no gradient passes there."""
    return torch.where(known.unsqueeze(1), planes, torch.zeros((), dtype=planes.dtype, device=planes.device))


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
        terms = student_loss(output, targets, self.heads, self.student_weights, self.config.dice_over)
        # Where nothing is annotated at all, the loss is a zero that still depends on the output.
        loss = ours * self._sum(terms) + 0 * output.sum()
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
            loss = loss + theirs * self._sum(distilled)
            terms |= {f"kd_{name}": term for name, term in distilled.items()}
        return terms | {"loss": loss}

    def _sum(self, terms: dict[str, Tensor]) -> Tensor | float:
        """Sum of the terms, each times the weight of its branch."""
        of_branch = {"np": self.config.np_weight, "hv": self.config.hv_weight, "tp": self.config.tp_weight}
        return sum(of_branch[name[:2]] * term for name, term in terms.items())
