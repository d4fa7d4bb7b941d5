"""Other precisions and runtimes find the same nuclei as fp32 with torch; threads change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from hover_batch.config import InferSettings, Precision, Runtime
from hover_batch.metrics import panoptic_quality
from hover_batch.model.images import predict_image
from hover_batch.model.package import find_package, load_network
from hover_batch.model.predict import Predictor
from hover_batch.nuclei.watershed import SobelConstants, instance_map


@pytest.fixture(scope="module")
def image(data: Path) -> np.ndarray:
    return np.ascontiguousarray(cv2.imread(str(data / "nuclei" / "images" / "consep_train_09.png"))[..., ::-1])


def instances(image: np.ndarray, **settings: Any) -> np.ndarray:
    """Return the starter's nuclei in `image`, with `settings` of the network."""
    package = find_package("starter")
    maps = predict_image(Predictor(load_network(package), package.card, InferSettings(device="cpu", **settings)), image)
    return instance_map(maps[0], maps[1], maps[2], SobelConstants.from_json(package.card.sobel))


@pytest.fixture(scope="module")
def exact(image: np.ndarray) -> np.ndarray:
    """Nuclei of fp32 with torch."""
    return instances(image, precision="fp32", runtime="torch")


@pytest.mark.parametrize(("short", "at_least"), [("fp16", 0.999), ("bf16", 0.95)])
def test_short_precisions_find_the_nuclei_of_fp32(
    image: np.ndarray, exact: np.ndarray, short: Precision, at_least: float
) -> None:
    """`auto` chooses fp16 on a GPU; bf16 is less precise and must be requested."""
    capabilities = torch.cpu.get_capabilities()
    if short == "bf16" and not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        pytest.skip("this processor computes no bf16 by itself")
    found = instances(image, precision=short, threads=1)
    assert exact.max() > 500
    quality = panoptic_quality(exact, found)
    print(f"\nPQ of {short} against fp32: {quality.pq:.4f}, {exact.max()} and {found.max()} nuclei")
    assert quality.pq >= at_least


def test_overflows_of_fp16_are_computed_in_fp32() -> None:
    package = find_package("starter")
    tiles = np.random.default_rng(0).integers(0, 256, (2, 320, 320, 3), np.uint8)

    class Large(torch.nn.Module):
        """Of its numbers some are too large for fp16."""

        def __init__(self) -> None:
            super().__init__()
            self.into = torch.nn.Conv2d(3, 9, 1)
            torch.nn.init.constant_(self.into.weight, 1e5)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.into(image) * 1e-5

    network = Large()
    found = []
    for precision in ("fp16", "fp32"):
        settings = InferSettings(precision=precision, runtime="torch", device="cpu", threads=1, batch=2)  # type: ignore[arg-type]
        found.append(Predictor(network, package.card, settings).logits(tiles))
    assert np.isfinite(found[0]).all() and (found[0] == found[1]).all()


@pytest.mark.parametrize("other", ["openvino", pytest.param("compile", marks=pytest.mark.slow)])
def test_other_runtimes_find_the_nuclei_of_torch(image: np.ndarray, exact: np.ndarray, other: Runtime) -> None:
    assert panoptic_quality(exact, instances(image, runtime=other)).pq >= 0.999


@pytest.mark.parametrize(
    ("precision", "runtime"),
    [
        ("fp32", "torch"),
        pytest.param("bf16", "torch", marks=pytest.mark.slow),  # which some processors emulate
        ("auto", "openvino"),
        pytest.param("auto", "compile", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_the_number_of_threads_changes_no_bit(image: np.ndarray, precision: Precision, runtime: Runtime) -> None:
    """So they are not part of the run key, and a run may resume with more or fewer cores."""
    package = find_package("starter")
    crop = np.ascontiguousarray(image[:512, :512])
    maps = []
    for threads in (1, 2, 3):
        settings = InferSettings(precision=precision, runtime=runtime, device="cpu", threads=threads)
        maps.append(predict_image(Predictor(load_network(package), package.card, settings), crop))
    assert (maps[0] == maps[1]).all() and (maps[0] == maps[2]).all()
