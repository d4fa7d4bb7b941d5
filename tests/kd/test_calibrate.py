"""Search for the Sobel constants, on maps made from real annotations with blur and noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from training_folder import write_folder
from typer.testing import CliRunner

from hover_batch.errors import InputError
from hover_batch.metrics import panoptic_quality
from hover_batch.model.heads import MapLayout
from hover_batch.model.package import find_package, save_with_card
from hover_batch.nuclei.components import without_debris
from hover_batch.nuclei.markers import MARKER_ENERGY
from hover_batch.nuclei.watershed import SobelConstants, instance_map
from hover_batch.taxonomy import CONSEP
from kd.cli import kd_app
from kd.data.datasets import Sample, read_data
from kd.evaluation.calibrate import (
    CUTS,
    F_D_MARGIN,
    OTHERS,
    Calibration,
    Trial,
    calibrate,
    constants_at,
    trial,
    try_others,
)
from kd.training.targets import hv_targets

pytestmark = pytest.mark.usefixtures("by_torch")

LAYOUT = MapLayout(len(CONSEP.classes))


def blurred_maps(sample: Sample, seed: int) -> np.ndarray:
    """The truth as an unsure network would see it."""
    rng = np.random.default_rng(seed)
    maps = np.zeros((LAYOUT.planes, *sample.instances.shape), np.uint8)
    nucleus = cv2.GaussianBlur((sample.instances > 0).astype(np.float32), (0, 0), 2)
    maps[LAYOUT.NP] = np.minimum(255, np.floor(256 * nucleus))
    for plane, truth in zip((LAYOUT.H, LAYOUT.V), hv_targets(sample.instances), strict=True):
        noise = cv2.GaussianBlur(rng.normal(0, 2, truth.shape).astype(np.float32), (0, 0), 2)
        value = cv2.GaussianBlur(truth, (0, 0), 3) + noise
        maps[plane] = np.round(127 * np.clip(value, -1, 1)).astype(np.int8).view(np.uint8)
    return maps


@pytest.fixture(scope="module")
def predicted(data: Path):
    """Crops of two sources with their maps."""
    pairs = []
    for source in ("consep", "tnbc"):
        for sample in read_data(data / "nuclei", ["val"], [source]).samples[:2]:
            part = replace(sample, image=sample.image[:300, :300], instances=sample.instances[:300, :300].copy())
            pairs.append((part, blurred_maps(part, len(pairs))))
    return pairs


def run(pairs, cuts=CUTS):
    queue = [maps for _, maps in pairs]
    return calibrate(lambda image: queue.pop(0), [s for s, _ in pairs], cuts)


def test_the_best_pq_among_the_cuts_that_find_as_many(predicted):
    found = run(predicted)
    fixed = {t.cut: t for t in found.trials if t.norm == "fixed"}
    assert set(fixed) == set(CUTS)
    able = [t for t in fixed.values() if t.mean_f_d >= max(t.mean_f_d for t in fixed.values()) - F_D_MARGIN]
    assert fixed[found.cut] in able
    assert fixed[found.cut].mean_pq == max(t.mean_pq for t in able)
    windows = [SobelConstants.of_window(maps[LAYOUT.H], maps[LAYOUT.V]) for _, maps in predicted]
    for name in ("h_min", "h_max", "v_min", "v_max"):
        assert getattr(found.medians, name) == np.median([getattr(w, name) for w in windows])
    assert found.constants == constants_at(found.medians, found.cut)


def test_counts_go_before_pq():
    """Merging touching pairs may raise PQ, never by more than a little of F_d."""
    instances = np.zeros((64, 600), np.int32)
    for k in range(10):
        cv2.ellipse(instances, (30 + 58 * k, 32), (14, 10), 0, 0, 360, (k + 1,), -1)
    sample = Sample("row", "consep", "", np.zeros((64, 600, 3), np.uint8), instances, None)
    found = run([(sample, blurred_maps(sample, 0))])
    chosen = next(t for t in found.trials if t.cut == found.cut)
    assert chosen.f_d["consep"] >= max(t.f_d["consep"] for t in found.trials if t.norm == "fixed") - F_D_MARGIN


def test_a_trial_says_pq_f_d_and_counts_by_source(predicted):
    found = run(predicted)
    chosen = next(t for t in found.trials if t.cut == found.cut)
    window = next(t for t in found.trials if t.norm == "window")
    for found_by, constants in ((chosen, found.constants), (window, None)):
        pq: dict[str, list[float]] = {}
        counts: dict[str, list[int]] = {}
        for sample, maps in predicted:
            instances = instance_map(maps[LAYOUT.NP], maps[LAYOUT.H], maps[LAYOUT.V], constants)
            instances = without_debris(instances, 64)
            pq.setdefault(sample.source, []).append(panoptic_quality(sample.instances, instances).pq)
            counts.setdefault(sample.source, []).append(
                instances.max() / len(np.unique(sample.instances[sample.instances > 0]))
            )
        assert found_by.pq == pytest.approx({s: np.mean(v) for s, v in pq.items()})
        assert found_by.mean_pq == pytest.approx(np.mean(list(found_by.pq.values())))
        assert 0.3 < found_by.mean_pq < 1
        for source, ratios in counts.items():
            assert min(ratios) <= found_by.count[source] <= max(ratios)
            assert 0.3 < found_by.f_d[source] <= 1


def test_a_higher_cut_divides_less():
    """Two touching discs: only a fall as deep as their seam divides them at last."""
    instances = np.zeros((80, 100), np.int32)
    cv2.circle(instances, (35, 40), 14, 1, -1)
    cv2.circle(instances, (64, 40), 14, 2, -1)
    sample = Sample("pair", "consep", "", np.zeros((80, 100, 3), np.uint8), instances, None)
    counts = {t.cut: t.count["consep"] for t in run([(sample, blurred_maps(sample, 0))], (0.0, 0.95)).trials}
    assert counts[0.0] == 1.0
    assert counts[0.95] == 0.5


def test_at_equal_quality_the_lower_cut():
    """One lone disc: every cut finds it."""
    sample, maps = disc()
    found = run([(sample, maps)], (0.05, 0.0, 0.1))
    assert {t.mean_pq for t in found.trials} == {1.0}
    assert found.cut == 0.0


@pytest.mark.parametrize("cut", [-0.1, 0.0, 0.1])
def test_constants_at_a_cut(cut):
    """The marker threshold lies at the cut; the extremes are as far apart as before."""
    medians = SobelConstants(h_min=-4, h_max=3, v_min=-2, v_max=1)
    got = constants_at(medians, cut)
    assert got.h_max - got.h_min == pytest.approx(7)
    assert got.v_max - got.v_min == pytest.approx(3)
    assert got.h_min + (1 - MARKER_ENERGY) * 7 == pytest.approx(cut * -4)
    assert got.v_min + (1 - MARKER_ENERGY) * 3 == pytest.approx(cut * -2)


def test_the_search_goes_into_the_card_as_json(predicted):
    data = run(predicted, (0.0, 0.1)).to_json()
    assert data["cut"] in (0.0, 0.1)
    assert [t["cut"] for t in data["trials"]] == [None, 0.0, 0.1]
    assert set(data["trials"][0]["pq"]) == {"consep", "tnbc"}


def test_undefined_scores_go_into_the_card_as_null():
    """A card with NaN is refused when the package is read."""
    same = SobelConstants(-1.0, 1.0, -1.0, 1.0)
    found = Calibration(same, 0.1, same, (Trial("fixed", 0.1, {"a": 0.5}, {"a": float("nan")}, {"a": float("nan")}),))
    assert found.to_json()["trials"][0]["f_d"] == {"a": None}


def test_other_numbers_are_tried_at_the_same_cut(predicted):
    some = [(s, np.ascontiguousarray(maps[:3])) for s, maps in predicted[:1]]
    found = try_others(some, 0.05)
    assert len(found) == len(OTHERS) + 1
    alike = trial(some, 0.05, constants_at(SobelConstants.of_window(*some[0][1][1:]), 0.05))
    assert found["as they are"].mean_pq == pytest.approx(alike.mean_pq, abs=0.01)  # nested components, image borders
    assert found["nucleus 0.6"].mean_pq != found["nucleus 0.4"].mean_pq


def test_without_any_nucleus_nothing_can_be_calibrated():
    empty = Sample("empty", "consep", "", np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.int32), None)
    with pytest.raises(InputError, match="needs annotated nuclei"):
        run([(empty, np.zeros((LAYOUT.planes, 64, 64), np.uint8))])


def disc() -> tuple[Sample, np.ndarray]:
    instances = np.zeros((80, 80), np.int32)
    cv2.circle(instances, (40, 40), 10, 1, -1)
    sample = Sample("disc", "consep", "", np.zeros((80, 80, 3), np.uint8), instances, None)
    maps = np.zeros((LAYOUT.planes, 80, 80), np.uint8)
    maps[LAYOUT.NP] = instances * 255
    maps[LAYOUT.H : LAYOUT.V + 1] = np.round(127 * hv_targets(instances)).astype(np.int8).view(np.uint8)
    return sample, maps


def test_the_command_gives_a_package_other_constants_and_the_same_weights(tmp_path):
    starter, out = find_package("starter"), tmp_path / "mine.safetensors"
    data = ["--data", write_folder(tmp_path), "--source", "tnbc", "--check", "train", "--threads", 1]

    def run(model: object, out: Path):
        return CliRunner().invoke(kd_app, ["calibrate", *map(str, [model, *data, "-o", out])])

    result = run("starter", out)
    assert result.exit_code == 0, result.exception
    assert str(out) in result.stdout and "the same, on train" in result.stdout and "sobel 15: PQ" in result.stdout
    mine = find_package(str(out)).card
    assert (mine.name, mine.weights_sha256) == ("mine", starter.card.weights_sha256)
    assert mine.sobel == SobelConstants.from_json(mine.sobel).to_json() != starter.card.sobel
    assert mine.metrics["calibration"]["data"]["tnbc"]["images"] == 1

    other = tmp_path / "other.safetensors"
    save_with_card(starter, replace(starter.card, mpp=0.5), other)
    assert f"package {other}: is for pixels of 0.5 µm" in str(run(other, out).exception)
    data[data.index("--check") + 1] = "val"
    assert "--check val: is the fold of the search" in str(run("starter", out).exception)
    data[data.index("--check") + 1] = "test"
    result = run("starter", out)
    assert "note: --check test: " in result.stderr and ": worth a search" not in result.stdout
    assert f"-o {tmp_path}: the name of a package must end in .safetensors" in str(run("starter", tmp_path).exception)
