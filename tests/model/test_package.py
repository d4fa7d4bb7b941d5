"""Packages: what is saved loads again; what does not fit is refused with a reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hover_batch.errors import PackageError
from hover_batch.model.package import CARD_KEY, Card, find_package, load_network, save_package
from hover_batch.model.student import StudentArch, build_student
from hover_batch.taxonomy import CONSEP

CARD = Card(
    name="tiny",
    architecture="unet",
    encoder="mit_b0",
    taxonomy=CONSEP,
    mpp=0.25,
    tile_in=128,
    tile_out=64,
    sobel={"h_min": -1.0, "h_max": 1.0, "v_min": -1.0, "v_max": 1.0},
    licence="test",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("package") / "tiny.safetensors"
    save_package(path, build_student(StudentArch("mit_b0", len(CONSEP.classes))), CARD)
    return path


def test_what_was_saved_loads_with_its_card(saved: Path) -> None:
    package = find_package(str(saved))
    assert dataclasses.replace(package.card, weights_sha256="") == CARD
    weights = load_network(package).state_dict()
    tensors = load_file(saved)
    assert weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(weights[name], tensor.to(weights[name].dtype))


def test_a_folder_with_one_package_is_a_package(saved: Path) -> None:
    assert find_package(str(saved.parent)).sha256 == find_package(str(saved)).sha256


def test_other_weights_under_the_same_card_are_refused(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved)
    name = next(n for n, t in tensors.items() if t.is_floating_point())
    tensors[name] = tensors[name] + 1
    from safetensors import safe_open

    with safe_open(saved, framework="np") as f:
        metadata = f.metadata()
    changed = tmp_path / "changed.safetensors"
    save_file(tensors, changed, metadata=metadata)
    with pytest.raises(PackageError, match="do not match their card"):
        load_network(find_package(str(changed)))


def test_a_package_is_for_all_whom_the_umask_lets_read(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert saved.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no hover-batch card"),
        ({CARD_KEY: "{"}, "cannot be read"),
        ({CARD_KEY: "{}"}, "another version"),
        (
            {CARD_KEY: json.dumps(find_package("starter").card.to_json() | {"training": []})},
            r"cannot be read \(training is no object\)",
        ),
    ],
)
def test_files_without_a_usable_card_are_refused(tmp_path: Path, metadata: dict[str, str] | None, message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(PackageError, match=message):
        find_package(str(path))


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(PackageError, match="not a safetensors file"):
        find_package(str(path))


def test_a_missing_package_names_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="starter"):
        find_package(str(tmp_path / "none"))
