"""Picture of images, annotations and predictions, checked pixel by pixel where possible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from truth_maps import maps_of_truth

from hover_batch.taxonomy import CONSEP, PANNUKE
from kd.data.datasets import Data, Sample, read_data
from kd.evaluation.figure import SCALE, SIDE, Shown, figure, fullest
from kd.panels import GAP, UNTYPED
from kd.training.validate import TYPICAL


@pytest.fixture(scope="module")
def tile(data: Path) -> Sample:
    sample = read_data(data / "nuclei", ["val"], ["consep"]).samples[2]
    part = slice(300, 700), slice(500, 900)
    arrays = {name: np.ascontiguousarray(getattr(sample, name)[part]) for name in ("image", "instances", "types")}
    return replace(sample, **arrays)


def knowing(sample: Sample, name: str, types: np.ndarray | None = None) -> Shown:
    of = CONSEP if types is None else PANNUKE
    maps = maps_of_truth(sample.instances, sample.types if types is None else types, len(of.classes))
    return Shown(name, lambda image: maps, TYPICAL, of)


def cells(picture: np.ndarray, columns: int) -> list[np.ndarray]:
    """Those of the last row, which the key of one line follows."""
    side = SIDE * SCALE
    bottom = len(picture) - 22 - GAP
    return [
        picture[bottom - side : bottom, i * (side + GAP) : i * (side + GAP) + side].astype(int) for i in range(columns)
    ]


def test_image_truth_teacher_student(tile: Sample) -> None:
    picture = figure(Data(CONSEP, [tile]), [knowing(tile, "teacher"), knowing(tile, "student")])
    image, truth, teacher, student = cells(picture, 4)
    assert (teacher == student).all()
    drawn = (truth != image).any(axis=2)
    colors = {tuple(color) for color in truth[drawn].tolist()}
    part = slice(72, 328), slice(72, 328)
    present = set(np.unique(tile.types[part])) - {0}
    assert colors == {c.color for c in CONSEP.nuclei if c.id in present} and len(present) > 1
    # outlines are on nuclei, two pixels of the enlarged image wide where two touch, and thin
    inside = (tile.instances[part] > 0).repeat(SCALE, 0).repeat(SCALE, 1)
    assert inside[drawn].all() and drawn.sum() < inside.sum() / 3
    # who knows the truth draws it, but for pixels that post-processing gives to a neighbour
    assert ((teacher != truth).any(axis=2)).mean() < 0.01
    key = picture[-22:]
    for c in CONSEP.nuclei:
        assert (key == c.color).all(axis=2).sum() == 14 * 14


def test_a_model_of_other_classes_is_shown_in_those_in_common(tile: Sample) -> None:
    as_pannuke = np.array([0, 4, 2, 1, 3], np.uint8)[tile.types]
    image, truth, shown = cells(figure(Data(CONSEP, [tile]), [knowing(tile, "other", as_pannuke)]), 3)
    assert ((shown != truth).any(axis=2)).mean() < 0.01
    spindle = next(c.color for c in CONSEP.nuclei if c.name == "spindle")
    assert not (truth == spindle).all(axis=2).any()


def test_without_types_outlines_have_one_colour_and_small_images_a_white_rest(tile: Sample) -> None:
    small = replace(tile, types=None, image=tile.image[:100, :120], instances=tile.instances[:100, :120])
    typed = replace(tile, image=tile.image[:100, :120], instances=small.instances, types=tile.types[:100, :120])
    image, truth, shown = cells(figure(Data(CONSEP, [small]), [knowing(typed, "student")]), 3)
    for cell in (truth, shown):
        drawn = (cell != image).any(axis=2)
        assert {tuple(color) for color in cell[drawn].tolist()} == {UNTYPED}
    assert (image[:, 120 * SCALE + 4 :] == 255).all() and (image[100 * SCALE + 4 :] == 255).all()


def test_the_fullest_of_each_source_in_turn() -> None:
    def sample(name: str, n: int) -> Sample:
        instances = np.zeros((300, 300), np.int32)
        instances[100, 100 : 100 + n] = range(1, n + 1)
        instances[0, :50] = range(101, 151)  # outside the part that is shown
        return Sample(name, name[0], "", np.zeros((300, 300, 3), np.uint8), instances, None)

    samples = [sample("a1", 3), sample("a2", 9), sample("a3", 5), sample("b1", 1), sample("b2", 2)]
    assert [s.id for s in fullest(samples, 4)] == ["a2", "b2", "a3", "b1"]
