"""From a checkpoint to a working package: students and teachers, with and without images to calibrate on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from training_folder import Knows, write_folder

import kd.package
import kd.training.train
from hover_batch.config import InferSettings
from hover_batch.errors import InputError, PackageError
from hover_batch.model.package import find_package, load_network
from hover_batch.model.predict import Predictor, load_predictor
from hover_batch.taxonomy import CONSEP
from kd.commands.package import package as package_command
from kd.data.datasets import Sample, read_data
from kd.package import NOT_CALIBRATED, _licence, _note, make_package
from kd.training.config import TrainConfig
from kd.training.mean import read_checkpoints
from kd.training.train import train

pytestmark = pytest.mark.usefixtures("by_torch")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = write_folder(tmp_path_factory.mktemp("folder"))
    common = {"size": 64, "batch": 2, "steps": 1, "epoch_steps": 1, "threads": 1}
    return TrainConfig(data=folder, out=tmp_path_factory.mktemp("out"), **common)


class Recorded(Predictor):
    """Records the batch size of each predictor."""

    batches: ClassVar[list[int]] = []

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches.append(self.batch)


@pytest.fixture(scope="module")
def package(config):
    """Of a distilled student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd.training.train, "open_teacher", lambda path, taxonomy: Knows())
        train(replace(config, teacher=Path("taught"), alpha=0.5))
        patch.setattr(kd.package, "Predictor", Recorded)
        lines = make_package([config.out / "checkpoint.pt"], config.data, config.out / "student.safetensors", threads=1)
    return find_package(str(config.out / "student.safetensors")), lines


def test_a_batch_has_no_more_tiles_than_an_image(package):
    """Short batches are padded, so that each patch of one tile would be computed eight times."""
    assert Recorded.batches == [1]


def test_the_card_says_what_was_seen_and_what_was_learnt_from(package, config):
    found, lines = package
    training = found.card.training
    assert "val consep: PQ" in lines and "calibration" not in lines
    assert (found.card.architecture, found.card.encoder, found.card.tile_in) == ("unet", "mit_b0", 320)
    for part in ("train", "val"):
        samples: list[Sample] = read_data(config.data, [part]).samples
        assert training["saw"][part] == sorted(s.image_sha256[:16] for s in samples)
        assert training["data"][part]["consep"]["images"] == sum(s.source == "consep" for s in samples)
    assert found.card.metrics["calibration"]["saw"] == training["saw"]["val"]
    assert training["teacher"] == {"sha256": "0123", "tta": 1, **Knows.card}
    settings = training["settings"]
    assert (settings["preset"], settings["alpha"], settings["temperature"]) == ("quick", 0.5, 1)
    assert found.card.licence == (
        "CC BY-NC-SA 4.0, research only: trained on CoNSeP and TNBC; distilled from knows (none)"
    )
    assert "TNBC has no types, so the type branch saw CoNSeP alone." in training["note"]
    assert training["note"].endswith("The class spindle was learnt from CoNSeP (colon).")


def test_the_weights_are_those_of_the_checkpoint_in_float16(package, config):
    shipped = torch.load(config.out / "checkpoint.pt", weights_only=True)["shipped"]
    for name, tensor in load_network(package[0]).state_dict().items():
        expected = shipped[name].half().float() if tensor.is_floating_point() else shipped[name]
        assert torch.equal(tensor, expected), name


@pytest.fixture(scope="module")
def two(package, config, tmp_path_factory) -> list[Path]:
    """Two checkpoints, as of trainings with the same --init, whose weights differ by 0.5."""
    saved = torch.load(config.out / "checkpoint.pt", weights_only=True)
    saved = {name: saved[name] for name in ("config", "record", "shipped", "step")}
    folder = tmp_path_factory.mktemp("two")
    for seed in (7, 8):
        settings = saved["config"] | {"init": "first.safetensors", "seed": seed}
        shipped = {n: t + (seed - 7) / 2 if t.is_floating_point() else t for n, t in saved["shipped"].items()}
        torch.save(saved | {"config": settings, "shipped": shipped}, folder / f"{seed}.pt")
    return [folder / "7.pt", folder / "8.pt"]


