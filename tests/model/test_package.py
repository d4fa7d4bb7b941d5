"""Packages load as saved; invalid ones are refused with a reason."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hover_batch.commands.models import describe
from hover_batch.errors import PackageError
from hover_batch.model.architectures.unet import StudentArch, build_student
from hover_batch.model.card import Card
from hover_batch.model.hub_card import hub_card
from hover_batch.model.package import CARD_KEY, find_package, load_network, save_package, save_with_card, tensors_sha256
from hover_batch.taxonomy import CONSEP, PANNUKE

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


def test_a_saved_package_loads_with_its_card(saved: Path) -> None:
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


def test_a_package_has_the_permissions_of_the_umask(saved: Path, tmp_path: Path) -> None:
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
            "the card's training is",
        ),
        (
            {CARD_KEY: json.dumps(CARD.to_json() | {"sobel": {**CARD.sobel, "h_min": 2.0}})},
            "a minimum is above its maximum",
        ),
        ({CARD_KEY: json.dumps(CARD.to_json() | {"metrics": {"val": {"pq": float("nan")}}})}, "metrics .* not finite"),
        ({CARD_KEY: json.dumps(CARD.to_json() | {"metrics": {"a": [[float("inf")]]}})}, "metrics .* not finite"),
    ],
)
def test_files_without_a_usable_card_are_refused(tmp_path: Path, metadata: dict[str, str] | None, message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(PackageError, match=message):
        find_package(str(path))


def test_a_card_that_does_not_fit_the_weights_is_refused_with_the_reason(saved: Path, tmp_path: Path) -> None:
    package, changed = find_package(str(saved)), tmp_path / "changed.safetensors"
    for changes, message in (({"tile_in": 100}, "multiple of 32"), ({"taxonomy": PANNUKE}, "size mismatch")):
        save_with_card(package, dataclasses.replace(package.card, **changes), changed)  # type: ignore[arg-type]
        with pytest.raises(PackageError, match=message):
            load_network(find_package(str(changed)))


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(PackageError, match="not a safetensors file"):
        find_package(str(path))


def test_a_missing_package_names_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="starter"):
        find_package(str(tmp_path / "none"))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths, of keys and indices, to all parts of a JSON value."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in entries:
        yield from _paths(held, (*path, key))


CARD_JSON = {
    **dataclasses.replace(CARD, weights_sha256="0" * 64).to_json(),
    "training": {"data": {"train": {"consep": {"images": 3}}}, "source": {"file": "a", "sha256": "0"}, "seen": ""},
    "metrics": {"calibration": {"cut": 0.05}, "test": {"consep": {"pq": 0.5}}},
}
HUGE_CLASSES = [{"id": i, "name": str(i), "color": [0, 0, 0]} for i in range(5000)]
ODD = st.one_of(
    st.sampled_from(
        [HUGE_CLASSES, HUGE_CLASSES[:250], 10**30, -1, float("nan"), float("inf"), "", "\x1b[31m", "x" * 9999]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(list(_paths(CARD_JSON))), odd=ODD, remove=st.booleans())
def test_an_odd_card_is_refused_or_read_as_written(tmp_path: Path, path: Any, odd: Any, remove: bool) -> None:
    held = copy.deepcopy(CARD_JSON)
    *way, last = path
    parent: Any = held
    for key in way:
        parent = parent[key]
    if remove:
        del parent[last]
    else:
        parent[last] = odd
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata={CARD_KEY: json.dumps(held)})
    try:
        package = find_package(str(file))
    except PackageError as error:
        assert len(str(error)) < 1000 and "\x1b" not in str(error)
        return
    card = package.card
    assert 0 < card.mpp <= 100 and card.layout.planes < 300 and card.margin >= 0
    assert all(math.isfinite(value) for value in card.sobel.values()) and len(card.sobel) == 4
    assert all("\x1b" not in line and "\n" not in line for line in describe(card))
    assert hub_card(package)
    assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card or held != CARD_JSON
    with pytest.raises(PackageError):  # the one tensor is nobody's
        load_network(package)


@pytest.mark.parametrize(
    ("tensors", "changes"),
    [
        ({"a": torch.zeros(1, dtype=torch.bfloat16)}, {}),
        ({"a": torch.zeros(1)}, {"encoder": "resnet_of_nobody"}),
        ({"a": torch.zeros(1)}, {"encoder": "tu-nobody"}),
        ({"a": torch.zeros(1)}, {"architecture": "gan"}),
        ({"a": torch.zeros(1)}, {"architecture": "hovernet-fast"}),
        ({"decoder.np.u3.conva.weight": torch.zeros(())}, {"architecture": "hovernet-fast"}),
        (
            {"decoder.np.u3.conva.weight": torch.zeros(3), "conv0.bn.bias": torch.zeros(())},
            {"architecture": "hovernet-fast"},
        ),
        (
            {"decoder.np.u3.conva.weight": torch.zeros(3, 3), "conv0.bn.bias": torch.zeros(0)},
            {"architecture": "hovernet-fast"},
        ),
    ],
)
def test_odd_weights_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], changes: dict[str, str]) -> None:
    digest = "" if tensors.get("a", torch.zeros(1)).dtype == torch.bfloat16 else tensors_sha256(tensors)
    card = dataclasses.replace(CARD, weights_sha256=digest, **changes)  # type: ignore[arg-type]
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={CARD_KEY: json.dumps(card.to_json())})
    with pytest.raises(PackageError):
        load_network(find_package(str(file)))


def test_an_encoder_that_would_be_downloaded_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    card = dataclasses.replace(CARD, encoder="tu-hf-hub:somebody/net")
    save_file({"a": torch.zeros(1)}, file, metadata={CARD_KEY: json.dumps(card.to_json())})
    with pytest.raises(PackageError, match="must be a name"):
        find_package(str(file))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])  # 1e6 is beyond float16, in which students are stored
def test_weights_that_are_not_finite_are_refused(saved: Path, tmp_path: Path, value: float) -> None:
    network = load_network(find_package(str(saved)))
    name, weight = next(iter(network.state_dict().items()))
    weight.view(-1)[0] = value
    save_package(tmp_path / "odd.safetensors", network, CARD)
    with pytest.raises(PackageError, match=f"{name} holds values that are not finite"):
        load_network(find_package(str(tmp_path / "odd.safetensors")))
