"""bf16 finds the nuclei that fp32 finds, and the number of threads changes nothing; real tiles, the starter."""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16") and not torch.cpu.get_capabilities().get("amx_bf16"),
    reason="this processor computes no bf16 by itself",
)
def test_bf16_finds_the_nuclei_of_fp32(data: Path) -> None:
    package = find_package("starter")
    constants = SobelConstants.from_json(package.card.sobel)
    image = cv2.imread(str(data / "nuclei" / "images" / "consep_train_09.png"))[:512, :512, ::-1]

    def instances(precision: Precision) -> np.ndarray:
        settings = InferSettings(precision=precision, device="cpu", threads=1)
        maps = predict_image(Predictor(load_network(package), package.card, settings), np.ascontiguousarray(image))
        return instance_map(maps[0], maps[1], maps[2], constants)

    exact, short = instances("fp32"), instances("bf16")
    assert exact.max() > 50
    quality = panoptic_quality(exact, short)
    print(f"\nPQ of bf16 against fp32: {quality.pq:.4f}, {exact.max()} and {short.max()} nuclei")
    assert quality.pq > 0.95


def test_openvino_finds_the_nuclei_of_torch(data: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    package = find_package("starter")
    constants = SobelConstants.from_json(package.card.sobel)
    image = np.ascontiguousarray(cv2.imread(str(data / "nuclei" / "images" / "consep_train_09.png"))[..., ::-1])
    found = []
    runtimes: tuple[Runtime, ...] = ("torch", "openvino")
    for runtime in runtimes:
        settings = InferSettings(runtime=runtime, precision="fp32" if runtime == "torch" else "auto", device="cpu")
        maps = predict_image(Predictor(load_network(package), package.card, settings), image)
        found.append((maps, instance_map(maps[0], maps[1], maps[2], constants)))
    (maps, torchs), (others, openvinos) = found
    assert torchs.max() > 100 and panoptic_quality(torchs, openvinos).pq >= 0.999


@pytest.mark.parametrize(("precision", "runtime"), [("fp32", "torch"), ("bf16", "torch"), ("auto", "openvino")])
def test_threads_change_no_bit(data: Path, precision: Precision, runtime: Runtime) -> None:
    """So they are no part of the run key, and a run may go on where there are more cores or fewer."""
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    package = find_package("starter")
    image = cv2.imread(str(data / "nuclei" / "images" / "consep_train_09.png"))[:512, :512, ::-1]
    maps = []
    for threads in (1, 2, 3):
        settings = InferSettings(precision=precision, runtime=runtime, device="cpu", threads=threads)
        maps.append(
            predict_image(Predictor(load_network(package), package.card, settings), np.ascontiguousarray(image))
        )
    assert (maps[0] == maps[1]).all() and (maps[0] == maps[2]).all()