def test_several_checkpoints_give_the_mean_of_their_weights(two, config, tmp_path, by_default):
    make_package(two, config.data, tmp_path / "mean.safetensors", threads=1)
    found = find_package(str(tmp_path / "mean.safetensors"))
    a, b = (torch.load(path, weights_only=True)["shipped"] for path in two)
    for name, tensor in load_network(found).state_dict().items():
        mean = (a[name].double() + b[name].double()) / 2
        assert torch.equal(tensor, mean.float().half().float() if tensor.is_floating_point() else a[name]), name
    training = found.card.training
    assert [(t["steps"], t["settings"]["seed"]) for t in training["mean_of"]] == [(1, 7), (1, 8)]
    assert training["note"].startswith("The weights are the mean of those of 2 trainings. ")


def test_what_cannot_be_averaged_is_refused(two, config, tmp_path):
    saved = torch.load(two[1], weights_only=True)
    other = tmp_path / "other.pt"
    settings, record, shipped = saved["config"] | {"seed": 9}, saved["record"], saved["shipped"]
    name = "segmentation_head.0.bias"
    bias = shipped[name]
    for changed, message in (
        ({"config": saved["config"]}, r"is the same training as .*8\.pt; give each checkpoint once"),
        ({"config": settings | {"model": "dist"}}, r"has a different network from .*7\.pt"),
        ({"shipped": shipped | {name: bias[:1]}}, "has a different network"),
        ({"shipped": {n: t for n, t in shipped.items() if n != name}}, "has a different network"),
        ({"shipped": shipped | {name: bias + torch.nan}}, f"{name} holds values that are not finite"),
        ({"shipped": None}, "its weights do not fit its settings; leave it out"),
        ({"config": []}, "its weights do not fit its settings"),
        ({"record": record | {"before": {"sha256": "another"}}}, r"differs from .*7\.pt in its initial weights"),
        ({"record": record | {"teacher": None}}, "in its teacher"),
        ({"record": record | {"truth_sha256": {}}}, "in its annotations or their order"),
        ({"record": record | {"saw": {}}}, "in its images"),
        ({"record": {}}, "its weights do not fit its settings"),
    ):
        torch.save(saved | {"config": settings} | changed, other)
        with pytest.raises(InputError, match=rf"other\.pt: .*{message}"):
            read_checkpoints([*two, other])
    # Without --init, all began with different random weights.
    torch.save(saved | {"config": settings | {"init": None}}, other)
    torch.save(saved | {"config": settings | {"init": None, "seed": 1}}, tmp_path / "first.pt")
    with pytest.raises(InputError, match=r"first\.pt: was trained without --init"):
        read_checkpoints([tmp_path / "first.pt", other])
    with pytest.raises(InputError, match=r"two.*: is a folder; give its checkpoint\.pt"):
        read_checkpoints([two[0], two[0].parent])
    two[1].rename(given := two[1].with_suffix(".safetensors"))
    with pytest.raises(InputError, match=r"-o .*8\.safetensors: is .*8\.safetensors, which must not change"):
        package_command([two[0], given], config.data, given)


def test_a_trained_teacher_becomes_a_package_that_predicts(config, tmp_path):
    small = replace(config, model="hovernet-fast", width=8, size=128, val_folds=("test",), out=tmp_path)
    train(small)
    lines = make_package([tmp_path / "checkpoint.pt"], config.data, tmp_path / "teacher.safetensors", threads=1)
    assert f"calibration: {NOT_CALIBRATED}" in lines
    found = find_package(str(tmp_path / "teacher.safetensors"))
    assert (found.card.architecture, found.card.encoder) == ("hovernet-fast", "")
    assert (found.card.tile_in, found.card.tile_out) == (352, 256)
    assert found.card.sobel == find_package("starter").card.sobel
    assert found.card.metrics["calibration"] == NOT_CALIBRATED
    shipped = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["shipped"]
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in load_network(found).state_dict().items())
    maps = load_predictor(found, InferSettings(threads=1, batch=1)).predict(np.zeros((1, 352, 352, 3), np.uint8))
    assert maps.shape == (1, found.card.layout.planes, 256, 256)


