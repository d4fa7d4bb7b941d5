"""HoVerNet equals tiatoolbox's for the same state dict; output of windows larger than the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_weights import randomise
from torch import Tensor

from hover_batch.model.architectures.hovernet import Form, TeacherArch, arch_of, build_teacher
from hover_batch.model.heads import HV, NP, Heads

FORMS: tuple[Form, ...] = ("fast", "original")
SMALLEST = {"fast": 96, "original": 198}
"""Sides of the smallest windows that leave an output: of 4 and 8 pixels. The published ones take a CPU seconds."""


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).float()


def loaded(weights: dict[str, Tensor]) -> Any:
    """Our network with these weights, strictly: the same names and shapes."""
    with torch.device("meta"):  # no time for weights that are replaced at once
        network = build_teacher(arch_of(weights))
    network.load_state_dict(weights, assign=True)
    return network.eval()


@pytest.mark.parametrize("form", FORMS)
def test_the_output_is_that_of_tiatoolbox(hovernet: Any, form: Form) -> None:
    theirs = randomise(hovernet(num_types=6, mode=form))
    weights = theirs.state_dict()
    image = noise(1, 3, SMALLEST[form], SMALLEST[form])
    with torch.inference_mode():
        expected = theirs(image.clone())  # which divides by 255 itself

    ours = loaded(weights)
    with torch.inference_mode():
        output = ours(image / 255)
    assert output.shape == (1, Heads(6).channels, *[SMALLEST[form] - ours.arch.shrink] * 2)
    for channels, name in ((NP, "np"), (HV, "hv"), (Heads(6).tp, "tp")):
        assert expected[name].std() > 0.1
        torch.testing.assert_close(output[:, channels], expected[name], rtol=1e-4, atol=1e-4)

    # Without a type branch the others are what they were, and each nucleus is of the only type.
    untyped = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder.tp.")}
    with torch.device("meta"):
        assert untyped.keys() == hovernet(num_types=None, mode=form).state_dict().keys()
    assert arch_of(untyped) == TeacherArch(form, None)
    if form == "fast":  # the larger window is not worth its seconds
        with torch.inference_mode():
            short = loaded(untyped)(image / 255)
        torch.testing.assert_close(short[:, NP], expected["np"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(short[:, HV], expected["hv"], rtol=1e-4, atol=1e-4)
        assert torch.equal(short[:, Heads(2).tp], short[:, NP])


@pytest.mark.parametrize(("form", "side", "out"), [("fast", 256, 164), ("original", 270, 80)])
def test_published_windows_and_those_of_the_tile_grid(form: Form, side: int, out: int) -> None:
    arch = TeacherArch(form, 3)
    with torch.device("meta"):  # shapes alone
        network = build_teacher(arch)
        tile_in, kept = arch.tile
        assert network(torch.zeros(1, 3, side, side)).shape == (1, 7, out, out)
        spare = network(torch.zeros(1, 3, tile_in, tile_in)).shape[2] - kept
        assert spare == (4 if form == "fast" else 0)
        uneven = 348 if form == "fast" else 448  # 348 - 92 = 256
        with pytest.raises(ValueError, match="divided by 8"):
            network(torch.zeros(1, 3, uneven, uneven))
    assert kept == 256


@pytest.mark.parametrize(("form", "big"), [("fast", 240), ("original", 334)])
def test_beyond_the_reach_of_their_edges_two_windows_agree(form: Form, big: int) -> None:
    """Two windows, one in the other and shifted by multiples of 8, just large enough for pixels beyond their reach.
    An eighth of the width: of the same geometry."""
    network = randomise(build_teacher(arch := TeacherArch(form, 3, width=8)))
    small, left, top = big - 24, 16, 8
    image = noise(1, 3, big, big) / 255
    with torch.inference_mode():
        whole, part = network(image), network(image[:, :, top : top + small, left : left + small])
    same = whole[:, :, top : top + part.shape[2], left : left + part.shape[3]]
    off = ((part - same).abs() / same.std()).amax(1)[0]
    (before, after), crop = arch.reach, arch.shrink // 2
    clean = slice(before - crop, small - after - crop)
    assert clean.stop - clean.start == small - before - after >= 12
    assert off[clean, clean].max() < 1e-4  # float32 sums in another order
    # Near its edges the smaller window shows: its encoder has padded with zeros what the other one sees.
    assert min(side.max() for side in (off[0], off[-1], off[:, 0], off[:, -1])) > 0.1
