"""Costs compared with published ones and with those counted by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hover_batch.model.architectures.hovernet import TeacherArch, build_teacher
from hover_batch.model.architectures.unet import StudentArch, build_student
from hover_batch.model.card import Card
from hover_batch.model.cost import cost_of, seconds_per_patch
from hover_batch.model.package import find_package, load_network
from hover_batch.taxonomy import PANNUKE

STUDENT = Card(
    name="student",
    architecture="unet",
    encoder="mit_b0",
    taxonomy=PANNUKE,
    mpp=0.25,
    tile_in=320,
    tile_out=256,
    sobel={},
    licence="",
)
TEACHER = dataclasses.replace(STUDENT, name="teacher", architecture="hovernet-fast", tile_in=352)


def test_published_networks_have_their_published_costs() -> None:
    """149.73 and 10.63 GMac in the paper."""
    with torch.device("meta"):  # weights do not matter, and drawing them takes long
        fast, wide = build_teacher(TeacherArch("fast", 6)), build_teacher(TeacherArch("original", 5))
    teacher = cost_of(fast, TEACHER)
    student = cost_of(build_student(StudentArch("mit_b3", 6)), dataclasses.replace(STUDENT, encoder="mit_b3"))
    assert teacher.macs_per_patch / 1e9 == pytest.approx(149.73, rel=0.01)
    assert student.macs_per_patch / 1e9 == pytest.approx(10.63, rel=0.04)
    assert teacher.macs_per_kept_pixel > 15 * student.macs_per_kept_pixel
    original = cost_of(wide, dataclasses.replace(TEACHER, architecture="hovernet-original", tile_in=446))
    assert (teacher.patch, original.patch) == (256, 270)


def by_layer(network: nn.Module, side: int) -> tuple[float, float]:
    """GMacs of a side² patch as tools count that watch layers and not operations, with the products inside of attention
    unseen: of convolutions and linear layers; and with one for each bias and activation and two for each normalised
    value."""
    counts = {"products": 0, "others": 0}

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight
            counts["products"] += output.numel() * weight[0].numel()
            counts["others"] += output.numel() if layer.bias is not None else 0
        elif isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
            counts["others"] += 2 * output.numel()
        elif isinstance(layer, nn.ReLU | nn.GELU):
            counts["others"] += output.numel()

    network = network.to("meta").eval()
    for layer in network.modules():
        layer.register_forward_hook(count)
    with torch.inference_mode():
        network(torch.empty(1, 3, side, side, device="meta"))
    return counts["products"] / 1e9, (counts["products"] + counts["others"]) / 1e9


def test_why_the_papers_counts_differ_from_ours() -> None:
    """The paper's follow if layers are counted instead of products: HoVerNet's to the last digit, the student's between
    its two bounds. Ours have attention's products, and no normalisations."""
    with torch.device("meta"):
        teacher = build_teacher(TeacherArch("fast", 6))
    assert by_layer(teacher, 256)[1] == pytest.approx(149.73, abs=0.005)
    products, all_layers = by_layer(build_student(StudentArch("mit_b3", 6)), 256)
    assert products < 10.63 < all_layers < 1.007 * products


def test_costs_are_those_counted_by_hand() -> None:
    convolution = torch.nn.Conv2d(3, 5, 3, padding=1)
    cost = cost_of(convolution, STUDENT)
    a_pixel = 3 * 5 * 9
    assert cost.parameters == a_pixel + 5
    assert cost.macs_per_patch == 256 * 256 * a_pixel
    assert cost.macs_per_kept_pixel == 320 * 320 * a_pixel / 256**2
    assert cost.to_json()["tile_in"] == 320
    assert convolution.weight.device.type == "cpu"  # as it was


def test_the_starter_costs_as_much_as_its_encoder() -> None:
    package = find_package("starter")
    cost = cost_of(load_network(package), package.card)
    assert cost.macs_per_patch / 1e9 == pytest.approx(2.957, abs=0.002)
    assert cost.parameters == sum(p.numel() for p in load_network(package).parameters())


def test_time_is_measured_on_the_batch() -> None:
    sizes = []

    class Network(torch.nn.Conv2d):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            sizes.append(tuple(image.shape))
            return super().forward(image)

    assert seconds_per_patch(Network(3, 2, 1), STUDENT, batch=4) > 0
    assert sizes == [(1, 3, 256, 256), (4, 3, 256, 256)]
