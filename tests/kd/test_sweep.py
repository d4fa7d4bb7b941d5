"""Sweeps: each run in its own folder, finished runs are skipped, and a failure does not stop the others."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

import kd.sweep
from hover_batch.config import PostSettings
from hover_batch.errors import InputError
from hover_batch.model.package import find_package
from kd.cli import kd_app
from kd.sweep import hashes_of_inputs
from kd.training.config import TrainConfig


def run(*arguments: object):
    return CliRunner().invoke(kd_app, ["sweep", *(str(a) for a in arguments)])


def report_of(out: Path) -> dict[str, dict[str, str]]:
    with (out / "sweep.csv").open(newline="") as f:
        return {row["run"]: row for row in csv.DictReader(f)}


class Scored:
    """An evaluation with made-up scores."""

    def __init__(
        self, model: str, data: Path, *, folds: Sequence[str], post: PostSettings, label: str, threads: int
    ) -> None:
        assert Path(model).name == "student.safetensors"
        self.scored = {"label": label, "folds": folds, "min_area_px": post.min_area_px}

    def write(self, path: Path) -> None:
        scores = {"tnbc": {"pq": 0.5, "aji": 0.25, "dice": None, "f_d": 0.125, "sq": 0.7}}
        path.write_text(json.dumps(self.scored | {"sources": scores}))


@pytest.fixture
def trained(monkeypatch) -> list[TrainConfig]:
    """The settings of the trainings, which do nothing; those of the encoder `bad` fail."""
    configs: list[TrainConfig] = []

    def train(config: TrainConfig) -> None:
        configs.append(config)
        print("a line")
        if config.encoder == "bad":
            raise RuntimeError("it diverged\nfar below")
        if config.encoder == "interrupted":
            raise KeyboardInterrupt

    monkeypatch.setattr(kd.sweep, "train", train)
    monkeypatch.setattr(kd.sweep, "make_package", lambda given, data, out: f"{given[0].name} to {out.name}")
    monkeypatch.setattr(kd.sweep, "evaluate_package", Scored)
    monkeypatch.setattr(kd.sweep, "hashes_of_inputs", lambda data, teacher: {"data_sha256": "0123"})
    monkeypatch.setattr(kd.sweep, "folds_of", lambda data: ["1", "2", "3", "test"])
    return configs


def names(configs: list[TrainConfig]) -> list[str]:
    return [config.out.name for config in configs]


def grid(out: Path, *more: object):
    axes = ["--alpha", 1, "--alpha", 0.5, "--temperature", 1, "--temperature", 5, "--encoder", "mit_b0"]
    return run("--data", "d", "--teacher", "cache", "-o", out, *axes, *more)


def test_every_point_is_a_run_and_those_that_mean_the_same_are_one(tmp_path, trained):
    result = grid(tmp_path, "--seed", 3, "--test-fold", "3", "--threads", 1, "--", "--steps", 9)
    assert result.exit_code == 0, result.exception
    common = {"data": Path("d").resolve(), "encoder": "mit_b0", "seed": 3, "threads": 1, "steps": 9}
    taught = {"teacher": Path("cache").resolve(), "alpha": 0.5}
    assert trained == [
        TrainConfig.of("quick", out=tmp_path / name, **common, **given)
        for name, given in {
            "mit_b0_a1_s3": {"alpha": 1.0},
            "mit_b0_a0.5_t1_s3": taught | {"temperature": 1.0},
            "mit_b0_a0.5_t5_s3": taught | {"temperature": 5.0},
        }.items()
    ]
    rows = report_of(tmp_path)
    assert list(rows) == names(trained)
    row = rows["mit_b0_a0.5_t5_s3"]
    assert (row["encoder"], row["alpha"], row["temperature"], row["seed"]) == ("mit_b0", "0.5", "5.0", "3")
    assert (row["tnbc_pq"], row["tnbc_dice"], row["tnbc_f_d"], row["failed"]) == ("0.5", "", "0.125", "")
    assert rows["mit_b0_a1_s3"]["temperature"] == ""
    assert "0.5000" in result.stdout and str(tmp_path / "sweep.csv") in result.stdout.replace("\n", "")
    scores = json.loads((tmp_path / "mit_b0_a1_s3" / "scores.json").read_text())
    assert (scores["label"], scores["folds"]) == ("mit_b0_a1_s3", ["3"])
    assert (tmp_path / "mit_b0_a1_s3" / "train.txt").read_text() == "a line\ncheckpoint.pt to student.safetensors\n"


def test_the_released_alpha_weighs_the_other_loss(tmp_path, trained):
    assert grid(tmp_path, "--preset", "released", "--alpha", 0).exit_code == 0
    assert set(names(trained)) == {
        "mit_b0_a0", "mit_b0_a0.5_t1", "mit_b0_a0.5_t5", "mit_b0_a1_t1", "mit_b0_a1_t5",
    }  # fmt: skip


def test_a_failure_costs_its_run_only_and_what_is_done_is_skipped(tmp_path, trained):
    result = grid(tmp_path, "--encoder", "bad")
    assert result.exit_code == 3
    assert len(trained) == 6
    row = report_of(tmp_path)["bad_a1"]
    assert (row["failed"], row["tnbc_pq"]) == ("it diverged", "")
    assert "RuntimeError: it diverged\nfar below" in (tmp_path / "bad_a1" / "train.txt").read_text()
    assert "bad_a1: FAILED: it diverged" in result.stderr
    trained.clear()
    again = grid(tmp_path, "--encoder", "bad")
    assert again.exit_code == 3 and "6 runs, 3 of them done before" in again.stderr
    assert set(names(trained)) == {"bad_a1", "bad_a0.5_t1", "bad_a0.5_t5"}
    # Another grid in the same folder adds its runs to what is there.
    assert run("--data", "d", "--teacher", "cache", "-o", tmp_path, "--encoder", "bad").exit_code == 4


def test_an_interrupt_is_no_failure(tmp_path, trained):
    result = run(
        "--data", "d", "-o", tmp_path, "--encoder", "mit_b0", "--encoder", "interrupted", "--encoder", "mit_b1"
    )
    assert result.exit_code not in (0, 3)
    assert names(trained) == ["mit_b0_a1", "interrupted_a1"]
    assert (tmp_path / "mit_b0_a1" / "scores.json").is_file() and not (tmp_path / "sweep.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "0"], "--alpha 0.0: distils, which needs --teacher"),
        (["--alpha", "2"], "--alpha 2.0"),
        (["--preset", "none"], "--preset none"),
        (["--threads", "0"], "--threads 0"),
        (["--gpus-per-run", "0"], "--gpus-per-run 0.0"),
        (["--gpus-per-run", "1.5"], "--gpus-per-run 1.5"),
        (["--split", "1/2/9", "--split", "1/2/3"], "--split: d has no images of the fold 9 to score on"),
        (["--test-fold", "tset"], "--test-fold: d has no images of the fold tset to score on; its folds are 1, 2"),
        (["--split", "1/2"], "--split 1/2: give TRAIN/VAL/TEST"),
        (["--split", "1/2/1"], "--split 1/2/1: TRAIN and TEST are the same fold"),
        (["--split", "1/1/3"], "--val-fold 1: is also a fold to train on"),
        (["--split", "1/2/3", "--test-fold", "3"], "--split: already names the folds"),
        (["--split", "1/2/3", "--", "--fold", "1"], "--split: already names the folds"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(tmp_path, trained, arguments, message):
    result = run("--data", "d", "-o", tmp_path / "runs", *arguments)
    assert isinstance(result.exception, InputError) and message in str(result.exception)
    assert not trained and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--alpha", 0.3], "-- --alpha: the sweep sets it for each run"),
        (["--data", "other"], "-- --data"),
        (["--preset", "paper"], "-- --preset"),
        (["--threads", 4], "-- --threads"),
        (["--model", "hovernet-fast"], "-- --model hovernet-fast: a sweep trains students"),
    ],
)
def test_options_that_are_the_sweeps_to_give(tmp_path, more, message):
    """The report would say of a run what is not so."""
    result = run("--data", "d", "-o", tmp_path / "runs", "--alpha", 1, "--", *more)
    assert isinstance(result.exception, InputError) and message in str(result.exception)
    assert not (tmp_path / "runs").exists()


def test_options_that_train_does_not_have(tmp_path, trained):
    result = run("--data", "d", "-o", tmp_path / "runs", "--", "--stepps", 9)
    assert result.exit_code == 2 and "--stepps" in result.stderr
    assert not trained and not (tmp_path / "runs").exists()


def test_a_folder_of_other_arguments_is_refused(tmp_path, trained):
    assert grid(tmp_path, "--", "--steps", 9).exit_code == 0
    result = grid(tmp_path, "--", "--steps", 10)
    assert isinstance(result.exception, InputError)
    assert "mit_b0_a1 was begun with other arguments" in str(result.exception)
    assert len(trained) == 3


@pytest.mark.parametrize("name", ["scores.json", "arguments.json"])
def test_a_corrupted_file_of_a_run_gives_no_traceback(tmp_path, trained, name):
    assert grid(tmp_path).exit_code == 0
    (tmp_path / "mit_b0_a1" / name).write_text("{")
    result = grid(tmp_path)
    if name == "scores.json":
        assert result.exit_code == 0 and "3 runs, 2 of them done before" in result.stderr
    else:
        assert isinstance(result.exception, InputError) and "was begun with other" in str(result.exception)


@pytest.mark.parametrize("sources", [True, {"tnbc": [1]}, {"tnbc": {"pq": 0.5}}, {"tnbc": {"pq": "0.5"}}])
def test_altered_scores_are_made_again(tmp_path, trained, sources):
    assert grid(tmp_path).exit_code == 0
    scores = tmp_path / "mit_b0_a1" / "scores.json"
    scores.write_text(json.dumps(json.loads(scores.read_text()) | {"sources": sources}))
    result = grid(tmp_path)
    assert result.exit_code == 0 and "3 runs, 2 of them done before" in result.stderr
    assert report_of(tmp_path)["mit_b0_a1"]["tnbc_pq"] == "0.5"


@pytest.mark.parametrize("name", ["data", "data.npz"])
def test_scores_on_other_data_are_not_those_of_a_run(tmp_path, trained, monkeypatch, name):
    monkeypatch.setattr(kd.sweep, "hashes_of_inputs", hashes_of_inputs)
    (tmp_path / "data").mkdir()

    def sweep_again(colour: int):
        labels = next(write_images(tmp_path / "data").glob("0_labels.png"))
        cv2.imwrite(str(labels), np.where(cv2.imread(str(labels), -1) == 1, colour, 0).astype(np.uint16))
        prepared = CliRunner().invoke(kd_app, ["prepare", str(tmp_path / "data"), "-o", str(tmp_path / "data.npz")])
        assert prepared.exit_code == 0, prepared.exception
        return run("--data", tmp_path / name, "-o", tmp_path / "runs")

    assert sweep_again(1).exit_code == 0
    assert "1 of them done before" in sweep_again(1).stderr
    result = sweep_again(2)
    assert isinstance(result.exception, InputError) and "other arguments or other data" in str(result.exception)


def test_other_test_folds_are_scored_anew(tmp_path, trained):
    for fold in ("2", "3"):
        assert grid(tmp_path, "--test-fold", fold).exit_code == 0
        assert json.loads((tmp_path / "mit_b0_a1" / "scores.json").read_text())["folds"] == [fold]
    assert "3 runs, 3 of them done before" in grid(tmp_path, "--test-fold", "3").stderr


def test_another_smallest_area_is_scored_anew(tmp_path, trained):
    for area in (64, 10):
        assert grid(tmp_path, "--min-area-px", area).exit_code == 0
        assert json.loads((tmp_path / "mit_b0_a1" / "scores.json").read_text())["min_area_px"] == area
    assert "3 runs, 3 of them done before" in grid(tmp_path, "--min-area-px", 10).stderr


def test_every_split_is_a_run_and_all_of_them_have_one_label(tmp_path, trained):
    splits = ["--split", "1/2/3", "--split", "2/1/3", "--split", "3/2/1"]
    assert run("--data", "d", "-o", tmp_path, "--encoder", "mit_b0", *splits).exit_code == 0
    assert [(c.out.name, c.train_folds, c.val_folds) for c in trained] == [
        ("mit_b0_a1_1-2-3", ("1",), ("2",)),
        ("mit_b0_a1_2-1-3", ("2",), ("1",)),
        ("mit_b0_a1_3-2-1", ("3",), ("2",)),
    ]
    stored = [json.loads((c.out / "scores.json").read_text()) for c in trained]
    assert [s["folds"] for s in stored] == [["3"], ["3"], ["1"]]
    assert {s["label"] for s in stored} == {"mit_b0_a1"}


def test_values_that_differ_in_late_digits_are_different_runs(tmp_path, trained):
    near = ["--temperature", "1", "--alpha", "0.12345671", "--alpha", "0.12345672"]
    assert run("--data", "d", "--teacher", "t", "-o", tmp_path, "--encoder", "mit_b0", *near).exit_code == 0
    assert [c.out.name for c in trained] == ["mit_b0_a0.12345671_t1", "mit_b0_a0.12345672_t1"]


def test_a_file_in_the_place_of_the_folder(tmp_path, trained):
    (tmp_path / "runs").write_text("")
    result = grid(tmp_path / "runs")
    assert isinstance(result.exception, InputError) and f"-o {tmp_path / 'runs'}: " in str(result.exception)


def write_images(folder: Path) -> Path:
    """An image of dark discs for each split."""
    rows = []
    for i, split in enumerate(("train", "val", "test")):
        image, labels = np.full((96, 96, 3), (200, 180, 230), np.uint8), np.zeros((96, 96), np.uint16)
        for n, centre in enumerate([(20, 20), (60, 30), (40, 70)], start=1):
            cv2.circle(image, centre, 9, (90, 30, 80), -1)
            cv2.circle(labels, centre, 9, n, -1)
        cv2.imwrite(str(folder / f"{i}.png"), image)
        cv2.imwrite(str(folder / f"{i}_labels.png"), labels)
        rows.append((f"image {i}", f"{i}.png", f"{i}_labels.png", "", "tnbc", "", split))
    with (folder / "dataset.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("sample_id", "image", "labels", "types", "source", "group", "split"), *rows])
    return folder


def test_options_of_train_after_the_dashes(tmp_path, trained):
    more = ["--steps", 9, "--source", "tnbc=1", "--source", "consep=2", "--fold", "1", "--encoder-weights", "imagenet"]
    result = run("--data", "d", "-o", tmp_path, "--preset", "paper", "--alpha", 1, "--", *more)
    assert result.exit_code == 0, result.exception
    (config,) = trained
    assert (config.preset, config.steps, config.sources) == ("paper", 9, {"tnbc": 1.0, "consep": 2.0})
    assert (config.train_folds, config.encoder_weights, config.threads) == (("1",), "imagenet", 2)


def test_a_wrong_setting_after_the_dashes_is_refused_before_anything_runs(tmp_path, trained):
    result = run("--data", "d", "-o", tmp_path / "runs", "--", "--size", 100)
    assert isinstance(result.exception, InputError) and "--size 100" in str(result.exception)
    assert not trained and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_real_trainings(tmp_path):
    """One that ends, and one whose encoder nobody knows."""
    out = tmp_path / "runs"
    small = ["--size", 64, "--batch", 1, "--steps", 2, "--epoch-steps", 2]
    data = write_images(tmp_path)
    result = run("--data", data, "-o", out, "--encoder", "mit_b0", "--encoder", "mit_b9", "--threads", 1, "--", *small)
    assert result.exit_code == 3, result.exception
    package = find_package(str(out / "mit_b0_a1" / "student.safetensors"))
    assert package.card.training["steps"] == 2
    rows = report_of(out)
    assert float(rows["mit_b0_a1"]["tnbc_pq"]) >= 0
    assert "mit_b9" in rows["mit_b9_a1"]["failed"]
