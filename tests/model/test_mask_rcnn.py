"""Mask R-CNN as an architecture: how nuclei are merged, its package, its cost, and a run with units of any size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from random_weights import random_mask_rcnn
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.commands.models import describe
from hover_batch.config import InferSettings
from hover_batch.errors import InputError, PackageError
from hover_batch.model.architectures.mask_rcnn import MaskRcnn, merged
from hover_batch.model.card import Card
from hover_batch.model.cost import cost_of
from hover_batch.model.heads import MapLayout
from hover_batch.model.package import find_package, load_network, save_package
from hover_batch.model.predict import quantise
from hover_batch.nuclei.image import nuclei_of
from hover_batch.nuclei.systems import splitter


@pytest.fixture(scope="module")
def made() -> tuple[MaskRcnn, Card]:
    return random_mask_rcnn()


@pytest.fixture
def network(made: tuple[MaskRcnn, Card]) -> MaskRcnn:
    return made[0]


@pytest.fixture
def card(made: tuple[MaskRcnn, Card]) -> Card:
    return made[1]


def test_nuclei_are_merged_by_score_and_stored_with_their_centres() -> None:
    layout = MapLayout(3)
    log_p = torch.tensor([[0.1, 0.2, 0.7], [0.4, 0.5, 0.1]]).log()
    boxes = torch.tensor([[10.0, 10, 30, 40], [20, 20, 50, 50]])  # the second one begins below the first
    masks = torch.full((2, 28, 28), 0.9)
    output = merged(log_p, boxes, masks, (64, 64))
    maps = quantise(output[None], torch.zeros(1, 3, 64, 64, dtype=torch.uint8), layout)[0].numpy()
    instances, nuclei = nuclei_of(maps, splitter("mask-rcnn", {}), layout)
    assert nuclei.type_id.tolist() == [2, 1]
    np.testing.assert_allclose(nuclei.seg_score, [0.9, 0.6], atol=1 / 256)
    np.testing.assert_allclose(nuclei.class_probs, [[2 / 9, 7 / 9], [5 / 6, 1 / 6]], atol=0.01)
    first, second = instances[15, 15], instances[45, 45]
    assert instances[25, 25] == first and instances[25, 35] == second and first != second
    np.testing.assert_array_equal(
        maps[layout.H].view(np.int8)[instances == second], 35 - np.nonzero(instances == second)[1]
    )
    assert not maps[1:, instances == 0].any()
    nothing = merged(log_p[:0], boxes[:0], masks[:0], (64, 64))
    assert not (nothing.softmax(0)[1] > 0.01).any() and nothing.shape == output.shape


def test_a_package_keeps_the_network_and_says_that_seams_are_merged(
    network: MaskRcnn, card: Card, tmp_path: Path
) -> None:
    save_package(tmp_path / "random.safetensors", network, card, half=False)
    package = find_package(str(tmp_path / "random.safetensors"))
    assert package.card.seam_exact is False and "  seams: merged by overlap" in describe(package.card)
    image = torch.rand(2, 3, 64, 96)
    loaded = load_network(package)
    output = loaded(image)
    assert output.shape == (2, card.layout.planes - 1, 64, 96) and output.dtype == torch.float32
    torch.testing.assert_close(output, network(image), rtol=0, atol=0)
    with pytest.raises(PackageError, match="seam_exact is true: must be false for the system mask-rcnn"):
        Card.from_json(replace(card, seam_exact=True).to_json())


def test_only_torch_runs_it(card: Card) -> None:
    assert card.supported(InferSettings()).runtime == "torch"
    with pytest.raises(InputError, match="--runtime openvino: random runs with torch only"):
        card.supported(InferSettings(runtime="openvino"))
    other = InferSettings(runtime="openvino")
    assert find_package("starter").card.supported(other) == other


def test_its_cost_is_that_of_a_full_tile(network: MaskRcnn, card: Card) -> None:
    cost = cost_of(network, card)
    assert cost.parameters == sum(p.numel() for p in network.parameters())
    mask = 14 * 14 * (4 * 9 * 32 * 32 + 4 * 32 * 32 + 4 * 32 * len(card.taxonomy.classes))
    assert 300 * mask < cost.macs_per_patch < 2 * 300 * mask


def test_units_of_any_size_give_the_same_nuclei(
    network: MaskRcnn, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_package(Path("random.safetensors"), network, card)
    Image.fromarray(np.random.default_rng(0).integers(60, 220, (100, 300, 3)).astype(np.uint8)).save("tile.png")
    Path("cohort.csv").write_text("path,mpp\ntile.png,0.25\n")
    tables = []
    for unit in ("256", "512"):
        words = f"segment cohort.csv -o {unit} --model random.safetensors --unit {unit} --tissue all --batch 2"
        done = CliRunner().invoke(app, words.split())
        assert done.exit_code == 0, done.output
        table = pq.read_table(f"{unit}/slides/tile/nuclei.parquet").drop_columns("nucleus_id")
        tables.append(table.sort_by([("centroid_y", "ascending"), ("centroid_x", "ascending")]))
    assert tables[0].num_rows > 20
    assert tables[0].equals(tables[1])
