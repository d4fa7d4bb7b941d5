"""Skipping the margin changes no kept pixel."""

from __future__ import annotations

import pytest
import torch

from hover_batch.model.architectures.hovernet import TeacherArch, build_teacher
from hover_batch.model.architectures.unet import StudentArch, build_student
from hover_batch.model.heads import Heads
from hover_batch.model.margins import without_margin


@pytest.mark.parametrize(
    ("encoder", "tile_in", "tile_out"),
    [("mit_b0", 320, 256), ("mit_b0", 320, 224), ("mit_b1", 192, 102), ("mit_b0", 64, 62), ("tu-resnet18", 256, 128)],
)
@torch.inference_mode()
def test_the_kept_pixels_are_those_of_the_whole_tile(encoder: str, tile_in: int, tile_out: int) -> None:
    torch.manual_seed(0)
    network = build_student(StudentArch(encoder)).eval()
    image = torch.rand(2, 3, tile_in, tile_in)
    margin = (tile_in - tile_out) // 2
    kept = slice(margin, margin + tile_out)
    whole = network(image)[:, :, kept, kept]
    found = without_margin(network, tile_in, tile_out)(image)
    assert found.shape == (2, Heads(5).channels, tile_out, tile_out) and whole.std() > 0.01
    torch.testing.assert_close(found, whole)


def test_other_networks_stay_as_they_are() -> None:
    with torch.device("meta"):
        teacher = build_teacher(TeacherArch("fast", 6))
    student = build_student(StudentArch("mit_b0"))
    assert without_margin(teacher, 352, 256) is teacher
    assert without_margin(student, 256, 256) is student
