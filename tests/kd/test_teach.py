"""Teacher outputs: with real surroundings, stored completely or not at all, never mixed with another teacher's."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hover_batch.cohort.run_lock import locked
from hover_batch.config import EngineSettings, InferSettings
from hover_batch.errors import InputError, PackageError
from hover_batch.model.architectures.hovernet import TeacherArch, build_teacher
from hover_batch.model.card import Card
from hover_batch.model.heads import Heads
from hover_batch.model.images import image_logits
from hover_batch.model.package import find_package, load_network, save_package, save_with_card
from hover_batch.model.predict import Predictor
from hover_batch.taxonomy import CONSEP, PANNUKE
from kd.cli import kd_app
from kd.data.datasets import Sample, read_data
from kd.teaching.teach import teach
from kd.teaching.teacher_cache import TeacherCache

ROOT = Path(__file__).resolve().parents[2]
CHANNELS = Heads(len(CONSEP.classes)).channels
CARD = Card(
    name="professor", architecture="hovernet-fast", encoder="", taxonomy=CONSEP, mpp=0.25, tile_in=160, tile_out=64,
    sobel=find_package("starter").card.sobel, licence="none",
)  # fmt: skip
LOCAL = EngineSettings(backend="local", cpus=1)


# tests/executor/test_kd_tasks.py teaches by the default runtime.
pytestmark = pytest.mark.usefixtures("by_torch")


def write_teacher(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_package(path, build_teacher(TeacherArch("fast", len(CONSEP.classes), 8)), CARD, half=False)
    return path


def write_images(folder: Path) -> Path:
    """Three images of noise, the last of which is the first one again."""
    rows = []
    for i, (split, seed, shape) in enumerate([("train", 1, (70, 90)), ("train", 2, (40, 64)), ("val", 1, (70, 90))]):
        image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), image)
        cv2.imwrite(str(folder / f"{i}_labels.png"), np.zeros(shape, np.uint16))
        rows.append((f"image {i}", f"{i}.png", f"{i}_labels.png", "", "tnbc", "", split))
    with (folder / "dataset.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("sample_id", "image", "labels", "types", "source", "group", "split"), *rows])
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def professor(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "professor.safetensors")


@pytest.fixture(scope="module")
def samples(images) -> list[Sample]:
    return read_data(images, ["train", "val"]).samples


def taught_in(folder: Path, images: Path, professor: Path, tta: int = 1) -> tuple[TeacherCache, list[str]]:
    said: list[str] = []
    cache = teach(images, str(professor), folder, ["train", "val"], tta=tta, engine=LOCAL, notify=said.append)
    return cache, said


@pytest.fixture(scope="module")
def taught(images, professor, tmp_path_factory) -> TeacherCache:
    return taught_in(tmp_path_factory.mktemp("cache"), images, professor)[0]


def files_of(cache: TeacherCache) -> dict[str, bytes]:
    files = [p for p in cache.path.rglob("*") if p.is_file() and p.name != ".lock"]  # names its process
    return {str(p.relative_to(cache.path)): p.read_bytes() for p in files}


def shards_of(cache: TeacherCache) -> list[Path]:
    return sorted(p for p in cache.path.rglob("c/0/0/0"))


class Blur(nn.Module):
    """Each pixel answers to those at most 4 away; the shapes are a network's that pads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 5, padding=2), nn.ReLU(), nn.Conv2d(6, CHANNELS, 5, padding=2))

    def forward(self, image):
        return self.layers(image)


