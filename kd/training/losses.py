"""Compute the losses of HoVerNet and HoVer-UNet for each branch, and their weighted sum.

Shapes: b batch, c channel, y, x. The functions take float32 tensors and return scalars. In formulas, p and q are
softmax probabilities, t is the true class (as one-hot vector: t_ic), h and v are predicted distances and h' and v' true
ones, i runs over the N pixels of the batch and c over the C classes.

Sources: Graham et al. 2019 (HoVer-Net), equations 3–6, with weights of 1 and the gradient kernel of the reference
implementation; Hinton et al. 2015, equation 1; Tommasino et al. (HoVer-UNet, arXiv 2311.12553), equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hover_batch.model.heads import HV, NP, Heads
from kd.training.config import TrainConfig
from kd.training.precision import training_autocast

UNKNOWN = -1
"""Class of a pixel that no loss counts."""


@dataclass(frozen=True)
class Targets:
    """Targets of one batch."""

    np: Tensor
    """(b, y, x) int64: 1 on nuclei, 0 on the background, UNKNOWN where nuclei are not annotated."""
    hv: Tensor
    """(b, 2, y, x) float32: h and v in [-1, 1], 0 on the background; ignored where np is UNKNOWN. For other systems
    what `kd.training.systems` says."""
    tp: Tensor
    """(b, y, x) int64: class ids, UNKNOWN where classes are not annotated."""
    teacher: Tensor | None = None
    """(b, c, y, x) float32: the teacher's output as in `hover_batch.model.heads`, NaN outside its image; None without a
    teacher."""


@dataclass(frozen=True)
class BranchWeights:
    """Class weights of the cross-entropies, on the device of the network."""

    np: Tensor | None = None
    """(2,) float32: weights of background and nucleus; None for equal weights."""
    tp: Tensor | None = None
    """(n_types,) float32: weights of the classes; None for equal weights."""


def weighted_ce(logits: Tensor, truth: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the weighted cross-entropy over pixels that are not UNKNOWN (HoVer-Net eq. 5, with class weights).

    CE = -Σ_i w_{t_i} log p_i(t_i) / Σ_i w_{t_i}, with p = softmax(logits), where t_i is the true class of pixel i. It
    is NaN if all pixels are UNKNOWN.

    `logits`: (b, c, y, x). `truth`: (b, y, x) int64 class ids. `weight`: (c,) weights w of the classes; None for equal
    weights.
    """
    return F.cross_entropy(logits, truth, weight, ignore_index=UNKNOWN)


