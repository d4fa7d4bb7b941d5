"""Merged upsampling and convolution equal the two in sequence."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
from random_weights import randomise

from hover_batch.model.architectures.hovernet import TeacherArch, build_teacher
from hover_batch.model.architectures.unet import StudentArch, build_student
from hover_batch.model.cost import cost_of
from hover_batch.model.package import find_package, load_network
from hover_batch.model.upsampling import upsampling_merged


@pytest.mark.parametrize("encoder", ["mit_b0", "mit_b2", "tu-resnet18"])
@torch.inference_mode()
def test_the_output_is_the_same(encoder: str) -> None:
    network = randomise(build_student(StudentArch(encoder, 5))).double()
    image = torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    merged = upsampling_merged(network)
    assert sum(isinstance(part, torch.nn.ConvTranspose2d) for part in merged.modules()) == 5
    wanted = network(image)
    assert wanted.std() > 0.01
    torch.testing.assert_close(merged(image), wanted)


def test_a_quarter_of_the_starters_products_are_saved() -> None:
    starter = find_package("starter")
    network = load_network(starter)
    plain, merged = (cost_of(n, starter.card).macs_per_kept_pixel for n in (network, upsampling_merged(network)))
    assert merged / plain == pytest.approx(0.746, abs=0.005)


def test_other_networks_stay_as_they_are() -> None:
    with torch.device("meta"):
        teacher = build_teacher(TeacherArch("fast", 6))
        smooth = smp.Unet("resnet18", encoder_weights=None, decoder_interpolation="bilinear")
        attentive = smp.Unet("resnet18", encoder_weights=None, decoder_attention_type="scse")
    for network in (teacher, smooth, attentive):
        assert upsampling_merged(network) is network