def test_sources_that_are_not_known_leave_the_licence_to_their_own():
    assert _licence({"ours": {}, "consep": {}}) == (
        "as its data's: trained on consep and ours; see their licences before giving it away"
    )
    known = {"consep": {}, "monuseg": {}, "tnbc": {}}
    assert _licence(known) == "CC BY-NC-SA 4.0, research only: trained on CoNSeP, MoNuSeg and TNBC"
    free = _licence({"tnbc": {}, "dsb2018": {}})
    assert free == "CC BY 4.0: trained on DSB 2018 and TNBC"
    assert _licence({"tnbc": {}, "dsb2018": {}}, before={"licence": free}) == free
    assert _licence({"tnbc": {}}, before={"licence": free}) == (
        f"CC BY 4.0: trained on TNBC; started from weights with the licence: {free}"
    )
    starter = find_package("starter").card.licence
    assert _licence({"tnbc": {}}, before={"licence": starter}) == (
        f"CC BY-NC-SA 4.0, research only: trained on TNBC; started from weights with the licence: {starter}"
    )


def test_annotations_without_types_train_one_class(config, tmp_path, by_default):
    train(replace(config, sources={"tnbc": 1.0}, out=tmp_path))
    make_package([tmp_path / "checkpoint.pt"], config.data, tmp_path / "open.safetensors", threads=1)
    card = find_package(str(tmp_path / "open.safetensors")).card
    assert [c.name for c in card.taxonomy.nuclei] == ["nucleus"]
    assert card.licence == "CC BY 4.0: trained on TNBC"
    assert card.metrics["val"]["tnbc"]["pq"] is not None
    # These weights can be trained further, on such annotations, too.
    further = replace(config, sources={"tnbc": 1.0}, out=tmp_path / "further", init=tmp_path / "open.safetensors")
    train(replace(further, max_steps=1))


def test_the_note_says_which_source_taught_a_class():
    note = _note({"consep": {"typed": 18}, "monusac": {"typed": 26}}, CONSEP)
    assert "The class miscellaneous was learnt from CoNSeP (colon)." in note
    assert (
        "The class epithelial was learnt from CoNSeP (colon) and MoNuSAC (kidney, lung, prostate and breast)." in note
    )


def test_what_is_no_checkpoint_is_refused(package, config, tmp_path):
    with pytest.raises(InputError, match="no such checkpoint"):
        make_package([tmp_path / "checkpoint.pt"], config.data, tmp_path / "a.safetensors")
    torch.save({"config": {}, "step": 3}, tmp_path / "old.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for other in (tmp_path / "text.pt", config.out / "student.safetensors"):
        with pytest.raises(InputError, match="not a checkpoint of `hover-batch kd train`"):
            make_package([other], config.data, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="-o .*: the name of a package must end in .safetensors"):
        package_command([config.out / "checkpoint.pt"], config.data, tmp_path / "folder")
    with pytest.raises(InputError, match="-o /proc/a/b.safetensors: .*; give a file in a folder that can be written"):
        package_command([config.out / "checkpoint.pt"], config.data, Path("/proc/a/b.safetensors"))
    with pytest.raises(InputError, match="older version"):
        make_package([tmp_path / "old.pt"], config.data, tmp_path / "a.safetensors")
    flipped = bytearray((config.out / "checkpoint.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    with pytest.raises(InputError, match=r"flipped\.pt: not a checkpoint .*, or corrupted"):
        make_package([tmp_path / "flipped.pt"], config.data, tmp_path / "a.safetensors")
    saved = torch.load(config.out / "checkpoint.pt", weights_only=True)
    torch.save(saved | {"config": saved["config"] | {"model": "hovernet-fast"}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: weights do not fit the settings"):
        make_package([tmp_path / "other.pt"], config.data, tmp_path / "a.safetensors")
    for changed in ({"taxonomy": 5}, {"saw": []}, {"data": {"train": None}}, {"before": [1]}):
        torch.save(saved | {"record": saved["record"] | changed}, tmp_path / "other.pt")
        with pytest.raises(InputError, match=r"other\.pt: weights do not fit the settings"):
            make_package([tmp_path / "other.pt"], config.data, tmp_path / "a.safetensors")
    (tmp_path / "data").mkdir()
    other_data = write_folder(tmp_path / "data", seed=5)
    with pytest.raises(
        InputError, match="--data .*data: differs from the validation images or annotations of .*checkpoint.pt"
    ):
        make_package([config.out / "checkpoint.pt"], other_data, tmp_path / "a.safetensors")
    saved["shipped"]["segmentation_head.0.bias"][0] = 1e6
    torch.save(saved, tmp_path / "large.pt")
    with pytest.raises(PackageError, match="too large for float16"):
        make_package([tmp_path / "large.pt"], config.data, tmp_path / "a.safetensors")
