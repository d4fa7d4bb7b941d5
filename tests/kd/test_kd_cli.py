"""The kd commands, from flags to files, on a tiny synthetic folder and an untrained network."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from hover_batch.errors import InputError, PackageError
from hover_batch.model.architectures.unet import StudentArch, build_student
from hover_batch.model.card import Card
from hover_batch.model.package import save_package
from hover_batch.taxonomy import CONSEP, MONUSAC, PANNUKE, Taxonomy
from kd.cli import kd_app
from kd.commands.options import local_path
from kd.data.datasets import read_data
from kd.evaluation.shifts import SHIFTS
from kd.training.validate import TYPICAL

pytestmark = pytest.mark.usefixtures("by_torch")


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


def write_package(path: Path, taxonomy: Taxonomy, training: dict[str, Any] | None = None) -> Path:
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
        training=training or {},
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
    for text in ("untaught on ", ", test", "consep", "tnbc", "mpq", "f_d", "f epithelial", "GMac per patch of 256 px"):
        assert text in result.stdout
    report = json.loads(out.read_text())
    assert (report["model"], report["label"], report["folds"], report["sobel_norm"]) == (
        *("untaught", "untaught"),
        ["test"],
        norm,
    )
    assert report["leakage"] == [] and report["cost"]["macs_per_patch"] > 3e9
    assert len(report["sha256"]) == 64
    assert set(report["sources"]) == {"consep", "tnbc"}
    assert report["sources"]["consep"]["nuclei"] == 1
    assert set(report["sources"]["consep"]["f_c"]) == {c.name for c in CONSEP.nuclei}
    assert report["sources"]["tnbc"]["f_c"] == {}


def test_evaluate_one_source(folder, package, tmp_path, by_default):
    out = tmp_path / "scores.json"
    assert run("evaluate", package, "--data", folder, "--source", "tnbc", "--json", out).exit_code == 0
    assert set(json.loads(out.read_text())["sources"]) == {"tnbc"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fold", "val"], "--fold val"),
        (["--source", "monuseg"], "has no source monuseg; its sources are"),
        (["--beside", "starter"], "--beside: is shown in the picture"),
        (["--json", "nowhere/scores.json"], "nowhere does not exist; create it first"),
        (["--json", "."], "--json .: is a folder"),
        (["--json", "model.safetensors"], "--json model.safetensors: must end in .json; change the ending"),
        (["--panel", "panel.jpg"], "--panel panel.jpg: must end in .png; change the ending"),
        (["--min-area-px", "-1"], "--min-area-px -1"),
        (["--against", "nowhere.json"], "nowhere.json: No such file"),
    ],
)
def test_evaluate_says_what_is_wrong(folder, package, flags, message):
    result = run("evaluate", package, "--data", folder, *flags)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_evaluate_writes_no_picture_over_the_data(folder, package):
    result = run("evaluate", package, "--data", folder, "--panel", folder / "panel.png")
    assert isinstance(result.exception, InputError) and "which must not change" in str(result.exception)


def test_evaluate_knows_two_scalings_of_sobel_maps(folder, package):
    result = run("evaluate", package, "--data", folder, "--sobel-norm", "none")
    assert result.exit_code == 2
    assert all(text in result.stderr for text in ("--sobel-norm", "none", "fixed", "window"))


def test_evaluate_calls_a_missing_package_by_the_words_of_its_user(folder, tmp_path):
    result = run("evaluate", tmp_path / "none.safetensors", "--data", folder)
    assert isinstance(result.exception, PackageError)
    assert str(result.exception).startswith(f"package {tmp_path}")


def test_evaluate_refuses_classes_that_have_nothing_in_common_with_the_annotations(folder, tmp_path):
    result = run("evaluate", write_package(tmp_path / "other.safetensors", MONUSAC), "--data", folder)
    assert isinstance(result.exception, InputError)
    assert "the model's epithelial, lymphocyte, macrophage, neutrophil" in str(result.exception)


def test_evaluate_by_the_classes_in_common_with_a_picture_and_the_time(folder, package, tmp_path, monkeypatch):
    monkeypatch.setattr("hover_batch.model.cost.patch_side", lambda card: card.tile_in)  # 16 patches are timed
    out, picture = tmp_path / "scores.json", tmp_path / "panel.png"
    other = write_package(tmp_path / "other.safetensors", PANNUKE)
    flags = ("--json", out, "--panel", picture, "--beside", package, "--time", "--label", "mine", "--threads", 1)
    result = run("evaluate", other, "--data", folder, "--fold", "test", "--fold", "val", "--fold", "test", *flags)
    assert result.exit_code == 0, result.exception
    report = json.loads(out.read_text())
    assert report["sources"]["consep"]["classes"] == ["epithelial", "inflammatory", "miscellaneous"]
    assert report["sources"]["tnbc"]["classes"] == ["nucleus"]
    assert (report["label"], report["folds"]) == ("mine", ["test", "val"])
    assert report["cost"]["seconds_per_patch"] > 0 and "1 threads" in report["cost"]["timed_on"]
    assert report["cost"]["seconds_per_tile"] is None and "no image of 1000² px to time" in result.stdout
    assert cv2.imread(str(picture)).shape[1] > 4 * 512
    tables = run("tables", out, "-o", tmp_path / "tables")
    assert tables.exit_code == 0 and "| mine |" in (tmp_path / "tables" / "tables.md").read_text()


def test_evaluate_on_changed_images(folder, package, tmp_path):
    out = tmp_path / "scores.json"
    flags = ("--source", "consep", "--shift", "--min-area-px", 10, "--json", out, "--threads", 1)
    result = run("evaluate", package, "--data", folder, *flags)
    assert result.exit_code == 0, result.exception
    assert "nuclei from 10 px" in result.stdout and "untaught on changed images" in result.stdout
    report = json.loads(out.read_text())
    assert report["min_area_px"] == 10
    names = [shift.name for shift in SHIFTS]
    assert [(row["source"], row["shift"]) for row in report["shifts"]] == [("consep", name) for name in names]
    assert all(name in result.stdout for name in names)
    assert "untaught, JPEG quality 30" in result.stderr
    for row in report["shifts"]:
        unchanged = report["sources"]["consep"]["dice"]
        assert row["changes"]["dice"] == pytest.approx(row["scores"]["dice"] - unchanged)


def test_evaluate_against_another_package_and_against_an_earlier_evaluation(folder, package, tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    other = write_package(tmp_path / "other.safetensors", PANNUKE)
    flags = ("--data", folder, "--threads", 1)
    result = run("evaluate", other, *flags, "--against", package, "--json", old)
    assert result.exit_code == 0, result.exception
    first = json.loads(old.read_text())
    assert [row["id"] for row in first["by_image"]["consep"]] == ["a"]
    assert first["against"]["label"] == "untaught" and set(first["against"]["sources"]) == {"consep", "tnbc"}
    pair = first["against"]["sources"]["tnbc"]
    assert pair["images"] == 1 and pair["low"] is None and pair["new"] == first["sources"]["tnbc"]["pq"]

    result = run("evaluate", package, *flags, "--source", "tnbc", "--against", old, "--json", new)
    assert result.exit_code == 0, result.exception
    assert "PQ of untaught against untaught on the same images" in " ".join(result.stdout.split())
    back = json.loads(new.read_text())["against"]
    assert back["sha256"] == first["sha256"] and back["sources"]["tnbc"]["difference"] == -pair["difference"]

    result = run("evaluate", package, *flags, "--against", new)
    assert "--against untaught: was scored on other images or annotations of consep (1 are not" in str(result.exception)
    assert "untaught, unchanged" not in result.stderr, "nothing is predicted in vain"


def test_evaluate_warns_in_the_table_of_what_the_model_has_seen(folder, tmp_path):
    out = tmp_path / "scores.json"
    (sample,) = read_data(folder, ["test"], ["tnbc"]).samples
    seen = {"saw": {"train": [sample.image_sha256[:16]]}}
    teacher = {"teacher": {"name": "old", "sha256": "0", "training": seen}}
    package = write_package(tmp_path / "taught.safetensors", CONSEP, teacher)
    result = run("evaluate", package, "--data", folder, "--json", out, "--threads", 1)
    assert result.exit_code == 0, result.exception
    table = result.stdout
    assert "tnbc †" in table and "consep †" in table  # both rows of the folder show one image
    assert "† tnbc, 1 of 1 images: the teacher was trained on them" in table
    assert [leak["source"] for leak in json.loads(out.read_text())["leakage"]] == ["consep", "tnbc"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "consep"], "--source consep: give NAME=SHARE"),
        (["--source", "consep=much"], "--source consep=much: give NAME=SHARE"),
        (["--source", "consep=1", "--source", "consep=2"], "--source consep=2: consep is given twice"),
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


def test_every_path_refuses_what_names_no_file():
    options = [o for command in typer.main.get_command(kd_app).commands.values() for o in command.params]
    assert not [o.name for o in options if isinstance(o.type, click.Path)], "give it parser=local_path"
    paths = [o for o in options if getattr(o.type, "func", None) is local_path]
    assert len(paths) > 15
    for text, message in (
        ("", "a path is empty"),
        ("s3://bucket/a", "is a URL, and `kd` uses files"),
        ("a\0", "null byte"),
    ):
        for option in paths:
            with pytest.raises(InputError, match=message):
                option.type.convert(text, option, None)


def test_train_makes_a_package(folder, tmp_path, monkeypatch):
    import kd.package
    import kd.training.train

    seen = []
    monkeypatch.setattr(kd.training.train, "train", lambda config: seen.append(config))
    monkeypatch.setattr(kd.package, "make_package", lambda *paths: f"packaged {paths[2].name}")
    result = run("train", "--data", folder, "--out", tmp_path, "--steps", 9, "--source", "consep=1", "--lr", 0.01)
    assert result.exit_code == 0, result.exception
    assert "packaged student.safetensors" in result.stdout
    (config,) = seen
    assert (config.steps, config.lr, config.sources) == (9, 0.01, {"consep": 1.0})
    assert (config.preset, config.train_folds, config.val_folds) == ("quick", ("train",), ("val",))


def test_train_keeps_a_package_that_it_did_not_write(folder, tmp_path):
    package = tmp_path / "student.safetensors"
    package.write_bytes(b"another")
    result = run("train", "--data", folder, "--out", tmp_path, "--steps", 9)
    assert isinstance(result.exception, InputError)
    assert "has student.safetensors, but no checkpoint.pt to resume from" in str(result.exception)
    assert list(tmp_path.iterdir()) == [package] and package.read_bytes() == b"another"


def test_train_takes_a_preset_folds_and_a_teachers_form(folder, tmp_path, monkeypatch):
    import kd.package
    import kd.training.train

    seen = []
    monkeypatch.setattr(kd.training.train, "train", lambda config: seen.append(config))
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