def by_hand(network: nn.Module, image: np.ndarray, margin: int, more: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """The network on the whole image, mirrored beyond its borders by the margin, and more at its ends."""
    padded = np.pad(image, ((margin, margin + more[0]), (margin, margin + more[1]), (0, 0)), mode="reflect")
    with torch.inference_mode():
        return network(torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255)[0]


@pytest.mark.parametrize("shape", [(150, 100), (64, 64), (9, 130)])
def test_every_pixel_has_its_real_surroundings(shape):
    card = replace(CARD, tile_in=80, tile_out=64)
    network = Blur()
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    other = np.random.default_rng(1).integers(0, 256, (70, 70, 3), np.uint8)
    predictor = Predictor(network, card, InferSettings(batch=3, precision="fp32", device="cpu", threads=1))
    first, second = image_logits(predictor, [image, other])
    for logits, pixels in ((first, image), (second, other)):
        assert logits.shape == (CHANNELS, *pixels.shape[:2]) and logits.dtype == np.float32
        assert np.allclose(logits, by_hand(network, pixels, 8)[:, 8:-8, 8:-8], atol=1e-5)


def test_a_hovernet_sees_beyond_its_tiles(professor):
    """Where neither the tile's nor the whole window's ends reach, it answers as on the whole image at once."""
    network = load_network(find_package(str(professor)))
    card = replace(CARD, tile_in=224)
    image = np.random.default_rng(0).integers(0, 256, (120, 60, 3), np.uint8)
    predictor = Predictor(network, card, InferSettings(batch=2, precision="fp32", device="cpu", threads=1))
    (logits,) = image_logits(predictor, [image])
    whole = by_hand(network, image, card.margin, (8, 4))  # 288 × 224
    left = card.margin - 46  # what the network has not cropped itself
    whole = whole[:, left : left + 120, left : left + 60]
    for first in (0, 64):
        rows, columns = slice(first + 95 - card.margin, first + 224 - 103 - card.margin), slice(15, 41)
        differences = np.abs(logits[:, rows, columns] - whole[:, rows, columns].numpy())
        assert differences.max() < 1e-3 * logits.std(axis=(1, 2)).min()


def test_what_is_cached_is_the_teachers(taught, samples, professor):
    package = find_package(str(professor))
    again = TeacherCache.open(taught.path)
    assert (again.sha256, again.taxonomy, again.card["name"]) == (package.sha256, CONSEP, "professor")
    predictor = Predictor(load_network(package), CARD, InferSettings(batch=4, precision="fp32", device="cpu"))
    for sample in samples:
        logits = again.logits(sample)
        assert logits.dtype == np.float16 and logits.shape == (CHANNELS, *sample.image.shape[:2])
        assert np.array_equal(logits, image_logits(predictor, [sample.image])[0].astype(np.float16))
    # An image that comes twice is cached once, in the place that its pixels say.
    sha = samples[0].image_sha256
    assert len(shards_of(again)) == 2 and (again.path / sha[:2] / f"{sha}.zarr" / "zarr.json").is_file()


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
import kd.teaching.teacher_cache
from hover_batch.model.package import find_package
from kd.data.datasets import read_data

images, teacher, cache = sys.argv[1:]
cache = kd.teaching.teacher_cache.TeacherCache.create(Path(cache), find_package(teacher))
kd.teaching.teacher_cache.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
sample = read_data(Path(images), ["train"]).samples[0]
cache.write(sample, np.zeros((9, *sample.image.shape[:2]), np.float32))
"""


def test_a_kill_in_the_middle_of_a_write_leaves_no_trace(taught, images, professor, tmp_path):
    command = [sys.executable, "-c", KILLED, str(images), str(professor), str(tmp_path)]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("[0-9a-f]*.zarr"))
    cache, _ = taught_in(tmp_path, images, professor)
    assert files_of(cache) == files_of(taught)


def test_it_goes_on_where_it_stopped(taught, images, professor, tmp_path, monkeypatch):
    write, written = TeacherCache.write, []

    def once(self, sample, logits):
        if written:
            raise KeyboardInterrupt
        written.append(sample.id)
        write(self, sample, logits)

    monkeypatch.setattr(TeacherCache, "write", once)
    with pytest.raises(KeyboardInterrupt):
        taught_in(tmp_path, images, professor)
    monkeypatch.undo()
    cache, said = taught_in(tmp_path, images, professor)
    assert said[0] == "fold train: 2 images, 1 of them done before"
    assert said[-1] == "2 images done, 1 of them now"
    assert files_of(cache) == files_of(taught)


def harmed(shard: Path, how: str) -> None:
    content = bytearray(shard.read_bytes())
    if how == "missing":
        shard.unlink()
        return
    if how == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_corrupt_output_is_told_and_made_again(taught, images, professor, samples, tmp_path, how):
    cache = _copy(taught, tmp_path)
    whole = files_of(taught)
    path = cache.path / samples[0].image_sha256[:2] / f"{samples[0].image_sha256}.zarr"
    harmed(path / "c" / "0" / "0" / "0", how)
    with pytest.raises(InputError) as told:
        cache.logits(samples[0])
    assert str(told.value).startswith(f"{path}: corrupted (")
    assert str(told.value).endswith("; delete it and run `hover-batch kd teach` again")
    assert cache.logits(samples[1]).size
    again, said = taught_in(tmp_path, images, professor)
    assert said[0] == "fold train: 2 images, 1 of them done before"
    assert files_of(again) == whole


def _copy(cache: TeacherCache, folder: Path) -> TeacherCache:
    for name, content in files_of(cache).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return TeacherCache.open(folder)


def test_another_teacher_is_refused(taught, images, tmp_path):
    before = files_of(taught)
    with pytest.raises(InputError, match="outputs of another teacher, professor .*give another folder, or delete"):
        taught_in(taught.path, images, write_teacher(tmp_path / "other.safetensors", seed=1))
    assert files_of(taught) == before


def test_outputs_averaged_over_another_number_of_views_are_refused(taught, images, professor):
    before = files_of(taught)
    with pytest.raises(InputError, match="holds outputs with --tta 1, not 8; give another folder, or delete"):
        taught_in(taught.path, images, professor, tta=8)
    with pytest.raises(InputError, match="--tta 3: must be 1, or 8 for"):
        taught_in(taught.path, images, professor, tta=3)
    assert files_of(taught) == before


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        "[" * 100_000,
        '{"format": "another"}',
        '{"format": "hover-batch teacher cache 1"}',
        json.dumps({"format": "hover-batch teacher cache 1", "card": CARD.to_json(), "sha256": True}),
    ],
)
def test_what_is_no_cache_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "teacher.json").write_text(text)
    with pytest.raises(InputError, match=r"not a cache of a teacher.s outputs .*kd teach"):
        TeacherCache.open(tmp_path)


def test_an_image_that_was_not_taught(taught, samples):
    image = samples[0].image.copy()
    image[0, 0] ^= 1
    with pytest.raises(InputError, match="no output for the image image 0 of tnbc; run `hover-batch kd teach`"):
        taught.logits(Sample("image 0", "tnbc", "", image, samples[0].instances, None))


def test_two_runs_do_not_write_to_one_cache(images, professor, tmp_path):
    with locked(tmp_path / ".lock"), pytest.raises(InputError, match=r"-o .*: another run \(process .* is writing"):
        taught_in(tmp_path, images, professor)


def test_outputs_beyond_float16(professor, samples, tmp_path):
    cache = TeacherCache.create(tmp_path, find_package(str(professor)))
    logits = np.full((CHANNELS, *samples[1].image.shape[:2]), 1e6, np.float32)
    logits[0] = np.nan
    with pytest.raises(PackageError, match="professor: its output for the image image 1 is not finite"):
        cache.write(samples[1], logits)
    logits[0] = -1e6
    cache.write(samples[1], logits)
    assert set(np.unique(cache.logits(samples[1]))) == {-65504, 65504}


def run(*arguments: object):
    return CliRunner().invoke(kd_app, ["teach", *(str(a) for a in arguments)])


def test_the_command_goes_on_with_a_cache(taught, images, professor):
    before = files_of(taught)
    result = run(images, "--teacher", professor, "-o", taught.path, "--fold", "train", "--source", "tnbc")
    assert result.exit_code == 0, result.exception
    assert result.stdout.strip() == str(taught.path)
    assert "fold train: 2 images, 2 of them done before" in result.stderr
    assert files_of(taught) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--teacher", "hovernet.tar"],
            "--teacher hovernet.tar: no such package; .*`models import NAME` downloads published ones",
        ),
        (["--fold", "test"], "--fold test: .* has no image of this fold; give one of its folds, train, val"),
        (["--source", "consep"], "has no source consep; its sources are tnbc"),
        (["--batch", "0"], "--batch 0"),
        (["--cpus", "100000"], "--cpus 100000: only"),
    ],
)
def test_the_command_says_what_is_wrong(images, professor, tmp_path, arguments, message):
    result = run(images, "--teacher", professor, "-o", tmp_path / "cache", *arguments)
    assert isinstance(result.exception, InputError | PackageError)
    assert re.search(message, str(result.exception))


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (replace(CARD, mpp=0.5), "--teacher .*: is for pixels of 0.5 µm, but the annotated images have 0.25 µm"),
        (replace(CARD, taxonomy=PANNUKE), "--teacher .*: its classes are those of pannuke, .* those of consep-merged"),
    ],
)
def test_a_teacher_that_could_not_teach_is_told_before_it_does(images, professor, tmp_path, card, message):
    save_with_card(find_package(str(professor)), card, tmp_path / "other.safetensors")
    result = run(images, "--teacher", tmp_path / "other.safetensors", "-o", tmp_path / "cache")
    assert isinstance(result.exception, InputError) and re.search(message, str(result.exception))
    assert not (tmp_path / "cache").exists()


def test_a_checkpoint_that_is_no_package(images, tmp_path):
    (tmp_path / "hovernet.tar").write_bytes(b"x" * 100)
    result = run(images, "--teacher", tmp_path / "hovernet.tar", "-o", tmp_path / "cache")
    assert "`hover-batch models import` turns published checkpoints into packages" in str(result.exception)
    assert not (tmp_path / "cache").exists()
