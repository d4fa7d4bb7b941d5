"""The student loss against closed forms, and its gradients against differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hover_batch.model.heads import HV, NP, Heads
from kd.losses import Targets, dice_loss, gradient_kernels, msge_loss, student_loss

HEADS = Heads(3)


def some_targets(dtype=torch.float64, has_types=(True, True)) -> Targets:
    generator = torch.Generator().manual_seed(4)
    np_map = torch.randint(0, 2, (2, 8, 8), generator=generator)
    hv = torch.rand(2, 2, 8, 8, generator=generator, dtype=dtype) * 2 - 1
    tp = torch.randint(0, 3, (2, 8, 8), generator=generator)
    return Targets(np_map, hv, tp, torch.tensor(has_types))


def some_output(requires_grad=False) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    output = torch.randn(2, HEADS.channels, 8, 8, generator=generator, dtype=torch.float64)
    return output.requires_grad_(requires_grad)


def perfect_output(targets: Targets) -> Tensor:
    output = torch.zeros(2, HEADS.channels, 8, 8, dtype=torch.float64)
    output[:, NP] = 50.0 * torch.nn.functional.one_hot(targets.np, 2).movedim(-1, 1)
    output[:, HV] = targets.hv
    output[:, HEADS.tp] = 50.0 * torch.nn.functional.one_hot(targets.tp, 3).movedim(-1, 1)
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
    nuclei = torch.zeros(1, 12, 12, dtype=torch.int64)
    nuclei[:, 3:9, 4:8] = 1  # the kernel stays inside
    loss = msge_loss(hv, torch.zeros_like(hv), nuclei)
    assert loss.item() == pytest.approx((12 * slope) ** 2 / 2, rel=1e-6)
    across = msge_loss(hv.transpose(2, 3), torch.zeros_like(hv), nuclei)  # h changing along y is not looked at
    assert across.item() == pytest.approx(0, abs=1e-12)
    v = msge_loss(hv.transpose(2, 3).flip(1), torch.zeros_like(hv), nuclei.transpose(1, 2))
    assert v.item() == pytest.approx(loss.item())


def test_msge_sees_neither_a_constant_error_nor_the_background():
    targets = some_targets()
    nuclei = torch.zeros(2, 8, 8, dtype=torch.int64)
    nuclei[:, 2:6, 2:6] = 1
    assert msge_loss(targets.hv + 0.3, targets.hv, nuclei).item() == pytest.approx(0, abs=1e-12)
    assert msge_loss(some_output()[:, HV], targets.hv, torch.zeros_like(nuclei)).item() == 0


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
    terms = student_loss(output, some_targets(has_types=(False, True)), HEADS)
    torch.stack(list(terms.values())).sum().backward()
    assert output.grad is not None
    assert not output.grad[0, HEADS.tp].any()
    assert output.grad[1, HEADS.tp].any()
    assert output.grad[0, NP].any() and output.grad[0, HV].any()


def test_a_batch_without_types_has_no_type_terms():
    terms = student_loss(some_output(), some_targets(has_types=(False, False)), HEADS)
    assert set(terms) == {"np_ce", "np_dice", "hv_mse", "hv_msge"}


@pytest.mark.parametrize("name", ["np_ce", "np_dice", "hv_mse", "hv_msge", "tp_ce", "tp_dice"])
def test_gradients(name):
    targets = some_targets()
    small = Targets(targets.np[:, :5, :5], targets.hv[..., :5, :5], targets.tp[:, :5, :5], targets.has_types)
    output = some_output()[..., :5, :5].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: student_loss(x, small, HEADS)[name], output)
