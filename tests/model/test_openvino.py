"""The cache of converted networks: the same output, bit for bit, and never a damaged network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hover_batch.model.openvino as openvino
from hover_batch.config import InferSettings
from hover_batch.model.cache import VARIABLE
from hover_batch.model.package import find_package
from hover_batch.model.predict import load_predictor

SETTINGS = InferSettings(runtime="openvino", device="cpu", batch=1, threads=1)


def test_a_cached_conversion_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = find_package("starter")
    side = package.card.tile_in
    tiles = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    converted: list[int] = []
    convert = openvino.convert
    monkeypatch.setattr(openvino, "convert", lambda network, side: (converted.append(side), convert(network, side))[1])

    def logits() -> bytes:
        return load_predictor(package, SETTINGS).logits(tiles).tobytes()

    monkeypatch.setenv(VARIABLE, "/dev/null/cache")
    uncached = logits()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert logits() == uncached and converted == [side, side]
    assert logits() == uncached and converted == [side, side], "it was not taken from the cache"

    (weights,) = tmp_path.glob("openvino/*/network.bin")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert logits() == uncached and converted == [side] * 3
    assert logits() == uncached and converted == [side] * 3, "the damaged copy was not replaced"