def soft_ce(logits: Tensor, p: Tensor, known: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the cross-entropy with probabilities as the target, over the N known pixels; NaN if no pixel is known.

    CE = -1/N·Σ_i Σ_c w_c p_ic log q_ic, with q = softmax(logits). As in torch with such targets, the sum is divided by
    the number of pixels. `weighted_ce` divides it by the pixels' weights.

    `logits`: (b, c, y, x). `p`: (b, c, y, x) target probabilities. `known`: (b, y, x) bool. `weight`: (c,) weights w of
    the classes; None for equal weights.
    """
    return F.cross_entropy(logits, _where(known, p), weight, reduction="sum") / known.sum()


def dice_loss(probabilities: Tensor, truth: Tensor, over: str = "sum") -> Tensor:
    """Return the Dice loss over pixels that are not UNKNOWN (HoVer-Net eq. 6, for each class).

    Dice = Σ_c [1 - (2·Σ_i p_ic t_ic + ε) / (Σ_i p_ic + Σ_i t_ic + ε)], where t_ic is 1 if c is the true class of pixel
    i, else 0. ε is 1e-3, as in HoVerNet's code, or 0 with `over` "mean", as in HoVer-UNet's.

    `probabilities`: (b, c, y, x), the p_ic. `truth`: (b, y, x) int64 class ids. `over`: "sum", the sum over all
    classes; "present", the mean over the classes that occur in `truth`, so that absent classes are not counted as
    missed; or "mean", the sum over the classes that occur, divided by the number of all classes.
    """
    eps = 0.0 if over == "mean" else 1e-3
    known = (truth != UNKNOWN).unsqueeze(1).to(probabilities.dtype)
    one_hot = F.one_hot(truth.clamp(min=0), probabilities.shape[1]).movedim(-1, 1).to(probabilities.dtype) * known
    probabilities = probabilities * known
    overlap = (probabilities * one_hot).sum((0, 2, 3))
    total = probabilities.sum((0, 2, 3)) + one_hot.sum((0, 2, 3))
    each = 1 - (2 * overlap + eps) / (total + eps).clamp(min=1e-7)
    if over == "sum":
        return each.sum()
    present = (one_hot.sum((0, 2, 3)) > 0).to(each.dtype)  # 1 for classes that occur, else 0
    classes = present.sum().clamp(min=1) if over == "present" else len(each)
    return (each * present).sum() / classes


def mse_loss(hv: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Return the mean squared error of h and v over the N known pixels (HoVer-Net eq. 3, over both maps).

    MSE = 1/(2N)·Σ_i [(h_i - h'_i)² + (v_i - v'_i)²], where h' and v' are the true values. It is 0 if no pixel is known.

    `hv`, `truth`: (b, 2, y, x) predicted and true h and v. `known`: (b, y, x) bool.
    """
    error = _where(known, hv - truth)
    return (error * error).sum() / (2 * known.sum()).clamp(min=1)


def gradient_kernels(size: int, like: Tensor) -> Tensor:
    """Return derivative kernels (2, 1, size, size), along x and then along y.

    A weight is i/(i² + j²), where i is the offset from the centre along the derivative and j the offset across it; the
    centre has 0. The kernels are those of HoVer-Net's reference implementation, and are not normalised.

    `size`: odd side in pixels. `like`: tensor with the dtype and device to use.
    """
    steps = torch.arange(-(size // 2), size // 2 + 1, dtype=like.dtype, device=like.device)
    v, h = torch.meshgrid(steps, steps, indexing="ij")
    norm = h * h + v * v + 1e-15
    return torch.stack([h / norm, v / norm]).unsqueeze(1)


def msge_loss(hv: Tensor, truth: Tensor, nuclei: Tensor, known: Tensor, axes: str = "own") -> Tensor:
    """Return the mean squared error of the gradients of h and v over nuclei (HoVer-Net eq. 4); 0 without known nuclei.

    MSGE = 1/(2·Σ_i m_i)·Σ_i m_i·[(∂x h_i - ∂x h'_i)² + (∂y v_i - ∂y v'_i)²], where h' and v' are the true values. m_i
    is the value of `nuclei`: 1 on nuclei and 0 on the background, or the probability of a nucleus. Errors of h and v at
    unknown pixels are set to 0 before the derivative. The derivatives are sums with the 5 × 5 weights of
    `gradient_kernels`.

    `hv`, `truth`: (b, 2, y, x) predicted and true h and v. `nuclei`: (b, y, x) bool or float. `known`: (b, y, x) bool.
    `axes`: "own" as in the equation; "swapped" for the derivatives ∂y h and ∂x v, which the code of HoVerNet and
    HoVer-UNet computes.
    """
    kernels = gradient_kernels(5, hv)
    if axes == "swapped":
        kernels = kernels.flip(0)
    error = F.conv2d(_where(known, hv - truth), kernels, padding=2, groups=2)
    focus = (nuclei * known).unsqueeze(1).to(hv.dtype)
    return (focus * error * error).sum() / (2 * focus.sum() + 1e-8)


def kl_loss(logits: Tensor, teacher: Tensor, known: Tensor, temperature: float = 1.0, mean: str = "pixels") -> Tensor:
    """Return the KL divergence of the softened student from the teacher over the N known pixels; 0 if none is known.

    KL = 1/N·Σ_i Σ_c p_ic log(p_ic / q_ic), with p = softmax(teacher / T) and q = softmax(logits / T), softened as in
    Hinton et al. eq. 1; it is not multiplied by a power of T.

    `logits`, `teacher`: (b, c, y, x) logits of the student and of the teacher. `known`: (b, y, x) bool. `temperature`:
    T. `mean`: "pixels" for 1/N, or "elements" for 1/(N·C) as in HoVer-UNet's released code.
    """
    p, q = (F.log_softmax(z / temperature, dim=1) for z in (teacher, logits))
    each = _where(known, F.kl_div(q, p, reduction="none", log_target=True))
    elements = 1 if mean == "pixels" else logits.shape[1]
    return each.sum() / (known.sum() * elements).clamp(min=1)


def student_loss(
    output: Tensor,
    targets: Targets,
    heads: Heads,
    weights: BranchWeights | None = None,
    dice_over: str = "sum",
    msge_axes: str = "own",
) -> dict[str, Tensor]:
    """Return the terms of L_student by name: np_ce, np_dice, hv_mse, hv_msge, tp_ce, tp_dice.

    L_student = (CE + Dice)_np + (MSE + MSGE)_hv + (CE + Dice)_tp. Terms of np and hv are left out if no pixel of the
    batch is annotated, terms of tp if no pixel has a class.

    `output`: the network's output (b, c, y, x) with the channels of `heads`. `targets`: annotations. `weights`: class
    weights; None for equal weights. `dice_over`: argument `over` of `dice_loss`. `msge_axes`: argument `axes` of
    `msge_loss`.
    """
    weights = weights or BranchWeights()
    np_logits, hv, tp_logits = output[:, NP], output[:, HV], output[:, heads.tp]
    known = targets.np != UNKNOWN
    terms = {}
    if known.any():
        terms["np_ce"] = weighted_ce(np_logits, targets.np, weights.np)
        terms["np_dice"] = dice_loss(np_logits.softmax(1), targets.np, dice_over)
        terms["hv_mse"] = mse_loss(hv, targets.hv, known)
        terms["hv_msge"] = msge_loss(hv, targets.hv, targets.np == 1, known, msge_axes)
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
    labels: str = "hard",
    msge_axes: str = "own",
) -> dict[str, Tensor]:
    """Return the terms of L_distill by name: np_ce, np_kl, hv_mse, hv_msge, tp_ce, tp_kl.

    L_distill = (CE + k·KL)_np + (MSE + MSGE)_hv + (CE + k·KL)_tp. The KL terms are returned already multiplied by k.
    The targets of MSE and MSGE are the teacher's h and v. The teacher predicts types for every image, so the branch tp
    also learns from images without annotated types. Pixels where any channel of the teacher is not finite are not
    counted; the CE terms are NaN if no pixel is left.

    `output`, `teacher`: outputs of both networks (b, c, y, x) with the channels of `heads`. `weights`: class weights;
    None for equal weights. `temperature`: T. `kl_scale`: k; "1/T²" as in the HoVer-UNet paper, or "T²" as in Hinton et
    al. and in HoVer-UNet's released code. `kl_mean`: argument `mean` of `kl_loss`. `msge_axes`: argument `axes` of
    `msge_loss`.

    `labels`: with "hard", the target of CE is the teacher's most probable class, and MSGE counts the pixels where this
    is a nucleus. With "soft", the target of CE is the teacher's probabilities, and MSGE weights each pixel by the
    probability of a nucleus.
    """
    weights = weights or BranchWeights()
    factor = temperature**2 if kl_scale == "T²" else temperature**-2
    known = teacher.isfinite().all(1)
    teacher = _where(known, teacher)
    terms = {}
    for branch, channels, weight in (("np", NP, weights.np), ("tp", heads.tp, weights.tp)):
        logits, teacher_logits = output[:, channels], teacher[:, channels]
        if labels == "soft":
            terms[f"{branch}_ce"] = soft_ce(logits, teacher_logits.softmax(1), known, weight)
        else:
            most_probable = teacher_logits.argmax(1).masked_fill(~known, UNKNOWN)
            terms[f"{branch}_ce"] = weighted_ce(logits, most_probable, weight)
        terms[f"{branch}_kl"] = factor * kl_loss(logits, teacher_logits, known, temperature, kl_mean)
    terms["hv_mse"] = mse_loss(output[:, HV], teacher[:, HV], known)
    nuclei = teacher[:, NP].softmax(1)[:, 1] if labels == "soft" else teacher[:, NP].argmax(1) == 1
    terms["hv_msge"] = msge_loss(output[:, HV], teacher[:, HV], nuclei, known, msge_axes)
    return terms


def _where(known: Tensor, planes: Tensor) -> Tensor:
    """Return planes (b, c, y, x) with zeros, and without a gradient, where `known` (b, y, x) is False."""
    return torch.where(known.unsqueeze(1), planes, torch.zeros((), dtype=planes.dtype, device=planes.device))


@dataclass(frozen=True)
class Loss:
    """Loss of a configuration: L = α·L_student + (1 - α)·L_distill (HoVer-UNet eq. 1).

    It is for networks with HoVerNet's branches. The losses of other systems are derived from it
    (`kd.training.systems`).
    In both parts, the terms of a branch are multiplied by the weight of the branch.
    """

    heads: Heads
    """Channels of the output."""
    config: TrainConfig
    """Settings of the training."""
    student_weights: BranchWeights = field(default_factory=BranchWeights)
    """Class weights for the annotations."""
    distill_weights: BranchWeights = field(default_factory=BranchWeights)
    """Class weights for the teacher's predictions."""

    def of_batch(self, network: nn.Module, image: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Run `network` on a batch. Return the terms of the loss by name, and under `loss` the loss to minimise.

        The network computes in `training_autocast`, the loss in float32.

        `image`: (b, 3, y, x) float32 in [0, 1]. `targets`: targets of the batch.
        """
        with training_autocast(image.device):
            output = network(image)
        return self(output.float(), targets)

    def __call__(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Return the terms by name, those of L_distill with the prefix `kd_`, and under `loss` the loss to minimise.

        The terms are neither weighted by branch nor multiplied by α; `loss` is. `output`: the network's output
        (b, c, y, x) float32 as in `heads`.
        """
        config = self.config
        student_share, distill_share = config.loss_shares
        terms = student_loss(output, targets, self.heads, self.student_weights, config.dice_over, config.msge_axes)
        # Without any annotation the loss is 0, and must still depend on the output for backward().
        loss = student_share * self._sum(terms) + 0 * output.sum()
        if distill_share:
            assert targets.teacher is not None, "distillation needs crops with the teacher's output"
            distilled = distill_loss(
                output,
                targets.teacher,
                self.heads,
                self.distill_weights,
                config.temperature,
                config.kl_scale,
                config.kl_mean,
                config.teacher_labels,
                config.msge_axes,
            )
            loss = loss + distill_share * self._sum(distilled)
            terms |= {f"kd_{name}": term for name, term in distilled.items()}
        return terms | {"loss": loss}

    def _sum(self, terms: dict[str, Tensor]) -> Tensor | float:
        """Return the sum of the terms, each multiplied by the weight of its branch."""
        of_branch = {"np": self.config.np_weight, "hv": self.config.hv_weight, "tp": self.config.tp_weight}
        return sum(of_branch[name[:2]] * term for name, term in terms.items())
