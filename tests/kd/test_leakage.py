"""Leakage between a card and images: by pixels, by patients, by names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hover_batch.errors import PackageError
from hover_batch.model.card import Card
from hover_batch.model.package import find_package
from hover_batch.model.published import KINDS
from hover_batch.taxonomy import CONSEP
from kd.data.datasets import Sample, read_data
from kd.data.samples import hashes_of
from kd.evaluation.leakage import leaks


def card(training: dict[str, Any], metrics: dict[str, Any] | None = None) -> Card:
    return Card(
        name="made up",
        architecture="unet",
        encoder="mit_b0",
        taxonomy=CONSEP,
        mpp=0.25,
        tile_in=320,
        tile_out=256,
        sobel={},
        licence="",
        training=training,
        metrics=metrics or {},
    )


def image(name: str, source: str = "pannuke", fold: str = "test", group: str = "") -> Sample:
    pixels = np.full((8, 8, 3), sum(name.encode()) % 256, np.uint8)
    return Sample(name, source, group, pixels, np.zeros((8, 8), np.int32), None, fold=fold)


A, B, C = image("a"), image("b"), image("c")


def saw(**folds: list[Sample]) -> dict[str, Any]:
    return {"saw": {fold: hashes_of(samples) for fold, samples in folds.items()}}


def told(training: dict[str, Any], *samples: Sample, **more: Any) -> list[tuple[bool, str, tuple[str, ...]]]:
    return [(leak.certain, leak.how, leak.samples) for leak in leaks(card(training, **more), samples)]


def test_nothing_seen_nothing_said() -> None:
    assert told({}, A, B) == []
    assert told(saw(train=[C]), A, B) == []


@pytest.mark.parametrize(
    "training", [{"saw": 5}, {"saw": {"train": 5}}, {"saw_groups": 3}, {"data": [1]}, {"teacher": 5}, {"seen": 7}]
)
def test_a_malformed_record_does_not_pass_for_nothing_seen(training: dict[str, Any]) -> None:
    with pytest.raises(PackageError, match="package made up: its card does not say which images it has seen"):
        told(training, A)


def test_images_are_known_by_their_pixels_whatever_they_are_called() -> None:
    renamed = replace(A, id="z", source="mine", fold="3")
    assert told(saw(train=[A], val=[B]), renamed, B, C) == [
        (True, "the model was trained on them", ("z",)),
        (True, "the model was chosen on them", ("b",)),
    ]


def test_what_came_before_and_the_teachers_count() -> None:
    grown = saw(train=[C]) | {
        "before": {"before": saw(train=[A])},
        "teacher": {"name": "t", "sha256": "0", "training": saw(val=[B]) | {"teacher": {"training": saw(train=[A])}}},
    }
    assert told(grown, A, B) == [
        (True, "what the model started from was trained on them", ("a",)),
        (True, "the teacher was chosen on them", ("b",)),
        (True, "the teacher's teacher was trained on them", ("a",)),
    ]


def test_other_images_of_a_patient() -> None:
    training = saw(train=[A]) | {"saw_groups": {"train": ["tnbc/7"]}}
    same, other, alien = (image(n, s, group="7") for n, s in (("d", "tnbc"), ("e", "tnbc"), ("f", "monuseg")))
    other = replace(other, group="8")
    assert told(training, same, other, alien) == [
        (True, "the model was trained on other images of their patients", ("d",))
    ]
    # an image that was seen itself is told of once
    seen_itself = replace(A, source="tnbc", group="7")
    assert told(training, seen_itself) == [(True, "the model was trained on them", ("a",))]


def test_a_published_teacher_that_has_seen_all_of_pannuke() -> None:
    published = {"seen": KINDS["hovernet_fast-pannuke"].seen}
    ((certain, how, samples),) = told({"teacher": {"training": published}}, A, image("d", "consep"))
    assert certain and samples == ("a",)
    assert how.startswith("the teacher has seen: PanNuke") and "issue 275" in how
    ((certain, _, samples),) = told({"seen": KINDS["hover-unet-pannuke"].seen}, A)
    assert certain and samples == ("a",)
    ((certain, _, samples),) = told({"seen": KINDS["hovernet_original-consep"].seen}, A, image("d", "consep"))
    assert not certain and samples == ("d",)  # of CoNSeP it has seen a part
    ((certain, _, samples),) = told({"seen": KINDS["hovernet_original-kumar"].seen}, A, image("d", "monuseg"))
    assert not certain and samples == ("d",)  # MoNuSeg has Kumar's images


def test_constants_that_were_found_on_the_images() -> None:
    """By their pixels, whatever their fold is called; in older cards by their names."""
    metrics: dict[str, Any] = {"calibration": {"saw": hashes_of([A, B]), "data": {"pannuke": {"images": 2}}}}
    second, third = replace(A, fold="2"), image("c", fold="val")
    assert told({}, second, third, metrics=metrics) == [
        (True, "the model's Sobel constants were chosen on them", ("a",))
    ]
    assert told(saw(val=[A]), second, third, metrics=metrics) == [(True, "the model was chosen on them", ("a",))]
    metrics = {"calibration": {"data": {"tnbc": {"images": 1}}}}
    found = told({}, image("d", "tnbc", "val"), image("e", "tnbc", "test"), metrics=metrics)
    assert [samples for _, _, samples in found] == [("d",)]
    assert "Sobel constants" in found[0][1]


@pytest.mark.parametrize(("fold", "how"), [("train", "trained on"), ("val", "chosen on")])
def test_the_starter_on_what_it_has_seen(data: Path, fold: str, how: str) -> None:
    samples = read_data(data / "nuclei", [fold], ["tnbc"]).samples
    (leak,) = leaks(find_package("starter").card, samples)
    assert leak.certain and leak.of == len(leak.samples) == len(samples)
    assert str(leak) == f"tnbc, {leak.of} of {leak.of} images: the model was {how} them"


@pytest.mark.parametrize(("fold", "how"), [("train", "trained on"), ("val", "chosen on")])
def test_older_cards_tell_by_name(fold: str, how: str) -> None:
    training = {"data": {part: {"tnbc": {"images": 1}} for part in ("train", "val", "test")}}
    ((certain, said, samples),) = told(training, image("d", "tnbc", fold), image("e", "monuseg", fold))
    assert (certain, samples) == (True, ("d",))
    assert said == f"the model was {how} the {fold} images of this source, by their names"


def test_the_starter_on_the_test_split(data: Path) -> None:
    """CoNSeP is split by tile: the patients may be the same. TNBC is split by patient."""
    (leak,) = leaks(find_package("starter").card, read_data(data / "nuclei", ["test"], ["consep", "tnbc"]).samples)
    assert (leak.source, leak.certain, leak.mark, leak.of) == ("consep", False, "‡", 5)
    assert "patients" in leak.how
    assert leak.to_json()["samples"] == list(leak.samples)
