"""The training loop on a tiny synthetic folder: it learns, resumes to the same weights, and refuses other settings."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from training_folder import Knows, write_folder

import kd.training.crops
import kd.training.schedule
import kd.training.train
import kd.training.validate
from hover_batch.cohort.run_lock import locked
from hover_batch.errors import HoverBatchError, InputError, PackageError
from hover_batch.model.package import find_package, load_network
from hover_batch.taxonomy import CONSEP, PANNUKE
from kd.data.datasets import read_data
from kd.teaching.teach import TeacherCache
from kd.training.config import TrainConfig
from kd.training.initial_weights import starting_network
from kd.training.logs import LOG, read_log
from kd.training.losses import UNKNOWN
from kd.training.state import CHECKPOINT
from kd.training.train import train

NEWER = ("teacher_labels", "msge_axes", "plateau_relative")
"""Settings that the first checkpoints do not have."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory) -> TrainConfig:
    return TrainConfig(
        data=folder,
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


@pytest.fixture
def taught(monkeypatch):
    """`--teacher` names Knows."""
    monkeypatch.setattr(kd.training.train, "open_teacher", lambda path, taxonomy: Knows())


@pytest.fixture(scope="module")
def paper(folder, tmp_path_factory) -> TrainConfig:
    """The paper's training with the smallest encoder, so hasty that the plateau is reached and training stops."""
    return replace(
        TrainConfig.of("paper", data=folder, out=tmp_path_factory.mktemp("paper"), teacher=Path("taught")),
        encoder="mit_b0",
        encoder_weights="random",
        temperature=2.0,
        size=64,
        batch=2,
        epochs=9,
        epoch_steps=2,
        lr=1e-3,
        plateau_patience=0,
        plateau_delta=3.0,
        early_stop=2,
        threads=1,
    )


@pytest.fixture(scope="module")
def papers(paper):
    """The weights of an undisturbed run, and its log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd.training.train, "open_teacher", lambda path, taxonomy: Knows())
        return train(paper).state_dict(), log_of(paper.out)


def log_of(out: Path) -> list[dict[str, float]]:
    """Without the times."""
    rows = [{k: float(v) for k, v in row.items()} for row in read_log(out / LOG)]
    return [{k: v for k, v in row.items() if k != "s_per_step"} for row in rows]


def same(weights, others) -> bool:
    return all(torch.equal(weights[name], tensor) for name, tensor in others.items())


def interrupt(monkeypatch, module: object, name: str, n: int) -> None:
    """The n-th call of the function is where somebody presses Ctrl-C."""
    real, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == n:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


def test_the_loss_falls(undisturbed, config):
    rows = log_of(config.out)
    assert [r["step"] for r in rows] == [4, 8, 12]
    for term in ("np_ce", "np_dice", "hv_mse", "loss"):
        assert rows[-1][term] < rows[0][term]
    assert len(list((config.out / "panels").glob("epoch_000[123].jpg"))) == 3
    picture = cv2.imread(str(config.out / "panels" / "epoch_0003.jpg"))
    assert picture.shape[1] == 3 * 160 + 2 * 6  # image, annotated, network


def test_interrupted_and_resumed_gives_the_same_weights(undisturbed, config, tmp_path, monkeypatch):
    config = replace(config, out=tmp_path)
    interrupt(monkeypatch, kd.training.schedule, "learning_rate", 7)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    resumed = train(config).state_dict()
    assert [r["step"] for r in log_of(tmp_path)] == [4, 8, 12]
    assert same(resumed, undisturbed)


def test_the_papers_training_ends_early_and_ships_its_best_epoch(papers, paper):
    weights, rows = papers
    losses = [r["val_loss"] for r in rows]
    rates = [r["lr"] for r in rows]
    assert 3 <= len(rows) < 9  # of nine epochs
    assert rates[0] > rates[-1]
    assert {"kd_np_kl", "kd_tp_kl", "kd_hv_msge"} <= set(rows[0])
    saved = torch.load(paper.out / "checkpoint.pt", weights_only=True)
    assert saved["ended"] and saved["best"] == pytest.approx(min(losses), rel=1e-5)
    assert same(saved["shipped"], weights)
    assert same(saved["model"], weights) == (losses[-1] == min(losses))
    assert saved["record"]["teacher"]["sha256"] == "0123"
    picture = cv2.imread(str(paper.out / "panels" / "epoch_0001.jpg"))
    assert picture.shape[1] == 4 * 160 + 3 * 6  # the teacher's, too


def test_the_papers_training_resumes_to_the_same_weights(papers, paper, tmp_path, monkeypatch, taught):
    """Stopped in the middle of an epoch for a trial, and later between an epoch's steps and its validation."""
    config = replace(paper, out=tmp_path)
    train(replace(config, max_steps=1))
    interrupt(monkeypatch, kd.training.train, "validation_loss", 2)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(kd.training.train, "validation_loss", kd.training.validate.validation_loss)
    weights, rows = papers
    assert same(train(config).state_dict(), weights)
    assert log_of(tmp_path)[-1] == rows[-1]
    assert [r["step"] for r in log_of(tmp_path)] == [1, *(r["step"] for r in rows)]


def test_a_trial_killed_while_it_validates_ships_what_it_has_trained(paper, tmp_path, monkeypatch, taught):
    trial = replace(paper, out=tmp_path, max_steps=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, kd.training.train, "validate", 1)
        train(trial)
    shipped = train(trial).state_dict()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 1 and same(saved["model"], shipped)


def test_a_run_that_ended_early_is_not_trained_again(papers, paper, taught):
    weights, rows = papers
    assert same(train(paper).state_dict(), weights)
    assert log_of(paper.out) == rows


def test_another_teacher_and_other_images_are_refused(papers, paper, tmp_path, monkeypatch, taught):
    monkeypatch.setattr(Knows, "sha256", "other")
    with pytest.raises(InputError, match="--teacher"):
        train(paper)
    monkeypatch.undo()
    monkeypatch.setattr(kd.training.train, "open_teacher", lambda path, taxonomy: Knows())
    with pytest.raises(InputError, match="--data"):
        train(replace(paper, data=write_folder(tmp_path, seed=1)))
    again = shutil.copytree(paper.data, tmp_path / "annotated again")
    labels = sorted((again).rglob("*label*.png"))[0]
    instances = cv2.imread(str(labels), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(labels), np.where(instances == instances.max(), 0, instances))
    with pytest.raises(InputError, match="--data"):
        train(replace(paper, data=again))


def test_a_student_learns_from_what_kd_teach_keeps(config, tmp_path):
    cache = TeacherCache.create(tmp_path / "taught", find_package("starter"))
    distilling = replace(config, teacher=cache.path, alpha=0.5, steps=2, epoch_steps=2, out=tmp_path / "out")
    for sample in read_data(config.data, ["train", "val"]).samples:
        cache.write(sample, Knows().logits(sample))
    train(distilling)
    (row,) = log_of(distilling.out)
    assert {"kd_np_kl", "kd_tp_kl", "val_loss"} <= set(row)
    saved = torch.load(distilling.out / "checkpoint.pt", weights_only=True)
    assert saved["record"]["teacher"]["name"] == find_package("starter").card.name


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    cache = TeacherCache.create(tmp_path, find_package("starter"))
    assert kd.training.crops.open_teacher(tmp_path, CONSEP) == cache
    with pytest.raises(InputError, match="its classes are those of consep-merged, the data's those of pannuke"):
        kd.training.crops.open_teacher(tmp_path, PANNUKE)


def test_an_image_that_was_not_taught_is_told_in_one_line(paper, tmp_path, monkeypatch, taught):
    def absent(self, sample):
        raise InputError(f"{sample.id}: run `hover-batch kd teach` on it")

    monkeypatch.setattr(Knows, "logits", absent)
    with pytest.raises(InputError) as error:
        train(replace(paper, out=tmp_path, class_weights=False))
    assert "\n" not in str(error.value) and "run `hover-batch kd teach` on it" in str(error.value)
    assert not str(error.value).startswith("Caught")


def test_images_that_were_not_taught_are_told_before_training(paper, tmp_path, monkeypatch, taught):
    monkeypatch.setattr(Knows, "covers", lambda self, sample: sample.fold != "val")
    with pytest.raises(InputError, match=r"--teacher taught: no output for 2 of 2 images, the first consep_2; run"):
        train(replace(paper, out=tmp_path))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_file_in_the_place_of_the_folder(config, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="--out .*out: File exists; give a folder"):
        train(replace(config, out=tmp_path / "out"))


def test_two_trainings_do_not_write_to_one_folder(config, tmp_path):
    with locked(tmp_path / ".lock"), pytest.raises(InputError, match=r"--out .*: another run \(process .* is writing"):
        train(replace(config, out=tmp_path))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_package_to_start_from_that_is_not_there(config, tmp_path):
    with pytest.raises(PackageError, match="--init none.safetensors: no such package"):
        train(replace(config, out=tmp_path, init=Path("none.safetensors")))


def test_images_smaller_than_a_crop_are_padded_and_the_padding_teaches_nothing(config, folder, taught):
    samples = read_data(folder, ["train"]).samples
    wide = replace(config, size=192)
    for crops in (
        kd.training.crops.training_crops(samples, {"consep": 1.0}, wide, 0, Knows())[0],
        kd.training.crops.validation_crops(samples, {"consep": 1.0}, wide, 0, Knows()),
    ):
        for i in range(len(crops)):
            image, nuclei, _, types, planes = crops[i]
            assert image.shape == (3, 192, 192)
            padding = nuclei == UNKNOWN
            assert padding.sum() == 192**2 - 160**2 or crops.kind == "full"
            assert padding.any() and not padding.all()
            assert (types[padding] == UNKNOWN).all()
            assert planes.isnan().any(0).equal(padding)


def test_where_only_some_nuclei_are_outlined_the_rest_is_not_background():
    instances = np.array([[0, 1, 2, -1]], np.int32)
    types = np.array([[0, 3, 0, 0]], np.uint8)
    nuclei, classes = kd.training.crops.targets_of(instances, types, "monusac")
    assert (nuclei.tolist(), classes.tolist()) == ([[-1, -1, -1, -1]], [[-1, 3, -1, -1]])
    nuclei, classes = kd.training.crops.targets_of(instances, types, "consep")
    assert (nuclei.tolist(), classes.tolist()) == ([[0, 1, 1, -1]], [[0, 3, -1, -1]])
    assert kd.training.crops.targets_of(instances, None, "tnbc")[1].tolist() == [[-1, -1, -1, -1]]


def test_the_encoder_has_its_own_learning_rate(config, tmp_path):
    slow = replace(config, out=tmp_path, encoder_lr=1e-12, steps=2, epoch_steps=2)
    train(slow)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.manual_seed(slow.seed)
    begun = starting_network(slow, CONSEP)[0].state_dict()
    moved = {n.split(".")[0]: 0.0 for n in begun}
    for name, tensor in begun.items():
        if tensor.is_floating_point() and "running" not in name:
            part = name.split(".")[0]
            moved[part] = max(moved[part], (saved["model"][name] - tensor).abs().max().item())
    assert moved["encoder"] < 1e-9 < 1e-5 < moved["decoder"]


def test_the_same_loop_trains_a_teacher(config, tmp_path):
    small = replace(config, model="hovernet-fast", width=8, size=128, steps=2, epoch_steps=2, out=tmp_path)
    network = train(small)
    (row,) = log_of(tmp_path)
    assert {"tp_dice", "hv_msge", "val_loss", "val_pq_tnbc"} <= set(row)
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
    assert len(list((tmp_path / "panels").iterdir())) == 1


def test_training_starts_after_opencv_has_used_its_threads(config, tmp_path):
    """As calibration and validation do, in the same process."""
    short = replace(config, steps=2, epoch_steps=2)
    before = train(replace(short, out=tmp_path / "before")).state_dict()
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((4000, 4000), np.float32), (0, 0), 5)
    assert same(train(replace(short, out=tmp_path / "after")).state_dict(), before)


