"""Scores of synthetic predictions with known scores, and of the annotations themselves turned into maps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from truth_maps import maps_of_truth

import kd.training.validate
from hover_batch.errors import InputError
from hover_batch.model.architectures.hovernet import TeacherArch
from hover_batch.model.card import Card
from hover_batch.model.heads import HV, NP, Heads, MapLayout
from hover_batch.model.images import predict_image
from hover_batch.taxonomy import CONSEP
from kd.data.datasets import Sample, read_data
from kd.evaluation.evaluate import centroids_and_types, evaluate
from kd.training.targets import hv_targets
from kd.training.validate import TYPICAL, validate

LAYOUT = MapLayout(len(CONSEP.classes))
CARD = Card(
    name="fake",
    architecture="unet",
    encoder="mit_b0",
    taxonomy=CONSEP,
    mpp=0.25,
    tile_in=96,
    tile_out=64,
    sobel={},
    licence="",
)


class Shifted:
    """In place of a predictor: the planes show the red channel where it is, and moved by the margin each way."""

    card = CARD
    batch = 5

    def __init__(self):
        self.sizes = []

    def predict(self, tiles):
        assert tiles.shape[1:] == (96, 96, 3) and tiles.dtype == np.uint8
        self.sizes.append(len(tiles))
        red = tiles[..., 0]
        maps = np.zeros((len(tiles), LAYOUT.planes, 64, 64), np.uint8)
        maps[:, 0] = red[:, 16:80, 16:80]
        maps[:, 1] = red[:, :64, :64]
        maps[:, 2] = red[:, 32:, 32:]
        return maps


@pytest.mark.parametrize("shape", [(200, 150), (64, 128), (40, 70)])
def test_a_whole_image_is_cut_and_assembled(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    predictor = Shifted()
    maps = predict_image(predictor, image)
    assert maps.shape == (LAYOUT.planes, *shape)
    assert (maps[0] == image[..., 0]).all()
    height, width = shape
    assert (maps[1][16:, 16:] == image[:-16, :-16, 0]).all()
    assert (maps[2][:-16, :-16] == image[16:, 16:, 0]).all()
    # beyond the border the image is mirrored about its outermost pixels
    assert (maps[1][0] == image[16, np.abs(np.arange(width) - 16), 0]).all()
    mirrored = np.minimum(np.arange(width) + 16, 2 * (width - 1) - np.arange(width) - 16)
    assert (maps[2][-1] == image[height - 17, mirrored, 0]).all()
    assert max(predictor.sizes) <= 5 and sum(predictor.sizes) == -(-height // 64) * -(-width // 64)


def discs(centres, kinds, source="consep", typed=True, side=160) -> Sample:
    instances, types = np.zeros((side, side), np.int32), np.zeros((side, side), np.uint8)
    for i, (centre, kind) in enumerate(zip(centres, kinds, strict=True), start=1):
        cv2.circle(instances, centre, 10, 3 * i, -1)
        cv2.circle(types, centre, 10, kind, -1)
    image = np.zeros((side, side, 3), np.uint8)
    return Sample("made-up", source, "", image, instances, types if typed else None)


def predictions(*pairs):
    """Samples and a `maps_of` that returns, for each sample in turn, the perfect maps of its partner."""
    queue = [maps_of_truth(p.instances, p.types, LAYOUT.n_types) for _, p in pairs]
    return [s for s, _ in pairs], lambda image: queue.pop(0)


PLACES = [(20, 20), (60, 20), (100, 20), (20, 70), (60, 70)]
KINDS = [1, 2, 3, 3, 2]


def test_a_perfect_prediction():
    true = discs(PLACES, KINDS)
    samples, maps_of = predictions((true, true))
    (scores,) = evaluate(maps_of, samples, TYPICAL, CONSEP)
    assert (scores.source, scores.images, scores.nuclei, scores.predicted) == ("consep", 1, 5, 5)
    assert (scores.dice, scores.aji, scores.dq, scores.sq, scores.pq) == (1, 1, 1, 1, 1)
    assert (scores.bpq, scores.mpq, scores.f_d, scores.precision, scores.recall, scores.type_accuracy) == (1,) * 6
    assert [scores.pq_c[n] for n in ("miscellaneous", "inflammatory", "epithelial")] == [1, 1, 1]
    assert math.isnan(scores.pq_c["spindle"])
    assert [scores.f_c[n] for n in ("miscellaneous", "inflammatory", "epithelial")] == [1, 1, 1]
    assert math.isnan(scores.f_c["spindle"])
    plain = scores.to_json()
    assert plain["f_c"]["spindle"] is None and plain["pq"] == 1
    json.dumps(plain, allow_nan=False)


def test_too_many_nuclei_for_the_pairing_are_refused_before_memory_is(monkeypatch):
    monkeypatch.setattr("kd.evaluation.evaluate.MOST_DISTANCES", 24)
    true = discs(PLACES, KINDS)
    samples, maps_of = predictions((true, true))
    with pytest.raises(InputError, match="5 annotated nuclei and 5 predicted ones are too many"):
        evaluate(maps_of, samples, TYPICAL, CONSEP)


def test_scores_by_hand():
    """First image: one missed, one of another type, one moved beyond the radius. Second: all right."""
    true = discs(PLACES, KINDS)
    pred = discs([(20, 20), (60, 20), (100, 33), (20, 70)], [1, 3, 3, 3])
    small = discs([(80, 80)], [2])
    samples, maps_of = predictions((true, pred), (small, small))
    (scores,) = evaluate(maps_of, samples, TYPICAL, CONSEP)
    # 3 of 5 true and 4 predicted are pairs: DQ = 3 / (3 + 1/2 + 2/2)
    assert scores.dq == pytest.approx((3 / 4.5 + 1) / 2)
    assert scores.sq == 1
    area = int((small.instances > 0).sum())
    shared = int(((true.instances > 0) & (pred.instances > 0)).sum())
    assert scores.dice == pytest.approx((2 * shared / (9 * area) + 1) / 2)
    # 4 of 6 true and 5 predicted centroids pair over both images
    assert (scores.nuclei, scores.predicted) == (6, 5)
    assert (scores.precision, scores.recall) == pytest.approx((4 / 5, 4 / 6))
    assert scores.f_d == pytest.approx(8 / 11)
    assert scores.type_accuracy == pytest.approx(3 / 4)
    # inflammatory: one right, one taken for epithelial, one missed; epithelial: one right, one wrong, one each alone
    assert scores.f_c["inflammatory"] == pytest.approx(2 / (2 + 2 + 1))
    assert scores.f_c["epithelial"] == pytest.approx(2 / (2 + 2 + 1 + 1))


def test_sources_apart_and_types_only_where_annotated():
    typed, untyped = discs(PLACES, KINDS), discs(PLACES, KINDS, source="tnbc", typed=False)
    samples, maps_of = predictions((typed, typed), (untyped, typed))
    consep, tnbc = evaluate(maps_of, samples, TYPICAL, CONSEP)
    assert (consep.source, tnbc.source) == ("consep", "tnbc")
    assert tnbc.f_d == 1 and tnbc.f_c == {} and math.isnan(tnbc.type_accuracy)


def test_an_image_without_nuclei_does_not_count_in_means_unless_some_are_predicted():
    full, empty = discs(PLACES, KINDS), discs([], [])
    samples, maps_of = predictions((full, full), (empty, empty))
    (scores,) = evaluate(maps_of, samples, TYPICAL, CONSEP)
    assert (scores.images, scores.pq, scores.dice) == (2, 1, 1)
    samples, maps_of = predictions((full, full), (empty, full))
    (scores,) = evaluate(maps_of, samples, TYPICAL, CONSEP)
    assert (scores.pq, scores.dice, scores.aji) == (0.5, 0.5, 0.5)


def test_nuclei_below_the_minimum_area_are_not_found():
    true = discs(PLACES, KINDS)
    area = int((true.instances == 3).sum())
    for least, found in ((area, 5), (area + 1, 0)):
        samples, maps_of = predictions((true, true))
        (scores,) = evaluate(maps_of, samples, TYPICAL, CONSEP, min_area_px=least)
        assert (scores.nuclei, scores.predicted, scores.recall) == (5, found, found / 5)


def test_where_only_some_nuclei_are_outlined_recall_and_types_remain():
    """One of four outlined nuclei is missed, another's type wrong; two that are found are not outlined."""
    outlined = discs(PLACES[:4], KINDS[:4], source="monusac")
    found = discs([*PLACES[1:], (110, 110), (140, 140)], [3, *KINDS[2:], 1, 1])
    samples, maps_of = predictions((outlined, found))
    (scores,) = evaluate(maps_of, samples, TYPICAL, CONSEP)
    assert (scores.recall, scores.type_accuracy) == pytest.approx((3 / 4, 2 / 3))
    assert (scores.images, scores.nuclei, scores.pq_c, scores.f_c, scores.by_tissue) == (1, 4, {}, {}, {})
    plain = scores.to_json()
    undefined = {name for name, value in plain.items() if value is None}
    assert undefined == {"dice", "aji", "dq", "sq", "pq", "bpq", "mpq", "f_d", "precision"}
    (row,) = scores.images_to_json()
    assert (row["nuclei"], row["pq"], row["dice"], row["f_d"]) == (4, None, None, None)


