"""Other systems than HoVerNet's: their targets and losses, and a package of each that is trained and evaluated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from training_folder import write_folder

from hover_batch.errors import InputError, PackageError
from hover_batch.metrics import panoptic_quality
from hover_batch.model.architectures import micronet
from hover_batch.model.heads import DISTANCE_PX, Heads
from hover_batch.model.package import find_package, load_network
from hover_batch.nuclei.systems import splitter
from hover_batch.nuclei.watershed import instance_map
from kd.evaluation.evaluate_package import evaluate_package
from kd.package import make_package, package_path
from kd.training.config import TrainConfig
from kd.training.losses import UNKNOWN, Targets
from kd.training.systems import (
    SYSTEMS,
    DistLoss,
    MicroNetLoss,
    boxes_and_masks,
    distance_targets,
    gap_targets,
    number_targets,
)
from kd.training.train import train

pytestmark = pytest.mark.usefixtures("by_torch")

HEADS = Heads(3)
SETTINGS = TrainConfig(data=Path("data"), out=Path("out"), model="dist", tp_weight=1.0)


@pytest.fixture(scope="module")
def tile(data: Path) -> np.ndarray:
    """Instances of a real tile with nuclei that touch and nuclei that are cut by its edge."""
    labels = cv2.imread(str(data / "nuclei" / "labels" / "consep_train_03.png"), cv2.IMREAD_UNCHANGED)
    return np.ascontiguousarray(labels[:256, 400:656].astype(np.int32))


def test_distances_are_those_of_each_nucleus_alone(tile: np.ndarray) -> None:
    distance, unused = DISTANCE_PX * distance_targets(tile)
    for number in np.unique(tile)[1:]:
        alone = distance_transform_edt(np.pad(tile == number, 1))[1:-1, 1:-1]
        np.testing.assert_allclose(distance[tile == number], alone[tile == number], rtol=1e-5)
    assert not unused.any() and not distance[tile == 0].any()


@pytest.mark.parametrize("system", ["dist", "micronet"])
def test_perfect_maps_give_the_annotated_nuclei_back(tile: np.ndarray, system: str) -> None:
    planes = SYSTEMS[system].planes(tile)
    gap = planes[1] > 0 if system == "micronet" else np.zeros(tile.shape, bool)
    np_map = np.where((tile > 0) & ~gap, 255, 0).astype(np.uint8)
    h = np.round(127 * np.clip(planes[0], -1, 1)).astype(np.int8).view(np.uint8)
    found = instance_map(np_map, h, np.zeros_like(h), splitter(system, {}))
    assert panoptic_quality(tile, found).pq > 0.9


def test_gaps_separate_nuclei_and_weigh_more() -> None:
    instances = np.zeros((40, 60), np.int32)
    instances[10:30, 5:20], instances[10:30, 20:35], instances[10:30, 39:50] = 1, 2, 3
    weight, gap = gap_targets(instances)
    assert gap.sum() == 40 and gap[10:30, 19:21].all()
    # Half-way between two nuclei, d₁ + d₂ is 3 in the gap (1 + 2) and 5 where they are 4 pixels apart (2 + 3).
    assert weight[20, 19] == pytest.approx(1 + 10 * np.exp(-9 / 50))
    assert weight[20, 37] == pytest.approx(1 + 10 * np.exp(-25 / 50))
    assert weight[20, 10] == 1 and weight[38, 58] == pytest.approx(1, abs=0.01)


def targets(seed: int = 0) -> Targets:
    rng = np.random.default_rng(seed)
    tp = torch.from_numpy(rng.integers(0, 3, (2, 8, 8)))
    return Targets(np=(tp > 0).long(), hv=torch.from_numpy(rng.random((2, 2, 8, 8))).float(), tp=tp)


def test_the_loss_of_dist_is_in_square_pixels_and_ignores_unknown_ones() -> None:
    truth = targets()
    output = torch.zeros(2, HEADS.channels, 8, 8)
    output[:, 2:4] = truth.hv + 2 / DISTANCE_PX
    terms = DistLoss(HEADS, SETTINGS)(output, truth)
    assert terms["hv_mse"].item() == pytest.approx(4, rel=1e-5)
    assert terms["tp_ce"].item() == pytest.approx(np.log(3), rel=1e-5)
    assert terms["loss"].item() == pytest.approx(4 + np.log(3), rel=1e-5)
    untyped = Targets(truth.np.clone(), truth.hv, torch.full_like(truth.tp, UNKNOWN))
    untyped.np[0] = UNKNOWN
    output[0, 2] = 99
    assert DistLoss(HEADS, SETTINGS)(output, untyped)["loss"].item() == pytest.approx(4, rel=1e-5)


def test_the_loss_of_micronet_accepts_any_class_where_none_is_annotated() -> None:
    tp = torch.tensor([[[0, 1, 2, 1]]])
    hv = torch.ones(1, 2, 1, 4)
    hv[:, 1] = torch.tensor([0.0, 0, 0, 1])  # the last pixel is in a gap, hence background
    hv[0, 0, 0, 1] = 3
    probabilities = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2]])
    output = torch.zeros(1, HEADS.channels + 2 * 3, 1, 4)
    output[0, HEADS.tp, 0] = probabilities.log().T
    loss = MicroNetLoss(HEADS, SETTINGS)
    typed = loss(output, Targets((tp > 0).long(), hv, tp))
    expected = -(np.log(0.8) + 3 * np.log(0.7) + np.log(0.6) + np.log(0.5)) / 6
    assert typed["tp_ce"].item() == pytest.approx(expected, rel=1e-5)
    assert typed["tp_aux"].item() == pytest.approx(0.1 * 2 * np.log(3), rel=1e-5)
    untyped = loss(output[:, : HEADS.channels], Targets((tp > 0).long(), hv, torch.full_like(tp, UNKNOWN)))
    expected = -(np.log(0.8) + 3 * np.log(0.9) + np.log(0.8) + np.log(0.5)) / 6
    assert untyped["tp_ce"].item() == pytest.approx(expected, rel=1e-5) and "tp_aux" not in untyped


def test_mask_rcnn_learns_each_nucleus_by_its_box_class_and_mask() -> None:
    instances, tp = np.zeros((40, 60), np.int32), torch.zeros((1, 40, 60), dtype=torch.int64)
    instances[4:24, 2:12], instances[0:3, 0:3], instances[10:30, 50:60] = 7, 8, 9
    tp[0, 4:24, 2:12], tp[0, 4:10, 2:12] = 2, 1  # more of it is of class 2
    tp[0, 10:30, 50:60] = UNKNOWN
    truth = Targets(torch.from_numpy(instances > 0).long()[None], torch.from_numpy(number_targets(instances))[None], tp)
    (image,) = boxes_and_masks(truth, 3)
    assert image["boxes"].tolist() == [[2, 4, 12, 24], [50, 10, 60, 30]]  # the smallest one has too few pixels
    assert image["labels"].tolist() == [2, -1]
    np.testing.assert_array_equal(image["masks"].numpy(), np.stack([instances == 7, instances == 9]))
    assert boxes_and_masks(truth, 2)[0]["labels"].tolist() == [1, 1]  # there is only one class
    nothing = replace(truth, hv=torch.zeros_like(truth.hv))
    assert boxes_and_masks(nothing, 3)[0]["masks"].shape == (0, 40, 60)


@pytest.mark.parametrize(
    ("model", "settings", "runtime"),
    [
        ("dist", {"size": 64}, "torch"),
        # OpenVINO takes long to compile it.
        pytest.param("dist", {"size": 64}, "auto", marks=pytest.mark.slow),
        ("mask-rcnn", {"size": 64, "width": 8}, "torch"),
        # tiatoolbox.models takes long to import.
        pytest.param("micronet", {"width": 8}, "auto", marks=pytest.mark.slow),
    ],
)
def test_a_system_is_trained_packaged_and_evaluated(
    model: str, settings: dict[str, int], runtime: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if runtime == "auto":
        request.getfixturevalue("by_default")
    folder = write_folder(tmp_path)
    config = TrainConfig(
        data=folder, out=tmp_path / "out", model=model, batch=2, steps=2, epoch_steps=2, threads=1, **settings
    )
    train(config)
    lines = make_package([config.out / "checkpoint.pt"], folder, package_path(config), threads=1)
    assert f"calibration: none: {model} has no Sobel constants" in lines
    package = find_package(str(config.out / f"{model}.safetensors"))
    card = package.card
    assert (card.architecture, card.system, dict(card.sobel), card.seam_exact) == (
        model,
        model,
        {},
        model != "mask-rcnn",
    )
    evaluation = evaluate_package(str(package.path), folder, folds=["val"], threads=1, label=model)
    assert {s.source for s in evaluation.scores} == {"consep", "tnbc"}
    with pytest.raises(InputError, match="--sobel-norm window"):
        card.check_sobel_norm("window")


def test_only_hovernet_is_distilled() -> None:
    with pytest.raises(InputError, match="--teacher: dist cannot be distilled"):
        TrainConfig(data=Path("data"), out=Path("out"), model="dist", teacher=Path("taught"))
    with pytest.raises(InputError, match="--size 256: must be 252 for micronet"):
        TrainConfig(data=Path("data"), out=Path("out"), model="micronet", size=256)


def test_a_card_of_another_system_than_its_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package = find_package("starter")
    object.__setattr__(package.card, "system", "dist")
    with pytest.raises(PackageError, match="the card says system dist, but that of unet is hover"):
        load_network(package)


@pytest.mark.slow
def test_micronet_of_the_published_width_has_the_layers_of_tiatoolbox() -> None:
    from tiatoolbox.models.architecture import micronet as library

    with torch.device("meta"):
        ours, theirs = micronet.MicroNet(5), library.MicroNet(num_output_channels=5)
    shapes = {name.removeprefix("network."): t.shape for name, t in ours.state_dict().items()}
    assert shapes == {name: t.shape for name, t in theirs.state_dict().items()}
