"""The training loop on a tiny made-up folder: it learns, it resumes to the same weights, it refuses other settings."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import kd.train
from hover_batch.errors import InputError
from hover_batch.model.package import find_package, load_network
from kd.config import TrainConfig
from kd.train import CHECKPOINT, LOG, learning_rate, train


def write_folder(folder: Path) -> Path:
    """Dark discs on pink, typed by their colour, in two images of each split and of two sources."""
    rng = np.random.default_rng(0)
    rows = []
    for i, (source, split) in enumerate([(s, t) for s in ("consep", "tnbc") for t in ("train", "train", "val")]):
        image = np.full((160, 160, 3), (200, 180, 230), np.uint8)
        labels, types = np.zeros((160, 160), np.uint16), np.zeros((160, 160), np.uint8)
        for n in range(1, 13):
            centre = tuple(int(c) for c in rng.integers(8, 152, 2))
            code = int(rng.integers(1, 8))
            for array, value in ((image, (90 + 10 * code, 30, 80)), (labels, n), (types, code)):
                cv2.circle(array, centre, 9, value, -1)
        name = f"{source}_{i}"
        for kind, array in (("image", image), ("labels", labels), ("types", types)):
            cv2.imwrite(str(folder / f"{name}_{kind}.png"), array)
        typed = f"{name}_types.png" if source == "consep" else ""
        rows.append((name, f"{name}_image.png", f"{name}_labels.png", typed, source, "", split))
    with (folder / "dataset.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("sample_id", "image", "labels", "types", "source", "group", "split"), *rows])
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    return TrainConfig(
        data=write_folder(tmp_path_factory.mktemp("folder")),
        out=tmp_path_factory.mktemp("undisturbed"),
        size=64,
        batch=2,
        steps=12,
        epoch_steps=4,
        warmup=2,
        lr=2e-3,
        threads=1,
        sources={"consep": 0.6, "tnbc": 0.4},
    )


@pytest.fixture(scope="module")
def undisturbed(config):
    return train(config).state_dict()


def read_log(out: Path) -> list[dict[str, float]]:
    with (out / LOG).open(newline="") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def test_the_loss_falls(undisturbed, config):
    rows = read_log(config.out)
    assert [r["step"] for r in rows] == [4, 8, 12]
    for term in ("np_ce", "np_dice", "hv_mse"):
        assert rows[-1][term] < rows[0][term]


def test_interrupted_and_resumed_gives_the_same_weights(undisturbed, config, tmp_path, monkeypatch):
    config = replace(config, out=tmp_path)

    def stop_at_step_6(config, step):
        if step == 6:
            raise KeyboardInterrupt
        return learning_rate(config, step)

    monkeypatch.setattr(kd.train, "learning_rate", stop_at_step_6)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    resumed = train(config).state_dict()
    assert [r["step"] for r in read_log(tmp_path)] == [4, 8, 12]
    different = [name for name, tensor in resumed.items() if not torch.equal(tensor, undisturbed[name])]
    assert different == []


def test_training_starts_after_opencv_has_used_its_threads(undisturbed, config, tmp_path):
    """As calibration and validation do, in the same process."""
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((4000, 4000), np.float32), (0, 0), 5)
    again = train(replace(config, out=tmp_path)).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in undisturbed.items())


def test_a_finished_run_is_not_trained_again(undisturbed, config):
    before = read_log(config.out)
    again = train(config).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in undisturbed.items())
    assert read_log(config.out) == before


@pytest.mark.parametrize("changed", [{"lr": 1e-3}, {"size": 96}, {"sources": {"consep": 1.0}}, {"steps": 16}])
def test_other_settings_are_refused(undisturbed, config, changed):
    with pytest.raises(InputError, match="other settings"):
        train(replace(config, **changed))


def test_a_source_without_training_images_is_refused(config, tmp_path):
    with pytest.raises(InputError, match="--source monuseg"):
        train(replace(config, out=tmp_path, sources={"consep": 0.5, "monuseg": 0.5}))


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("size", 100, "--size"),
        ("steps", 0, "--steps"),
        ("epoch_steps", 0, "--epoch-steps"),
        ("sources", {}, "--source"),
    ],
)
def test_faulty_settings_name_the_flag(config, field, value, flag):
    with pytest.raises(InputError, match=flag):
        replace(config, **{field: value})


def test_the_learning_rate_rises_then_falls_to_zero(config):
    config = replace(config, steps=102, warmup=2, lr=1e-3)
    assert [learning_rate(config, i) for i in range(3)] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert learning_rate(config, 52) == pytest.approx(5e-4)
    assert learning_rate(config, 101) < 1e-6 * (1 + math.pi**2 / 4)


def test_training_starts_from_a_packages_weights(config, tmp_path):
    starter = find_package("starter")
    begun = train(replace(config, out=tmp_path, init=starter.path, steps=1, epoch_steps=1, lr=1e-6)).state_dict()
    for name, tensor in load_network(starter).state_dict().items():
        if tensor.is_floating_point() and "running" not in name:
            assert torch.allclose(begun[name], tensor, atol=1e-4), name
    # What made the weights that it began with stays on record.
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert saved["before"]["steps"] == starter.card.training["steps"]


def test_a_package_of_another_encoder_is_no_start(config, tmp_path):
    with pytest.raises(InputError, match="--init"):
        train(replace(config, out=tmp_path, init=find_package("starter").path, encoder="mit_b1"))