def test_a_finished_run_is_not_trained_again(undisturbed, config):
    before = log_of(config.out)
    assert same(train(config).state_dict(), undisturbed)
    assert log_of(config.out) == before


def test_a_checkpoint_from_before_a_setting_goes_on_with_its_default(undisturbed, config, tmp_path):
    saved = torch.load(config.out / CHECKPOINT, weights_only=True)
    saved["config"] = {name: value for name, value in saved["config"].items() if name not in NEWER}
    torch.save(saved, tmp_path / CHECKPOINT)
    again = train(replace(config, out=tmp_path)).state_dict()
    assert same(again, undisturbed)
    with pytest.raises(InputError, match=r"other settings \(teacher_labels hard, not soft\)"):
        train(replace(config, out=tmp_path, teacher_labels="soft"))


@pytest.mark.parametrize("changed", [{"lr": 1e-3}, {"size": 96}, {"sources": {"consep": 1.0}}, {"steps": 16}])
def test_other_settings_are_refused(undisturbed, config, changed):
    with pytest.raises(InputError, match="other settings"):
        train(replace(config, **changed))


def test_a_source_without_training_images_is_refused(config, tmp_path):
    with pytest.raises(InputError, match=r"--source monuseg: .* the sources that it has \(consep, tnbc\) only"):
        train(replace(config, out=tmp_path, sources={"consep": 0.5, "monuseg": 0.5}))


