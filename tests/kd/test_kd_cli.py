"""The kd commands, from flags to files, on a tiny made-up folder and a network that has learnt nothing."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hover_batch.errors import InputError
from hover_batch.model.package import Card, save_package
from hover_batch.model.student import StudentArch, build_student
from hover_batch.taxonomy import CONSEP, PANNUKE, Taxonomy
from kd.cli import kd_app
from kd.validate import TYPICAL


def run(*arguments: object):
    return CliRunner().invoke(kd_app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    labels = np.zeros((100, 120), np.uint16)
    cv2.circle(labels, (40, 40), 12, 5, -1)
    cv2.imwrite(str(folder / "image.png"), np.full((100, 120, 3), 200, np.uint8))
    cv2.imwrite(str(folder / "labels.png"), labels)
    cv2.imwrite(str(folder / "types.png"), (labels > 0).astype(np.uint8))
    header = ("sample_id", "image", "labels", "types", "source", "group", "split")
    rows = [
        ("a", "image.png", "labels.png", "types.png", "consep", "", "test"),
        ("b", "image.png", "labels.png", "", "tnbc", "", "test"),
    ]
    with (folder / "dataset.csv").open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    return folder


def write_package(path: Path, taxonomy: Taxonomy) -> Path:
    torch.manual_seed(0)
    card = Card(
        name="untaught",
        architecture="unet",
        encoder="mit_b0",
        taxonomy=taxonomy,
        mpp=0.25,
        tile_in=128,
        tile_out=64,
        sobel=TYPICAL.to_json(),
        licence="none",
    )
    save_package(path, build_student(StudentArch("mit_b0", len(taxonomy.classes))), card)
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    return write_package(tmp_path_factory.mktemp("package") / "untaught.safetensors", CONSEP)


@pytest.mark.parametrize("norm", ["fixed", "window"])
def test_evaluate_prints_a_table_and_writes_json(folder, package, tmp_path, norm):
    out = tmp_path / "scores.json"
    result = run("evaluate", package, "--data", folder, "--sobel-norm", norm, "--json", out, "--threads", 1)
    assert result.exit_code == 0, result.exception
    for text in ("untaught on the test images", "consep", "tnbc", "pq", "f_d", "f_epithelial"):
        assert text in result.stdout
    report = json.loads(out.read_text())
    assert (report["model"], report["split"], report["sobel_norm"]) == ("untaught", "test", norm)
    assert len(report["sha256"]) == 64
    assert set(report["sources"]) == {"consep", "tnbc"}
    assert report["sources"]["consep"]["nuclei"] == 1
    assert set(report["sources"]["consep"]["f_c"]) == {c.name for c in CONSEP.nuclei}
    assert report["sources"]["tnbc"]["f_c"] == {}


def test_evaluate_one_source(folder, package, tmp_path):
    out = tmp_path / "scores.json"
    assert run("evaluate", package, "--data", folder, "--source", "tnbc", "--json", out).exit_code == 0
    assert set(json.loads(out.read_text())["sources"]) == {"tnbc"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "val"], "--split val"),
        (["--source", "monuseg"], "no such image of monuseg"),
        (["--sobel-norm", "none"], "--sobel-norm none"),
    ],
)
def test_evaluate_says_what_is_wrong(folder, package, flags, message):
    result = run("evaluate", package, "--data", folder, *flags)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_evaluate_refuses_classes_that_the_annotations_do_not_have(folder, tmp_path):
    result = run("evaluate", write_package(tmp_path / "other.safetensors", PANNUKE), "--data", folder)
    assert isinstance(result.exception, InputError)
    assert "its classes are pannuke's" in str(result.exception)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "consep"], "--source consep: give NAME=SHARE"),
        (["--source", "consep=much"], "--source consep=much: give NAME=SHARE"),
        (["--source", "consep=-1"], "each with a share above 0"),
        (["--size", "100"], "--size 100"),
        (["--preset", "best"], "--preset best"),
        (["--preset", "paper"], "--teacher, a folder written by `hover-batch kd teach`"),
    ],
)
def test_train_says_what_is_wrong(folder, tmp_path, flags, message):
    result = run("train", "--data", folder, "--out", tmp_path, *flags)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_train_makes_a_package(folder, tmp_path, monkeypatch):
    import kd.package
    import kd.train

    seen = []
    monkeypatch.setattr(kd.train, "train", lambda config: seen.append(config))
    monkeypatch.setattr(kd.package, "make_package", lambda *paths: f"packaged {paths[2].name}")
    result = run("train", "--data", folder, "--out", tmp_path, "--steps", 9, "--source", "consep=1", "--lr", 0.01)
    assert result.exit_code == 0, result.exception
    assert "packaged student.safetensors" in result.stdout
    (config,) = seen
    assert (config.steps, config.lr, config.sources) == (9, 0.01, {"consep": 1.0})
    assert (config.preset, config.train_folds, config.val_folds) == ("quick", ("train",), ("val",))


def test_train_takes_a_preset_folds_and_a_teachers_form(folder, tmp_path, monkeypatch):
    import kd.package
    import kd.train

    seen = []
    monkeypatch.setattr(kd.train, "train", lambda config: seen.append(config))
    monkeypatch.setattr(kd.package, "make_package", lambda *paths: f"packaged {paths[2].name}")
    flags = ["--model", "hovernet-fast", "--width", 8, "--alpha", 1, "--fold", 1, "--fold", 2, "--val-fold", 3]
    result = run("train", "--data", folder, "--out", tmp_path, "--preset", "paper", *flags)
    assert result.exit_code == 0, result.exception
    assert "packaged teacher.safetensors" in result.stdout
    (config,) = seen
    assert (config.train_folds, config.val_folds, config.width) == (("1", "2"), ("3",), 8)
    assert (config.optimizer, config.loss_shares) == ("adam", (1, 0))


def test_help_needs_no_torch():
    code = "import sys; from kd.cli import kd_app; print([m for m in ('torch', 'numba', 'cv2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
