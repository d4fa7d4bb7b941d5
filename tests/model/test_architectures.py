"""NuLite and CellViT give the outputs of their released code, and wrong checkpoints get one message.

The outputs were recorded from the released code (CosmoIknosLab/NuLite at 601e370, TIO-IKIM/CellViT at 05097e1) with the
weights of `named_weights` for its own state dict, on the image below, normalised as it normalises.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import named_weights
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.costs import cost
from hover_batch.cli import app
from hover_batch.errors import PackageError
from hover_batch.model.architectures import architecture, architectures
from hover_batch.model.architectures.cellvit import CellViT, CellViTArch, arch_of, published
from hover_batch.model.architectures.nulite import ENCODERS, NuLite
from hover_batch.model.checkpoint import card_of, read_checkpoint
from hover_batch.model.openvino import OpenVinoNetwork, convert
from hover_batch.model.package import find_package, load_network
from hover_batch.model.published import COSTS, KINDS
from hover_batch.taxonomy import PANNUKE

IMAGE = torch.from_numpy(np.random.default_rng(7).random((1, 3, 64, 64), np.float32))
SAM = CellViTArch(32, 4, (14, 14, 0) * 4, 64, 6, sam=True)
"""As SAM-B, but narrow."""
RECORDED = {
    "nulite fastvit_t8": (
        [0.88736, -1.09516, -1.36239, 1.13864, 2.09955, 0.71732, -2.7933, 1.93301, -4.08679, 0.80083],
        [-0.26722, -1.92326, -1.67971, 1.28968, 1.06402, 0.72938, -1.56596, 0.54494, -3.11092, 0.36628],
    ),
    "cellvit ViT-256": (
        [-0.18543, -0.44988, 0.18302, -1.16055, -1.32925, -2.01143, 0.75339, 1.8835, 0.12326, -1.81487],
        [-0.48974, -0.08205, -0.20022, -2.72279, -1.17123, -1.35589, 0.65591, 0.67437, -0.26961, -2.22048],
    ),
    "cellvit SAM-B": (
        [0.48306, 0.14542, 0.34591, -1.59143, -1.26527, -2.11142, 0.89289, 1.52563, -0.14593, -1.90929],
        [-0.4982, -0.09583, -0.2154, -2.77113, -1.16357, -1.37978, 0.65964, 0.65832, -0.25243, -2.23717],
    ),
}
"""Architecture and encoder → output at pixel (32, 29), and its mean over all pixels, by channel."""


def weights(name: str) -> dict[str, Tensor]:
    """Return weights of a small network by the name in RECORDED."""
    networks = {
        "nulite fastvit_t8": lambda: NuLite("fastvit_t8", 6, 19),
        "cellvit ViT-256": lambda: CellViT(CellViTArch(24, 6, (0,) * 12, 14, 6)),
        "cellvit SAM-B": lambda: CellViT(SAM),
    }
    return named_weights(networks[name]().state_dict())


@pytest.mark.parametrize("name", RECORDED)
def test_outputs_are_those_of_the_released_code(name: str) -> None:
    tensors = weights(name)
    family, encoder = name.split()
    found = architecture(family)
    recognised = found.recognise(tensors, {})
    assert recognised is not None and (recognised.encoder, recognised.types) == (encoder, 6)
    assert [a.name for a in architectures() if a.recognise(tensors, {})] == [family]
    card = replace(card_of("nulite-t" if family == "nulite" else "cellvit-256", found), encoder=encoder)
    network = found.build(card, tensors)
    network.load_state_dict(tensors)
    with torch.inference_mode():
        output = network.eval()(IMAGE)[0]
    pixel, mean = RECORDED[name]
    torch.testing.assert_close(output[:, 32, 29], torch.tensor(pixel), rtol=0, atol=1e-4)
    torch.testing.assert_close(output.mean((1, 2)), torch.tensor(mean), rtol=0, atol=1e-4)


@pytest.mark.parametrize("encoder", ["ViT-256", pytest.param("SAM-B", marks=pytest.mark.slow)])
def test_openvino_gives_the_outputs_of_a_cellvit(encoder: str) -> None:
    """It is the default runtime on a CPU. The run of a NuLite below uses it, too."""
    tensors = weights(f"cellvit {encoder}")
    network = CellViT(arch_of(tensors))
    network.load_state_dict(tensors)
    converted = OpenVinoNetwork(convert(network, IMAGE.shape[-1]), batch=1, threads=1)
    with torch.inference_mode():
        torch.testing.assert_close(converted(IMAGE), network.eval()(IMAGE), rtol=0, atol=1e-4)


def test_shapes_decide_the_published_sizes() -> None:
    """On the meta device, so that nothing of 700 million weights is computed."""
    millions = {}
    for encoder in ("ViT-256", "SAM-B", "SAM-L", "SAM-H"):
        with torch.device("meta"):
            network = CellViT(published(encoder, 6))
        assert arch_of(network.state_dict()) == published(encoder, 6)
        millions[encoder] = sum(p.numel() for p in network.parameters()) // 10**6
    assert millions["SAM-H"] == 699  # arXiv 2408.01797 calls NuLite-T, of 12.05 million, 58 times smaller
    for encoder in ("fastvit_s12", "fastvit_ma36"):
        with torch.device("meta"):
            tensors = NuLite(encoder, 6, 19).state_dict()
        found = architecture("nulite").recognise(tensors, {})
        assert found is not None and found.encoder == encoder and encoder in ENCODERS.values()


def test_the_listed_costs_are_those_of_the_networks() -> None:
    assert COSTS.keys() == KINDS.keys()
    for name in ("nulite-t", "cellvit-256"):
        assert cost(name) == COSTS[name]


def change(tensors: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return a checkpoint of NuLite with one fault."""
    record: dict[str, Any] = {"arch": "NuLite-T", "config": {"transformations.normalize.mean": [0.5] * 3}}
    name = "decoder.decoder4_upsampler.0.block.0.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors["decoder.more.weight"] = torch.zeros(3)
    elif kind == "shape":
        tensors[name] = torch.zeros(3, 3)
    elif kind == "normalisation":
        record["config"]["transformations.normalize.std"] = [0.2, 0.2, 0.2]
    elif kind == "merged":
        tensors["encoder.fast_vit.stem_0.reparam_conv.weight"] = torch.zeros(3)
    elif kind == "encoder":
        tensors["encoder.fast_vit.stages_2.blocks.9.x"] = torch.zeros(3)
    return {"model_state_dict": tensors, **record}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "Missing key.*decoder4_upsampler.0.block.0.weight"),
        ("extra", "Unexpected key.*decoder.more.weight"),
        ("shape", "size mismatch for decoder.decoder4_upsampler.0.block.0.weight"),
        ("normalisation", "normalise the input with std"),
        ("merged", "merged branches"),
        ("encoder", "missing or has the wrong shape"),
    ],
)
def test_a_wrong_checkpoint_gets_one_message(tmp_path: Path, kind: str, message: str) -> None:
    torch.save(change(dict(weights("nulite fastvit_t8")), kind), tmp_path / "x.pth")
    with pytest.raises(PackageError, match=message) as raised:
        read_checkpoint(str(tmp_path / "x.pth"))
    assert len(str(raised.value).splitlines()) == 1


def test_segment_runs_an_imported_nulite(tmp_path: Path) -> None:
    torch.save(change(weights("nulite fastvit_t8"), "none"), tmp_path / "x.pth")

    def run(*words: str | Path) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.output

    assert "nulite fastvit_t8" in run("models", "import", tmp_path / "x.pth", "-o", tmp_path / "x.safetensors")
    package = find_package(str(tmp_path / "x.safetensors"))
    card = package.card
    assert (card.taxonomy, card.mpp, card.tile_in, card.seam_exact) == (PANNUKE, 0.25, 320, True)
    assert "seam_exact" not in card.to_json() and load_network(package)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)).save(tmp_path / "tile.png")
    (tmp_path / "cohort.csv").write_text("path,mpp\ntile.png,0.25\n")
    flags = ["--model", package.path, "--tissue", "all", "--batch", "1", "--unit", "256"]
    run("segment", tmp_path / "cohort.csv", "-o", tmp_path / "out", *flags)
    assert (tmp_path / "out" / "slides" / "tile" / "nuclei.parquet").is_file()