def test_a_fold_without_images_is_refused(config, paper, tmp_path, taught):
    with pytest.raises(InputError, match="--fold test: .* has no images of this fold; its folds are train, val"):
        train(replace(config, out=tmp_path, sources=None, train_folds=("test",)))
    with pytest.raises(InputError, match="--val-fold test"):
        train(replace(paper, out=tmp_path, val_folds=("test",)))


def test_without_validation_images_training_goes_by_its_own_loss(config, tmp_path):
    train(replace(config, out=tmp_path, val_folds=("test",), steps=2, epoch_steps=1))
    rows = log_of(tmp_path)
    assert [r["step"] for r in rows] == [1, 2] and not any(name.startswith("val_") for r in rows for name in r)


def test_the_log_holds_means_over_the_steps_that_have_the_term(config, tmp_path, monkeypatch):
    monkeypatch.setattr("kd.training.losses.weighted_ce", lambda logits, truth, weight: 0 * logits.sum() + 2)
    train(replace(config, out=tmp_path, val_folds=("test",), batch=1, steps=5, epoch_steps=5))
    (row,) = log_of(tmp_path)
    assert (row["np_ce"], row["tp_ce"]) == (2, 2)  # some of the steps see no typed image


def test_training_that_diverges_says_so_and_keeps_the_checkpoint(config, tmp_path, monkeypatch):
    config = replace(config, out=tmp_path, steps=2, epoch_steps=1)
    train(replace(config, max_steps=1))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(kd.training.schedule, "learning_rate", lambda *args: float("nan"))
    monkeypatch.setattr("kd.training.losses.mse_loss", lambda hv, truth, known: hv.sum() * float("nan"))
    with pytest.raises(HoverBatchError, match="give a lower --lr"):
        train(config)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_that_cannot_be_written_is_told_of_and_the_last_one_stays(config, tmp_path, monkeypatch):
    config = replace(config, out=tmp_path, steps=2, epoch_steps=1)
    train(replace(config, max_steps=1))
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def on_a_full_disk(saved, path):
        path.write_bytes(b"PK")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2093440 vs 2093328")

    monkeypatch.setattr(torch, "save", on_a_full_disk)
    with pytest.raises(HoverBatchError, match="checkpoint.pt cannot be written .*; make sure that its disk has space"):
        train(config)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoint.pt", "log.csv", "panels", "tensorboard"}


def test_shares_without_any_given(folder, config):
    samples = read_data(folder, ["train"]).samples
    plain = replace(config, sources=None)
    assert kd.training.crops.source_shares(plain, samples) == {"consep": 0.5, "tnbc": 0.5}


def test_training_starts_from_a_packages_weights(config, tmp_path):
    starter = find_package("starter")
    as_packaged = replace(config, out=tmp_path, init=starter.path, encoder=starter.card.encoder)
    begun = train(replace(as_packaged, steps=1, epoch_steps=1, lr=1e-6)).state_dict()
    for name, tensor in load_network(starter).state_dict().items():
        if tensor.is_floating_point() and "running" not in name:
            assert torch.allclose(begun[name], tensor, atol=1e-4), name
    # What made the weights that it began with stays on record.
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["record"]["before"]["steps"] == starter.card.training["steps"]
