"""Tests of torch.compile in the predictor, on a network that compiles in seconds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hover_batch.config import InferSettings
from hover_batch.errors import PackageError
from hover_batch.model.package import find_package
from hover_batch.model.predict import Predictor


class Network(torch.nn.Module):
    """Nine channels, as the starter has."""

    def __init__(self) -> None:
        super().__init__()
        self.into = torch.nn.Conv2d(3, 9, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.into(image).tanh() * 2


def test_the_output_is_that_of_torch() -> None:
    card = find_package("starter").card
    tiles = np.random.default_rng(0).integers(0, 256, (3, card.tile_in, card.tile_in, 3), np.uint8)
    torch.manual_seed(0)
    network = Network()
    plain, fast = (
        Predictor(network, card, InferSettings(runtime=runtime, device="cpu", batch=2)).logits(tiles)
        for runtime in ("torch", "compile")
    )
    np.testing.assert_allclose(fast, plain, atol=1e-5)
    assert plain.std() > 0.1


def test_a_failed_compilation_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    with pytest.raises(PackageError, match="use --runtime torch"):
        Predictor(Network(), find_package("starter").card, InferSettings(runtime="compile", device="cpu"))
