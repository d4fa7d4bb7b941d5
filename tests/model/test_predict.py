"""Quantised maps: exact at the threshold, signed distances, stain densities equal to scikit-image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from random_weights import randomise
from skimage.color import separate_stains
from skimage.color.colorconv import hed_from_rgb
from torch import nn

from hover_batch.config import InferSettings
from hover_batch.errors import InputError
from hover_batch.model.architectures.hovernet import TeacherArch, build_teacher
from hover_batch.model.architectures.unet import StudentArch, build_student
from hover_batch.model.card import Card
from hover_batch.model.fold import folded
from hover_batch.model.heads import Heads, MapLayout
from hover_batch.model.predict import Predictor, quantise, resolve, stain_density
from hover_batch.taxonomy import CONSEP

LAYOUT = MapLayout(5)


def output_of(nucleus: float, h: float = 0.0, v: float = 0.0) -> torch.Tensor:
    """A 1×1 network output whose np softmax gives `nucleus`."""
    output = torch.zeros(1, Heads(5).channels, 1, 1)
    output[0, 1] = float(np.log(nucleus / (1 - nucleus)))
    output[0, 2], output[0, 3] = h, v
    output[0, 6] = 3.0
    return output


def test_planes_and_channels_agree() -> None:
    planes = quantise(output_of(0.9), torch.zeros(1, 3, 1, 1, dtype=torch.uint8), LAYOUT)
    assert planes.shape == (1, LAYOUT.planes, 1, 1) and planes.dtype == torch.uint8
    assert len(LAYOUT.names(tuple(c.name for c in CONSEP.classes))) == LAYOUT.planes


@pytest.mark.parametrize("p", [0.2, 0.25, 0.4999, 0.5, 0.5001, 0.75, 0.999999])
def test_a_nucleus_is_128_or_more_exactly(p: float) -> None:
    rgb = torch.full((1, 3, 1, 1), 100, dtype=torch.uint8)
    output = output_of(p)
    exact = output[:, 0:2].softmax(1)[0, 1].item()
    planes = quantise(output, rgb, LAYOUT)[0, :, 0, 0]
    assert (int(planes[LAYOUT.NP]) >= LAYOUT.NP_NUCLEUS) == (exact >= 0.5)
    near = exact >= 0.25
    assert bool(planes[LAYOUT.tp].any()) == near
    assert bool(planes[LAYOUT.hematoxylin :].any()) == near


def test_distances_are_signed_bytes() -> None:
    rgb = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    for value, stored in ((0.0, 0), (1.0, 127), (-1.0, -127), (3.0, 127), (-0.5, -64)):
        planes = quantise(output_of(0.9, h=value, v=-value), rgb, LAYOUT)[0, :, 0, 0]
        signed = planes.view(torch.int8)
        assert (int(signed[LAYOUT.H]), int(signed[LAYOUT.V])) == (stored, -stored)


def test_stain_densities_are_those_of_scikit_image() -> None:
    rgb = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = stain_density(rgb)[0].permute(1, 2, 0).numpy()
    transmitted = (rgb[0].permute(1, 2, 0).double().numpy() + 1) / 256
    # scikit-image divides by log(1e-6); undone, its densities are natural ones.
    theirs = separate_stains(transmitted, hed_from_rgb) * -np.log(1e-6) / np.log(10)
    assert np.allclose(ours, np.maximum(theirs[..., :2], 0), atol=1e-5)


def test_a_short_batch_is_padded_and_tiles_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    card = Card(
        name="tiny", architecture="unet", encoder="mit_b0", taxonomy=CONSEP, mpp=0.25, tile_in=128, tile_out=64,
        sobel={}, licence="test",
    )  # fmt: skip
    network: nn.Module = build_student(StudentArch("mit_b0", 5))
    predictor = Predictor(network, card, InferSettings(batch=2, precision="fp32", device="cpu"))
    tiles = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    both = predictor.predict(tiles)
    assert both.shape == (2, LAYOUT.planes, 64, 64)
    assert np.array_equal(predictor.predict(tiles[:1])[0], both[0])


def test_out_of_memory_halves_the_batch_and_loses_no_tile() -> None:
    """A device that holds two tiles, asked for eight at a time."""
    torch.manual_seed(0)
    card = Card(
        name="tiny", architecture="unet", encoder="mit_b0", taxonomy=CONSEP, mpp=0.25, tile_in=64, tile_out=32,
        sobel={}, licence="test",
    )  # fmt: skip

    class Holds(nn.Module):
        def __init__(self, most: int) -> None:
            super().__init__()
            self.most, self.network = most, build_student(StudentArch("mit_b0", 5))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            if len(image) > self.most:
                raise torch.OutOfMemoryError("out of memory")
            output: torch.Tensor = self.network(image)
            return output

    settings = InferSettings(batch=8, precision="fp32", device="cpu", runtime="torch")
    tiles = np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), dtype=np.uint8)
    network = Holds(2)
    predictor = Predictor(network, card, settings)
    by_two = Predictor(network, card, replace(settings, batch=2))
    predictor._threads = by_two._threads = None  # whole batches, as on a GPU
    found = predictor.predict(tiles)
    assert predictor.at_once == 2 and predictor.batch == 8 and len(found) == 7
    assert np.array_equal(found, np.concatenate([by_two.predict(tiles[i : i + 2]) for i in range(0, 7, 2)]))
    predictor.network.most = 0  # type: ignore[assignment]  # folded, a copy
    with pytest.raises(torch.OutOfMemoryError):
        predictor.predict(tiles)


def test_auto_is_resolved_and_other_settings_are_kept() -> None:
    resolved = resolve(InferSettings(batch=3))
    assert resolved.precision in ("fp32", "fp16") and resolved.device.split(":")[0] in ("cpu", "cuda")
    assert resolved.batch == 3
    plain = InferSettings(device="cpu")
    assert resolve(plain) == replace(plain, precision="fp32", runtime="openvino")
    assert resolve(replace(plain, precision="bf16")) == replace(plain, precision="bf16", runtime="torch")
    assert resolve(replace(plain, runtime="torch")) == replace(plain, precision="fp32", runtime="torch")


def test_a_missing_device_is_refused() -> None:
    with pytest.raises(InputError, match="--device"):
        resolve(InferSettings(device="cuda:77"))


def test_normalisations_are_folded_into_convolutions() -> None:
    """Of a student ten, of a HoVerNet many, and the outputs are the same but for their last digits."""
    student = randomise(build_student(StudentArch("mit_b0", 5)))
    teacher = randomise(build_teacher(TeacherArch("fast", 5, width=8)))
    for network, most in ((student, 0.0), (teacher, 0.7)):
        image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        quick = folded(network)
        with torch.inference_mode():
            wanted, found = network(image), quick(image)
        assert (wanted - found).abs().max() <= 1e-4 * wanted.abs().max()
        left = [module for module in quick.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        before = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        assert len(left) <= most * len(before)
    plain = torch.nn.ReLU()
    assert folded(plain) is plain
