"""The search for the Sobel constants, on maps made from real annotations by blurring and noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from hover_batch.errors import InputError
from hover_batch.metrics import panoptic_quality
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.watershed import SobelConstants, instance_map
from hover_batch.taxonomy import CONSEP
from kd.calibrate import calibrate, scaled
from kd.datasets import Sample, read_instance_folder
from kd.targets import hv_targets

LAYOUT = MapLayout(len(CONSEP.classes))
SCALES = (1.0, 0.3, 0.1)


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
        for sample in read_instance_folder(data / "nuclei", "val", [source])[:2]:
            part = replace(sample, image=sample.image[:300, :300], instances=sample.instances[:300, :300].copy())
            pairs.append((part, blurred_maps(part, len(pairs))))
    return pairs


def run(pairs, scales=SCALES):
    queue = [maps for _, maps in pairs]
    return calibrate(lambda image: queue.pop(0), [s for s, _ in pairs], scales)


def test_the_best_scale_of_the_medians_is_chosen(predicted):
    found = run(predicted)
    windows = [SobelConstants.of_window(maps[LAYOUT.H], maps[LAYOUT.V]) for _, maps in predicted]
    trials = {t.scale: t for t in found.trials if t.norm == "fixed"}
    assert set(trials) == set(SCALES)
    assert trials[found.scale].mean == max(t.mean for t in trials.values())
    for name in ("h_min", "h_max", "v_min", "v_max"):
        median = np.median([getattr(w, name) for w in windows])
        assert getattr(found.constants, name) == pytest.approx(found.scale * median)


def test_a_trial_says_the_mean_over_images_by_source_and_over_sources(predicted):
    found = run(predicted)
    chosen = next(t for t in found.trials if t.scale == found.scale)
    window = next(t for t in found.trials if t.norm == "window")
    for trial, constants in ((chosen, found.constants), (window, None)):
        by_source: dict[str, list[float]] = {}
        for sample, maps in predicted:
            instances = instance_map(maps[LAYOUT.NP], maps[LAYOUT.H], maps[LAYOUT.V], constants)
            by_source.setdefault(sample.source, []).append(panoptic_quality(sample.instances, instances).pq)
        assert trial.pq == pytest.approx({s: np.mean(v) for s, v in by_source.items()})
        assert trial.mean == pytest.approx(np.mean(list(trial.pq.values())))
        assert 0.3 < trial.mean < 1


def test_the_constants_matter(predicted):
    means = [t.mean for t in run(predicted).trials]
    assert len(set(means)) > 1


def test_at_equal_quality_the_larger_scale(predicted):
    """One lone disc: every scale finds it."""
    instances = np.zeros((80, 80), np.int32)
    cv2.circle(instances, (40, 40), 10, 1, -1)
    sample = Sample("disc", "consep", "", np.zeros((80, 80, 3), np.uint8), instances, None)
    maps = np.zeros((LAYOUT.planes, 80, 80), np.uint8)
    maps[LAYOUT.NP] = instances * 255
    maps[LAYOUT.H : LAYOUT.V + 1] = np.round(127 * hv_targets(instances)).astype(np.int8).view(np.uint8)
    found = run([(sample, maps)], (0.2, 1.0, 0.5))
    assert {t.mean for t in found.trials} == {1.0}
    assert found.scale == 1.0


def test_scaled():
    got = scaled(SobelConstants(h_min=-4, h_max=3, v_min=-2, v_max=1), 0.5)
    assert got == SobelConstants(h_min=-2, h_max=1.5, v_min=-1, v_max=0.5)


def test_the_search_goes_into_the_card_as_json(predicted):
    data = run(predicted).to_json()
    assert data["scale"] in SCALES
    assert [t["scale"] for t in data["trials"]] == [None, 1.0, 0.3, 0.1]
    assert set(data["trials"][0]["pq"]) == {"consep", "tnbc"}


def test_without_any_nucleus_nothing_can_be_calibrated():
    empty = Sample("empty", "consep", "", np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.int32), None)
    with pytest.raises(InputError, match="needs annotated nuclei"):
        run([(empty, np.zeros((LAYOUT.planes, 64, 64), np.uint8))])
