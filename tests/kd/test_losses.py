"""Losses compared with closed forms and limits, and their gradients with finite differences."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hover_batch.model.heads import HV, NP, Heads
from kd.training.config import TrainConfig
from kd.training.losses import (
    UNKNOWN,
    BranchWeights,
    Loss,
    Targets,
    dice_loss,
    distill_loss,
    gradient_kernels,
    kl_loss,
    msge_loss,
    soft_ce,
    student_loss,
    weighted_ce,
)

HEADS = Heads(3)
ALL = torch.ones(2, 8, 8, dtype=torch.bool)
"""Pixels that are known, of two images of 8 × 8."""


def some_targets(dtype=torch.float64, typed=(True, True)) -> Targets:
    """Targets of two images of 8 × 8; those that are not `typed` have no classes, and some other nuclei neither."""
    generator = torch.Generator().manual_seed(4)
    np_map = torch.randint(0, 2, (2, 8, 8), generator=generator)
    hv = torch.rand(2, 2, 8, 8, generator=generator, dtype=dtype) * 2 - 1
    tp = torch.randint(0, 3, (2, 8, 8), generator=generator)
    tp[(np_map == 1) & (tp == 0)] = UNKNOWN
    tp[~torch.tensor(typed)] = UNKNOWN
    return Targets(np_map, hv, tp)


def some_output(requires_grad=False) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    output = torch.randn(2, HEADS.channels, 8, 8, generator=generator, dtype=torch.float64)
    return output.requires_grad_(requires_grad)


def perfect_output(targets: Targets) -> Tensor:
    output = torch.zeros(2, HEADS.channels, 8, 8, dtype=torch.float64)
    output[:, NP] = 50.0 * torch.nn.functional.one_hot(targets.np, 2).movedim(-1, 1)
    output[:, HV] = targets.hv
    output[:, HEADS.tp] = 50.0 * torch.nn.functional.one_hot(targets.tp.clamp(min=0), 3).movedim(-1, 1)
    return output


def test_dice_by_hand():
    # class 1: p = .8 .6 .1, t = 1 1 0 → overlap 1.4, sum 1.5 + 2; class 0 the complement: .9, sum 1.5 + 1
    p = torch.tensor([0.8, 0.6, 0.1], dtype=torch.float64).reshape(1, 1, 1, 3)
    truth = torch.tensor([1, 1, 0]).reshape(1, 1, 3)
    expected = (1 - (2 * 1.4 + 1e-3) / (3.5 + 1e-3)) + (1 - (2 * 0.9 + 1e-3) / (2.5 + 1e-3))
    assert dice_loss(torch.cat([1 - p, p], 1), truth).item() == pytest.approx(expected, abs=1e-12)


def test_dice_of_the_truth_is_zero_and_of_its_opposite_the_number_of_classes():
    truth = some_targets().np
    one_hot = torch.nn.functional.one_hot(truth, 2).movedim(-1, 1).double()
    assert dice_loss(one_hot, truth).item() == pytest.approx(0, abs=1e-12)
    assert dice_loss(1 - one_hot, truth).item() == pytest.approx(2, abs=1e-4)


def test_dice_counts_a_class_that_is_absent_as_won_if_it_is_not_predicted():
    truth = torch.zeros(1, 2, 2, dtype=torch.int64)
    p = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert dice_loss(p, truth).item() == pytest.approx(0, abs=1e-12)


def test_dice_over_the_classes_that_are_present():
    truth = torch.tensor([0, 0, 1, UNKNOWN]).reshape(1, 1, 4)
    p = torch.tensor([[0.6, 0.7, 0.2, 0.1], [0.3, 0.1, 0.7, 0.1], [0.1, 0.2, 0.1, 0.8]], dtype=torch.float64)
    by_class = [1 - (2 * 1.3 + 1e-3) / (1.5 + 2 + 1e-3), 1 - (2 * 0.7 + 1e-3) / (1.1 + 1 + 1e-3)]
    assert dice_loss(p.reshape(1, 3, 1, 4), truth, "present").item() == pytest.approx(sum(by_class) / 2)


def test_kernels_are_odd_and_each_others_transpose():
    along_x, along_y = gradient_kernels(5, torch.zeros((), dtype=torch.float64))[:, 0]
    assert torch.equal(along_x, along_y.T)
    assert torch.equal(along_x, -along_x.flip(1))
    assert along_x[2].tolist() == pytest.approx([-1 / 2, -1, 0, 1, 1 / 2])
    assert along_x[0, 0].item() == pytest.approx(-2 / 8)


def test_msge_of_a_ramp():
    # Σ i²/(i² + j²) over 5 × 5 pixels but the centre is 24 / 2, so an error of slope a has the gradient 12·a
    slope = 0.05
    ramp = (slope * torch.arange(12, dtype=torch.float64)).expand(12, 12)
    hv = torch.stack([ramp, torch.zeros(12, 12, dtype=torch.float64)])[None]
    nuclei = torch.zeros(1, 12, 12, dtype=torch.bool)
    nuclei[:, 3:9, 4:8] = True  # the kernel stays inside
    known = torch.ones_like(nuclei)
    loss = msge_loss(hv, torch.zeros_like(hv), nuclei, known)
    assert loss.item() == pytest.approx((12 * slope) ** 2 / 2, rel=1e-6)
    across = msge_loss(hv.transpose(2, 3), torch.zeros_like(hv), nuclei, known)  # h changing along y is not looked at
    assert across.item() == pytest.approx(0, abs=1e-12)
    v = msge_loss(hv.transpose(2, 3).flip(1), torch.zeros_like(hv), nuclei.transpose(1, 2), known)
    assert v.item() == pytest.approx(loss.item())


def test_msge_sees_neither_a_constant_error_nor_the_background():
    targets = some_targets()
    nuclei = torch.zeros(2, 8, 8, dtype=torch.bool)
    nuclei[:, 2:6, 2:6] = True
    known = torch.ones_like(nuclei)
    assert msge_loss(targets.hv + 0.3, targets.hv, nuclei, known).item() == pytest.approx(0, abs=1e-12)
    assert msge_loss(some_output()[:, HV], targets.hv, ~known, known).item() == 0


def test_a_perfect_output_costs_nothing():
    targets = some_targets()
    terms = student_loss(perfect_output(targets), targets, HEADS)
    assert set(terms) == {"np_ce", "np_dice", "hv_mse", "hv_msge", "tp_ce", "tp_dice"}
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(dict.fromkeys(terms, 0), abs=1e-9)


def test_terms_of_an_output_without_opinion():
    targets = some_targets()
    terms = student_loss(torch.zeros(2, HEADS.channels, 8, 8, dtype=torch.float64), targets, HEADS)
    assert terms["np_ce"].item() == pytest.approx(math.log(2))
    assert terms["tp_ce"].item() == pytest.approx(math.log(3))
    assert terms["hv_mse"].item() == pytest.approx(targets.hv.square().mean().item())


def test_images_without_types_teach_the_type_branch_nothing():
    output = some_output(requires_grad=True)
    terms = student_loss(output, some_targets(typed=(False, True)), HEADS)
    torch.stack(list(terms.values())).sum().backward()
    assert output.grad is not None
    assert not output.grad[0, HEADS.tp].any()
    assert output.grad[1, HEADS.tp].any()
    assert output.grad[0, NP].any() and output.grad[0, HV].any()


def test_a_batch_without_types_has_no_type_terms():
    terms = student_loss(some_output(), some_targets(typed=(False, False)), HEADS)
    assert set(terms) == {"np_ce", "np_dice", "hv_mse", "hv_msge"}


def test_a_batch_without_annotations_has_no_terms_and_a_loss_of_zero():
    targets = some_targets(typed=(False, False))
    targets.np.fill_(UNKNOWN)
    output = some_output(requires_grad=True)
    terms = Loss(HEADS, config_with(1.0))(output, targets)
    terms["loss"].backward()
    assert set(terms) == {"loss"} and terms["loss"] == 0
    assert not output.grad.any()


@pytest.mark.parametrize("preset", ["paper", "released", "quick"])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), share=st.floats(0.05, 0.95))
def test_masked_pixels_change_no_gradient(preset, seed, share):
    """What is drawn under the masks, in targets or in the network's own output, changes no other pixel's gradient, and
    the masked pixels have none."""
    generator = torch.Generator().manual_seed(seed)
    targets = taught(some_targets())
    masked_np, masked_tp, masked_kd = torch.rand(3, 2, 8, 8, generator=generator) < share
    masked = Targets(
        targets.np.masked_fill(masked_np, UNKNOWN),
        targets.hv,
        targets.tp.masked_fill(masked_tp, UNKNOWN),
        targets.teacher.masked_fill(masked_kd.unsqueeze(1), math.nan),
    )
    noise = torch.randn(2, HEADS.channels, 8, 8, generator=generator, dtype=torch.float64)
    redrawn = replace(masked, hv=torch.where(masked_np.unsqueeze(1), noise[:, HV], masked.hv))
    config = config_with(0.5, preset)

    def gradient(output: Tensor, of: Targets) -> Tensor:
        output = output.clone().requires_grad_()
        Loss(HEADS, config)(output, of)["loss"].backward()
        assert output.grad is not None
        return output.grad

    output = some_output()
    expected = gradient(output, masked)
    assert torch.equal(gradient(output, redrawn), expected)
    free = torch.zeros(2, HEADS.channels, 8, 8, dtype=torch.bool)  # masked in the student's loss and in the teacher's
    free[:, :4], free[:, HEADS.tp] = (m[:, None] & masked_kd[:, None] for m in (masked_np, masked_tp))
    assert not expected[free].any()
    assert torch.allclose(gradient(torch.where(free, noise, output), masked), expected, atol=1e-12, rtol=0)


def test_weights_of_the_branches():
    output, targets = some_output(), some_targets()
    terms = Loss(HEADS, config_with(1.0, np_weight=2.0, hv_weight=3.0, tp_weight=0.5))(output, targets)
    by_branch = {b: sum(t for name, t in terms.items() if name.startswith(b)) for b in ("np_", "hv_", "tp_")}
    expected = 2 * by_branch["np_"] + 3 * by_branch["hv_"] + 0.5 * by_branch["tp_"]
    assert terms["loss"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("name", ["np_ce", "np_dice", "hv_mse", "hv_msge", "tp_ce", "tp_dice"])
def test_gradients(name):
    targets = some_targets()
    small = Targets(targets.np[:, :5, :5], targets.hv[..., :5, :5], targets.tp[:, :5, :5])
    output = some_output()[..., :5, :5].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: student_loss(x, small, HEADS)[name], output)


def some_teacher(seed=6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, HEADS.channels, 8, 8, generator=generator, dtype=torch.float64)


def test_weighted_cross_entropy_by_hand():
    # two pixels, of class 0 with p .8 and of class 1 with p .4, weights 1 and 3
    p = torch.tensor([[0.8, 0.6], [0.2, 0.4]], dtype=torch.float64).reshape(1, 2, 1, 2)
    truth = torch.tensor([0, 1]).reshape(1, 1, 2)
    expected = -(math.log(0.8) + 3 * math.log(0.4)) / 4
    weight = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert weighted_ce(p.log(), truth, weight).item() == pytest.approx(expected)
    plain = weighted_ce(p.log(), truth).item()
    assert plain == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    # only ratios of weights count
    assert weighted_ce(p.log(), truth, 7 * weight).item() == pytest.approx(expected)


def test_kl_by_hand():
    p = torch.tensor([0.7, 0.3], dtype=torch.float64).reshape(1, 2, 1, 1)
    q = torch.tensor([0.4, 0.6], dtype=torch.float64).reshape(1, 2, 1, 1)
    expected = 0.7 * math.log(0.7 / 0.4) + 0.3 * math.log(0.3 / 0.6)
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    assert kl_loss(q.log(), p.log(), one).item() == pytest.approx(expected)
    assert kl_loss(q.log(), p.log(), one, mean="elements").item() == pytest.approx(expected / 2)
    # T = 2 takes the root of the probabilities, up to their sum
    roots = [[math.sqrt(a) / (math.sqrt(a) + math.sqrt(1 - a)) for a in (x, 1 - x)] for x in (0.7, 0.4)]
    expected = sum(a * math.log(a / b) for a, b in zip(*roots, strict=True))
    assert kl_loss(q.log(), p.log(), one, 2).item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.5, 1, 3])
def test_kl_of_the_teacher_itself_is_zero_and_so_is_its_gradient(temperature):
    teacher = some_teacher()
    student = teacher.clone().requires_grad_()
    loss = kl_loss(student, teacher, ALL, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-12
    assert kl_loss(some_output(), teacher, ALL, temperature) > 0.01


def test_kl_at_high_temperature_is_the_squared_distance_of_the_logits():
    """T²·KL → Σ_c (Δ_c - mean Δ)² / 2C, Δ being the difference of the logits (Hinton et al. 2015, section 2.1)."""
    z, teacher = some_output()[:, :3], some_teacher()[:, :3]
    difference = z - teacher
    centred = difference - difference.mean(1, keepdim=True)
    limit = (centred.square().sum(1) / 6).mean().item()
    assert (1e4**2 * kl_loss(z, teacher, ALL, 1e4)).item() == pytest.approx(limit, rel=1e-3)
    assert kl_loss(z, teacher, ALL, 1e4).item() == pytest.approx(0, abs=1e-7)  # without the factor it vanishes


def test_distillation_from_oneself_costs_only_the_doubt():
    """With the student as its own teacher, KL, MSE and MSGE are zero; CE is that of its own preference."""
    teacher = some_teacher()
    terms = distill_loss(teacher, teacher, HEADS, temperature=3)
    assert set(terms) == {f"{b}_{t}" for b in ("np", "tp") for t in ("ce", "kl")} | {"hv_mse", "hv_msge"}
    for name in ("np_kl", "tp_kl", "hv_mse", "hv_msge"):
        assert terms[name].item() == pytest.approx(0, abs=1e-12)
    sure = teacher[:, NP].softmax(1).amax(1).log().mean()
    assert terms["np_ce"].item() == pytest.approx(-sure.item())


def test_soft_labels_by_hand():
    # two pixels with p = .7 .3 and .2 .8, q = .6 .4 and .5 .5, weights 1 and 3
    p, q = (
        torch.tensor(v, dtype=torch.float64).T.reshape(1, 2, 1, 2)
        for v in ([[0.7, 0.3], [0.2, 0.8]], [[0.6, 0.4], [0.5, 0.5]])
    )
    by_pixel = (
        -(0.7 * math.log(0.6) + 3 * 0.3 * math.log(0.4)),
        -(0.2 * math.log(0.5) + 3 * 0.8 * math.log(0.5)),
    )
    weight = torch.tensor([1.0, 3.0], dtype=torch.float64)
    known = torch.tensor([True, True]).reshape(1, 1, 2)
    assert soft_ce(q.log(), p, known, weight).item() == pytest.approx(sum(by_pixel) / 2)
    known[..., 1] = False
    assert soft_ce(q.log(), p, known, weight).item() == pytest.approx(by_pixel[0])


def test_soft_labels_of_a_sure_teacher_are_hard_ones():
    output, teacher = some_output(), 1e5 * some_teacher()
    hard, soft = (distill_loss(output, teacher, HEADS, labels=labels) for labels in ("hard", "soft"))
    assert {k: v.item() for k, v in soft.items()} == pytest.approx({k: v.item() for k, v in hard.items()}, rel=1e-3)


def test_the_papers_factor_and_the_released_ones():
    output, teacher = some_output(), some_teacher()
    paper = distill_loss(output, teacher, HEADS, temperature=3)
    released = distill_loss(output, teacher, HEADS, None, 3, "T²", "elements")
    assert released["np_kl"].item() == pytest.approx(81 / 2 * paper["np_kl"].item())
    assert released["tp_kl"].item() == pytest.approx(81 / 3 * paper["tp_kl"].item())
    same = {name for name in paper if torch.equal(paper[name], released[name])}
    assert same == {"np_ce", "tp_ce", "hv_mse", "hv_msge"}
    # equal at T = 1
    by_kind = [distill_loss(output, teacher, HEADS, kl_scale=k)["np_kl"] for k in ("T²", "1/T²")]
    assert torch.equal(*by_kind)


def config_with(alpha, preset="paper", **changed) -> TrainConfig:
    given = {"data": Path(), "out": Path(), "teacher": Path("taught"), "alpha": alpha, "temperature": 3.0}
    return TrainConfig.of(preset, **given | changed)


def taught(targets: Targets) -> Targets:
    return replace(targets, teacher=some_teacher())


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_sum_is_equation_1(preset, alpha):
    output, targets = some_output(), taught(some_targets())
    config = config_with(alpha, preset)
    weights = BranchWeights(*(torch.tensor(w, dtype=torch.float64) for w in ([0.5, 1.5], [0.2, 1.0, 1.8])))
    terms = Loss(HEADS, config, weights, weights)(output, targets)
    student = sum(student_loss(output, targets, HEADS, weights, config.dice_over, config.msge_axes).values())
    distill = sum(
        distill_loss(
            *(output, targets.teacher, HEADS, weights, 3, config.kl_scale, config.kl_mean),
            *(config.teacher_labels, config.msge_axes),
        ).values()
    )
    share = alpha if preset == "paper" else 1 - alpha
    assert terms["loss"].item() == pytest.approx((share * student + (1 - share) * distill).item())


def test_where_alpha_is_1_no_teacher_is_asked():
    output, targets = some_output(), some_targets()
    terms = Loss(HEADS, config_with(1.0))(output, targets)
    assert terms["loss"].item() == pytest.approx(sum(student_loss(output, targets, HEADS).values()).item())
    assert not any(name.startswith("kd_") for name in terms)


def test_nuclei_without_a_class_teach_the_type_branch_nothing():
    """In another place than background: what the network says there changes nothing, and its gradient is zero."""
    targets = some_targets()
    nameless = targets.tp == UNKNOWN
    assert nameless.any()
    output = some_output(requires_grad=True)
    terms = student_loss(output, targets, HEADS)
    (terms["tp_ce"] + terms["tp_dice"]).backward()
    assert output.grad is not None
    gradient = output.grad[:, HEADS.tp].abs().sum(1)
    assert (gradient[nameless] == 0).all()
    assert (gradient[~nameless] > 0).all()


def test_a_teacher_has_types_where_the_annotations_have_none():
    output = some_output(requires_grad=True)
    targets = taught(some_targets(typed=(False, False)))
    Loss(HEADS, config_with(0.5))(output, targets)["loss"].backward()
    assert output.grad[:, HEADS.tp].abs().sum() > 0


@pytest.mark.parametrize("name", ["np_ce", "np_kl", "hv_mse", "hv_msge", "tp_ce", "tp_kl"])
def test_gradients_of_distillation(name):
    teacher = some_teacher()[..., :5, :5].contiguous()
    output = some_output()[..., :5, :5].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distill_loss(x, teacher, HEADS, temperature=2)[name], output)
