"""Class weights follow one formula, which matches the constants of HoVer-UNet's released code."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from kd.data.datasets import Sample
from kd.training.class_weights import FILE, by_rarity, class_weights


def sample(name: str, types, typed=True) -> Sample:
    types = np.array(types, np.uint8)
    image = np.full((*types.shape, 3), len(name), np.uint8)
    return Sample(name, "consep", "", image, (types > 0).astype(np.int32), types if typed else None)


class Counted:
    """A teacher that says of every pixel that it is a nucleus of class 2, and counts how often it is asked."""

    sha256 = "ab"
    tta = 1

    def __init__(self):
        self.asked = 0

    def logits(self, sample):
        self.asked += 1
        output = np.zeros((4 + 3, *sample.instances.shape), np.float16)
        output[1] = output[6] = 5
        return output


def test_by_hand():
    # shares 16/21, 4/21, 1/21 → 1/√f as 1 : 2 : 4, with the sum 3
    assert by_rarity(np.array([16, 4, 1])) == pytest.approx([3 / 7, 6 / 7, 12 / 7])


def test_equal_shares_weigh_1_and_absent_classes_take_no_part():
    assert by_rarity(np.array([5, 5, 5])) == pytest.approx([1, 1, 1])
    assert by_rarity(np.array([16, 0, 4])) == pytest.approx([2 / 3, 1, 4 / 3])


@pytest.mark.parametrize(
    ("nuclei", "types", "abs_"),
    [
        ((0.6186, 1.3814), (0.1065, 0.3310, 0.7301, 0.5030, 3.7113, 0.6179), 2e-3),
        ((0.6055, 1.3945), (0.1214, 0.3586, 0.9628, 0.6344, 3.1919, 0.7309), 2e-2),
    ],
)
def test_the_released_literals_fit_the_formula(nuclei, types, abs_):
    """The shares that the weights of types imply give the weights of np. (Those of the teacher's pixels were counted by
    two branches, which need not agree.)"""
    shares = np.array(types) ** -2.0
    shares /= shares.sum()
    pixels = np.rint(1e9 * shares).astype(np.int64)
    assert by_rarity(pixels) == pytest.approx(types, abs=1e-3)
    assert by_rarity(np.array([pixels[0], pixels[1:].sum()])) == pytest.approx(nuclei, abs=abs_)


def test_types_are_counted_where_they_are_annotated(tmp_path):
    samples = [sample("a", [[0, 0, 1, 2]]), sample("bb", [[1, 1, 1, 1]], typed=False)]
    weights = class_weights(samples, 3, None, tmp_path)
    assert set(weights) == {"annotated"}
    assert weights["annotated"]["np"] == pytest.approx(by_rarity(np.array([2, 6])))
    assert weights["annotated"]["tp"] == pytest.approx(by_rarity(np.array([2, 1, 1])))


def test_nuclei_without_a_class_count_nowhere(tmp_path):
    nameless = replace(sample("a", [[0, 0, 1, 2, 0, 0]]), instances=np.array([[0, 0, 1, 2, 3, 3]], np.int32))
    weights = class_weights([nameless], 3, None, tmp_path)["annotated"]
    assert weights["np"] == pytest.approx(by_rarity(np.array([2, 4])))
    assert weights["tp"] == pytest.approx(by_rarity(np.array([2, 1, 1])))


def test_a_kill_while_they_are_kept_costs_nothing(tmp_path, monkeypatch):
    samples = [sample("a", [[0, 0, 1, 2]])]
    monkeypatch.setattr("hover_batch.files.os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        class_weights(samples, 3, None, tmp_path)
    assert not (tmp_path / FILE).exists()


def test_a_teacher_is_asked_once_until_the_data_change(tmp_path):
    teacher, samples = Counted(), [sample("a", [[0, 0, 1, 2]])]
    weights = class_weights(samples, 3, teacher, tmp_path)
    assert weights["taught"] == {"np": [1, 1], "tp": [1, 1, 1]}  # one class alone: nothing to weigh
    assert (
        class_weights(samples, 3, teacher, tmp_path) == weights == json.loads((tmp_path / FILE).read_text())["weights"]
    )
    assert teacher.asked == 1
    changed = [sample("a", [[0, 1, 1, 2]])]
    class_weights(changed, 3, teacher, tmp_path)
    assert teacher.asked == 2
    teacher.tta = 8  # the same network, averaged over turns and flips, gives other outputs
    class_weights(changed, 3, teacher, tmp_path)
    assert teacher.asked == 3
    (tmp_path / FILE).write_text("{")
    assert class_weights(changed, 3, teacher, tmp_path) == json.loads((tmp_path / FILE).read_text())["weights"]
    assert teacher.asked == 4
