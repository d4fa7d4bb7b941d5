"""The preset `released` computes what DIAGNijmegen/HoVer-UNet computes at 913d2a9.

The expected numbers are those of its `losses.loss_fcn`, run on a CPU with torch 2.12 in float32, and of the functions
of kornia 0.7.0 that its augmentation calls.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hover_batch.model.heads import Heads
from kd.data.appearance import change_color
from kd.data.samples import Sample
from kd.training.augment import random_view
from kd.training.config import TrainConfig
from kd.training.losses import BranchWeights, Loss, Targets

STUDENT = BranchWeights(
    torch.tensor([0.6186044463779635, 1.3813955536220366]),
    torch.tensor(
        [0.10654577579627722, 0.3310121522330427, 0.7301252761147444]
        + [0.5030386955824504, 3.711333187208553, 0.6179449130649323]
    ),
)
"""Class weights for the annotations, in `_student_loss`."""
TEACHER = BranchWeights(
    torch.tensor([0.6055308830505653, 1.3944691169494348]),
    torch.tensor(
        [0.12137613059784041, 0.3585983027106687, 0.962839423013976]
        + [0.6344337609164922, 3.1918593602633436, 0.730893022497679]
    ),
)
"""Class weights for the teacher's predictions, in `_distill_loss`."""


def batch(absent: int | None) -> tuple[torch.Tensor, Targets]:
    """Random output, annotations and teacher; no pixel is of the class `absent`."""
    rng = np.random.default_rng(913)
    output, teacher = torch.from_numpy(rng.normal(0, 1, (2, 2, 10, 24, 20)).astype(np.float32))
    hv = torch.from_numpy(rng.uniform(-1, 1, (2, 2, 24, 20)).astype(np.float32))
    for planes in (output[:, 2:4], teacher[:, 2:4], hv):
        planes *= 0.2
    tp = torch.from_numpy(rng.integers(0, 6, (2, 24, 20)))
    tp[tp == absent] = 0
    return output, Targets((tp > 0).long(), hv, tp, teacher)


# fmt: off
@pytest.mark.parametrize(
    ("absent", "alpha", "temperature", "expected", "gradients"),
    [
        (None, 0.5, 3.0, 4.3332577,
         (0.4702157, 0.4702157, 2.055801, 1.966759, 0.1658705, 0.1660435, 0.205321, 0.1721784, 0.4655738, 0.1760393)),
        (None, 0.25, 1.0, 4.5387759,
         (0.5301811, 0.5301811, 1.96966, 1.918624, 0.1870371, 0.198787, 0.246128, 0.2056994, 0.5164966, 0.2097962)),
        (None, 1.0, 5.0, 3.8943515,
         (0.5080726, 0.5080726, 2.519463, 2.333113, 0.1630902, 0.1523709, 0.1832619, 0.1651822, 0.4040678, 0.1680984)),
        (4, 0.5, 3.0, 4.2632723,
         (0.4682188, 0.4682188, 2.057465, 1.954864, 0.1708617, 0.1993184, 0.2638925, 0.212423, 0.2061796, 0.2280224)),
        (4, 0.0, 3.0, 4.6417084,
         (0.6822351, 0.6822351, 2.022864, 1.970993, 0.268208, 0.3095979, 0.42151, 0.3333154, 0.1818938, 0.3649848)),
    ],
)
# fmt: on
def test_loss_and_gradient(absent, alpha, temperature, expected, gradients):
    config = TrainConfig.of(
        "released", data=Path(), out=Path(), teacher=Path(), alpha=alpha, temperature=temperature
    )
    output, targets = batch(absent)
    output.requires_grad_()
    loss = Loss(Heads(6), config, STUDENT, TEACHER)(output, targets)["loss"]
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    loss.backward()
    assert output.grad.abs().sum((0, 2, 3)).tolist() == pytest.approx(gradients, abs=1e-5)


@pytest.mark.parametrize("changed", ["dice_over", "msge_axes", "teacher_labels", "kl_mean", "kl_scale", "alpha_of"])
def test_each_setting_matters(changed):
    """The agreement is no accident: with the paper's value of any one setting, or the default, the loss is another."""
    given = {"data": Path(), "out": Path(), "teacher": Path(), "alpha": 0.25, "temperature": 3.0}
    default = getattr(TrainConfig(**given), changed)
    losses = [
        Loss(Heads(6), TrainConfig.of("released", **given, **more), STUDENT, TEACHER)(*batch(4))["loss"].item()
        for more in ({}, {changed: default})
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize(
    ("amounts", "first", "mean"),
    [
        ({"hue": 0.09}, (184, 149.96, 60), (136.448, 117.047, 116.825)),
        ({"hue": -0.1}, (184, 60, 111.4), (129.35, 111.546, 132.146)),
        ({"saturation": 0.08}, (184, 74.92, 50.08), (127.487, 107.104, 117.827)),
        ({"contrast": 0.1}, (202.4, 91.3, 66), (143.098, 122.344, 133.931)),
        ({"brightness": -0.07}, (166.15, 65.15, 42.15), (113.688, 95.441, 104.727)),
        (
            {"hue": -0.1, "contrast": 0.08, "brightness": 0.06, "saturation": -0.09},
            (214.02, 92.15, 142.67),
            (158.882, 140.581, 159.638),
        ),
        (
            {"saturation": 0.1, "brightness": -0.1, "hue": 0.05, "contrast": -0.04},
            (152.16, 84.79, 21.22),
            (101.676, 83.667, 86.494),
        ),
    ],
)
def test_colour_changes(amounts, first, mean):
    image = np.random.default_rng(8).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    changed = change_color(image, amounts)
    assert changed[0, 0] == pytest.approx(first, abs=0.51)  # rounded to bytes
    assert changed.mean((0, 1)) == pytest.approx(mean, abs=0.2)


def test_augmentation_of_the_preset():
    """Half of the views are recoloured and half blurred, independently; none is turned, and the labels stay."""
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    labels = np.zeros((64, 64), np.int32)
    labels[10:20, 30:50] = 1
    sample = Sample("a", "pannuke", "", image, labels, None)
    kind = TrainConfig.of("released", data=Path(), out=Path(), alpha=0.0).augmentation
    views = [random_view(sample, 64, rng, kind) for _ in range(200)]
    assert all(np.array_equal(view.instances[32:-32, 32:-32], labels) for view in views)
    unchanged = sum(np.array_equal(view.image, image) for view in views)
    assert 30 < unchanged < 70  # a quarter, with a standard deviation of 6
