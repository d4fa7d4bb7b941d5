"""Exported networks: a TOML names the channels, and the package gives what the network gives."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx_file import write_onnx
from PIL import Image
from typer.testing import CliRunner, Result

from hover_batch.cli import app
from hover_batch.config import InferSettings
from hover_batch.errors import PackageError
from hover_batch.model.cost import cost_of, seconds_per_patch
from hover_batch.model.package import find_package, load_network
from hover_batch.model.predict import load_predictor

TOML = """
mpp = 0.25
tile_in = 64
tile_out = 32
input = { mean = [0.5, 0.4, 0.3], std = [0.2, 0.2, 0.1], order = "BGR" }
np = { channels = [5], values = "probabilities" }
hv = { channels = [1, 0] }
tp = { channels = [4, 2, 3] }
[classes]
tumour = [220, 30, 40]
lymphocyte = [0, 160, 60]
"""


@pytest.fixture
def weights() -> NDArray[np.float32]:
    """Weights (6, 3, 1, 1); channel 5 gives a probability for these images."""
    drawn = np.random.default_rng(1).normal(size=(6, 3, 1, 1)).astype(np.float32)
    drawn[5] = 0.05
    return drawn


def imported(folder: Path, weights: NDArray[np.float32], toml: str = TOML) -> Result:
    write_onnx(folder / "net.onnx", weights, 64)
    (folder / "net.toml").write_text(toml)
    out = folder / "net.safetensors"
    words = ["models", "import", folder / "net.onnx", "--channels", folder / "net.toml", "-o", out]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_order_activation_and_scaling_are_adapted(tmp_path: Path, weights: NDArray[np.float32]) -> None:
    done = imported(tmp_path, weights)
    assert done.exit_code == 0, done.output
    package = find_package(str(tmp_path / "net.safetensors"))
    network = load_network(package)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    bgr = (image.flip(1) - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.2, 0.1])[:, None, None]
    raw = torch.nn.functional.conv2d(bgr, torch.from_numpy(weights))
    p = raw[:, 5:].clamp(1e-6, 1)
    expected = torch.cat([(1 - raw[:, 5:]).clamp(1e-6, 1).log(), p.log(), raw[:, [1, 0, 4, 2, 3]]], 1)
    torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)
    assert [c.name for c in package.card.taxonomy.classes] == ["background", "tumour", "lymphocyte"]
    assert cost_of(network, package.card).macs_per_patch == 6 * 3 * 64 * 64
    assert seconds_per_patch(network, package.card, batch=2) > 0
    # Both runtimes give the same maps.
    tiles = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    maps = [
        load_predictor(package, InferSettings(runtime=runtime, device="cpu", batch=1, threads=1)).logits(tiles)
        for runtime in ("torch", "openvino")
    ]
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-4)
    assert maps[0].shape == (1, 7, 32, 32)


def test_segment_runs_it(tmp_path: Path, weights: NDArray[np.float32]) -> None:
    assert imported(tmp_path, weights).exit_code == 0
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)).save(tmp_path / "tile.png")
    (tmp_path / "cohort.csv").write_text("path,mpp\ntile.png,0.25\n")
    words = ["segment", tmp_path / "cohort.csv", "-o", tmp_path / "out", "--model", tmp_path / "net.safetensors"]
    done = CliRunner().invoke(app, [str(w) for w in words] + ["--tissue", "all", "--batch", "1", "--unit", "256"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "slides" / "tile" / "nuclei.parquet").is_file()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mpp = 0.25", "", "mpp is missing"),
        ("mpp = 0.25", "mpp = 0.25\nscale = 2", "unknown entry 'scale'"),
        ("channels = [5]", "channels = [6]", "has 6 channels"),
        ("channels = [4, 2, 3]", "channels = [4, 2]", "not 3 different channels"),
        ('values = "probabilities"', 'values = "sigmoid"', "np.values is 'sigmoid'"),
        ("tile_out = 32", "tile_out = 33", "tile_out 33"),
        ('order = "BGR"', 'order = "RBG"', "order"),
        ("std = [0.2, 0.2, 0.1]", "std = [255, 255, 255]", "divide them by 255"),
        ("mean = [0.5, 0.4, 0.3]", "mean = [103.9, 116.8, 123.7]", "divide them by 255"),
        ("[1, 0] }", '[1, 0], output = "hv" }', "has no output 'hv'"),
        ("tumour", "nuclei", "nuclei"),
        ("tp = { channels = [4, 2, 3] }", "", "several classes"),
    ],
)
def test_a_toml_that_contradicts_the_network(
    tmp_path: Path, weights: NDArray[np.float32], old: str, new: str, message: str
) -> None:
    assert old in TOML
    done = imported(tmp_path, weights, TOML.replace(old, new))
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert not (tmp_path / "net.safetensors").exists()


@pytest.mark.parametrize("place", ["beside.bin", "../secret.bin", "absolute"])
def test_weights_outside_the_file_are_not_read(tmp_path: Path, weights: NDArray[np.float32], place: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    for folder in (inner, tmp_path):
        for name in ("beside.bin", "secret.bin"):
            (folder / name).write_bytes(weights.tobytes())
    write_onnx(inner / "net.onnx", weights, 64, external=place if place != "absolute" else str(tmp_path / "secret.bin"))
    (inner / "net.toml").write_text(TOML)
    words = ["models", "import", inner / "net.onnx", "--channels", inner / "net.toml", "-o", inner / "x.safetensors"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 2 and "weights inside the file" in done.stderr, done.output


def test_other_files_are_refused(tmp_path: Path, weights: NDArray[np.float32]) -> None:
    (tmp_path / "net.pt2").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("no network")
    (tmp_path / "net.toml").write_text(TOML)
    for words, message in (
        (["net.pt2"], "unpickles parts"),
        (["net.onnx"], "--channels FILE.toml"),
        (["net.onnx", "--channels", str(tmp_path / "net.toml")], "no such file"),
        (["text.onnx", "--channels", str(tmp_path / "net.toml")], "cannot read it"),
        (["net.pth", "--channels", str(tmp_path / "net.toml")], "for nothing else"),
    ):
        done = CliRunner().invoke(
            app, ["models", "import", str(tmp_path / words[0]), *words[1:], "-o", str(tmp_path / "x.safetensors")]
        )
        assert done.exit_code == 2 and message in done.stderr, done.output


def test_a_package_that_contradicts_its_network(tmp_path: Path, weights: NDArray[np.float32]) -> None:
    from hover_batch.model.package import save_with_card

    assert imported(tmp_path, weights).exit_code == 0
    package = find_package(str(tmp_path / "net.safetensors"))
    shutil.copy(package.path, tmp_path / "y.safetensors")
    save_with_card(package, replace(package.card, tile_in=96), tmp_path / "y.safetensors")
    with pytest.raises(PackageError, match="its network maps"):
        load_network(find_package(str(tmp_path / "y.safetensors")))