def test_the_scores_of_each_image():
    true, half = discs(PLACES, KINDS), discs(PLACES[:1], KINDS[:1])
    samples, maps_of = predictions((true, true), (replace(true, id="other"), half))
    (scores,) = evaluate(maps_of, samples, TYPICAL, CONSEP)
    first, second = scores.images_to_json()
    assert first == {"id": "made-up", "sha256": true.image_sha256, "nuclei": 5, "pq": 1, "dice": 1, "f_d": 1}
    assert (second["id"], second["pq"], second["f_d"]) == ("other", pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert scores.pq == pytest.approx((first["pq"] + second["pq"]) / 2)
    assert "by_image" not in scores.to_json()


def test_centroids_and_types_one_by_one(data: Path):
    sample = read_data(data / "nuclei", ["val"], ["consep"]).samples[0]
    xy, types = centroids_and_types(sample, LAYOUT.n_types)
    ids = np.unique(sample.instances)[1:]
    assert xy.shape == (len(ids), 2)
    for row in range(0, len(ids), 25):
        ys, xs = np.nonzero(sample.instances == ids[row])
        assert xy[row] == pytest.approx((xs.mean() + 0.5, ys.mean() + 0.5))
        assert types[row] == np.bincount(sample.types[ys, xs]).argmax() > 0
    untyped_xy, untyped = centroids_and_types(replace(sample, types=None), LAYOUT.n_types)
    assert (untyped_xy == xy).all() and not untyped.any()


def test_the_truth_as_maps_comes_back_on_real_tiles(data: Path):
    """What post-processing alone costs: nuclei that touch or have odd shapes; it costs less with constants."""
    tiles = read_data(data / "nuclei", ["val"], ["consep"]).samples
    pq = {}
    for constants in (TYPICAL, None):
        samples, maps_of = predictions(*((tile, tile) for tile in tiles))
        (scores,) = evaluate(maps_of, samples, constants, CONSEP)
        assert (scores.images, scores.nuclei) == (4, 2167)
        assert scores.dice > 0.99
        assert scores.f_d > 0.95
        assert scores.type_accuracy > 0.99
        pq[constants] = scores.pq
    assert pq[TYPICAL] > pq[None] > 0.92


class Reader(nn.Module):
    """A network that reads its answer off the image: red is the nucleus, green and blue are h and v; one class."""

    def forward(self, image):
        output = torch.zeros(len(image), Heads(LAYOUT.n_types).channels, *image.shape[2:], device=image.device)
        output[:, NP.start + 1] = 40 * (image[:, 0] - 0.5)
        output[:, HV] = (image[:, 1:] - 0.5) * 2
        output[:, Heads(LAYOUT.n_types).tp.start + 2] = 9
        return output


def drawn(sample: Sample) -> Sample:
    hv = (np.round(hv_targets(sample.instances) * 127.5 + 127.5)).astype(np.uint8)
    red = np.where(sample.instances > 0, 255, 0).astype(np.uint8)
    return replace(sample, image=np.stack([red, *hv], axis=2))


def test_validation_of_a_network_that_knows():
    typed = drawn(discs(PLACES, [2] * 5))
    untyped = drawn(discs(PLACES, KINDS, source="tnbc", typed=False, side=200))
    row = validate(Reader(), [typed, untyped], torch.device("cpu"), CONSEP)
    assert set(row) == {
        *(f"val_{name}_{source}" for name in ("pq", "dice", "f_d") for source in ("consep", "tnbc")),
        "val_f_c_consep",
    }
    assert all(value == 1 for value in row.values())


def test_validation_of_a_source_that_outlines_some_nuclei_is_of_recall():
    outlined = drawn(discs(PLACES, [2] * 5, source="monusac"))
    assert validate(Reader(), [outlined], torch.device("cpu"), CONSEP) == {"val_recall_monusac": 1}


def test_validation_looks_at_the_centre():
    """A disc at the corner of a large image is left out; the one in its middle is found at its place."""
    large = drawn(discs([(12, 12), (350, 352)], [2, 2], side=700))
    blind = replace(large, image=large.image.copy())
    blind.image[:40, :40] = (0, 128, 128)
    for sample in (large, blind):
        assert validate(Reader(), [sample], torch.device("cpu"), CONSEP)["val_pq_consep"] == 1


class Tight(Reader):
    """As a HoVerNet, it takes certain sides only, and its output is narrower."""

    def __init__(self, form):
        super().__init__()
        self.arch = TeacherArch(form, LAYOUT.n_types)

    def forward(self, image):
        assert all(side % 8 == self.arch.excess for side in image.shape[2:])
        cut = self.arch.shrink // 2
        return super().forward(image[..., cut:-cut, cut:-cut])


@pytest.mark.parametrize("form", ["fast", "original"])
def test_validation_of_a_teacher_that_knows(form, monkeypatch):
    monkeypatch.setattr(kd.training.validate, "HoVerNet", Tight)
    row = validate(Tight(form), [drawn(discs(PLACES, [2] * 5, side=200))], torch.device("cpu"), CONSEP)
    assert row["val_pq_consep"] == row["val_f_d_consep"] == 1
