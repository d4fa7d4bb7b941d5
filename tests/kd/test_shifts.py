"""Shifts of real tissue: what each changes and leaves unchanged, and how a collapse is detected."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console
from truth_maps import maps_of_truth

from hover_batch.taxonomy import CONSEP
from kd.commands.score_tables import shift_table
from kd.data.appearance import RGB_TO_HED
from kd.data.datasets import Data, Sample, read_data
from kd.evaluation.evaluate import evaluate, evaluate_data
from kd.evaluation.shift_scores import SCORES, score_shifts
from kd.evaluation.shifts import SHIFTS, UNCHANGED, Shift
from kd.training.validate import TYPICAL

BY_NAME = {shift.name: shift for shift in SHIFTS}


@pytest.fixture(scope="module")
def sample(data: Path) -> Sample:
    """A crop whose size is no multiple of anything."""
    tile = read_data(data / "nuclei", ["val"], ["consep"]).samples[2]
    part = slice(400, 641), slice(300, 503)
    crop = {name: np.ascontiguousarray(getattr(tile, name)[part]) for name in ("image", "instances", "types")}
    return replace(tile, **crop)


@pytest.mark.parametrize("shift", SHIFTS, ids=lambda shift: shift.name)
def test_a_shift_is_the_same_each_time_and_leaves_the_original(sample: Sample, shift: Shift) -> None:
    kept = sample.image.copy()
    one, two = shift.apply(sample), shift.apply(sample)
    assert one.image.dtype == np.uint8 and one.image.flags.c_contiguous
    assert (one.image == two.image).all() and (sample.image == kept).all()
    assert one.image.shape[:2] == one.instances.shape == one.types.shape
    if shift.mpp == UNCHANGED.mpp:
        assert (one.image != sample.image).mean() > 0.3
        assert one.instances is sample.instances and one.types is sample.types


def test_unchanged_is(sample: Sample) -> None:
    assert UNCHANGED.apply(sample).image is sample.image


def test_tone_and_sharpness(sample: Sample) -> None:
    grey = {name: shift.apply(sample).image.mean() for name, shift in BY_NAME.items()}
    assert grey["darker, gamma 2.5"] < grey["dark, gamma 1.6"] < sample.image.mean() < grey["light, gamma 0.6"]

    def sharpness(image: np.ndarray) -> float:
        return float(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())

    blurred = [sharpness(BY_NAME[f"blur {sigma} px"].apply(sample).image) for sigma in (2, 1)]
    assert blurred[0] < blurred[1] < sharpness(sample.image)


@pytest.mark.parametrize(
    ("name", "stain", "factor"), [("hematoxylin × 1.4", 0, 1.4), ("hematoxylin × 0.7", 0, 0.7), ("eosin × 1.5", 1, 1.5)]
)
def test_one_stain_changes_by_its_factor(sample: Sample, name: str, stain: int, factor: float) -> None:
    before, after = (-np.log((image.astype(np.float32) + 1) / 256) @ RGB_TO_HED for image in
                     (sample.image, BY_NAME[name].apply(sample).image))  # fmt: skip
    slope = (after * before).mean(axis=(0, 1)) / (before * before).mean(axis=(0, 1))
    expected = np.ones(2)
    expected[stain] = factor
    assert slope[:2] == pytest.approx(expected, abs=0.06)  # dark pixels are clipped


def test_jpeg_keeps_the_colours(sample: Sample) -> None:
    compressed = BY_NAME["JPEG quality 30"].apply(sample).image
    assert compressed.mean(axis=(0, 1)) == pytest.approx(sample.image.mean(axis=(0, 1)), abs=1.5)
    ok, written = cv2.imencode(".jpg", sample.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 30])
    assert ok and (cv2.imdecode(written, cv2.IMREAD_COLOR)[..., ::-1] == compressed).all()


@pytest.mark.parametrize(
    ("name", "size", "scale"), [("pixels of 0.20 µm", (301, 254), 1.25), ("pixels of 0.30 µm", (201, 169), 0.25 / 0.3)]
)
def test_labels_follow_another_pixel_size(sample: Sample, name: str, size: tuple[int, int], scale: float) -> None:
    ids = sample.instances % 251
    painted = replace(sample, image=np.repeat(ids.astype(np.uint8)[..., None], 3, axis=2))
    shifted = BY_NAME[name].apply(painted)
    assert shifted.instances.shape == size and shifted.instances.dtype == np.int32 and shifted.types.dtype == np.uint8
    areas, new = (np.bincount(s.instances.ravel()) for s in (sample, shifted))
    large = np.flatnonzero(areas > 300)[1:]
    assert len(large) > 10
    assert new[large] / areas[large] == pytest.approx(np.full(len(large), scale**2), rel=0.08)
    # Inside of nuclei the resampled image has the value of their id: both are resampled about the same centres.
    around = np.ones((7, 7), np.uint8)
    plain = shifted.instances.astype(np.float32)
    inside = (cv2.erode(plain, around) == cv2.dilate(plain, around)) & (shifted.instances > 0)
    assert inside.sum() > 1000
    assert (shifted.image[..., 0] == shifted.instances % 251)[inside].mean() > 0.999


def test_distances_are_in_the_pixels_of_the_shift(sample: Sample) -> None:
    """Nuclei 13 px (of 0.2 µm: 2.6 µm) off are found; those as many pixels off at 0.25 µm (3.25 µm) are not."""
    instances, types = np.zeros((2, 200, 200), np.int32)
    cv2.circle(instances, (80, 80), 12, 1, -1)
    types[instances > 0] = 2
    drawn = replace(sample, image=np.zeros((200, 200, 3), np.uint8), instances=instances, types=types.astype(np.uint8))

    def recall(shift: Shift) -> float:
        changed = shift.apply(drawn)
        moved = np.roll(changed.instances, 13, axis=1), np.roll(changed.types, 13, axis=1)
        (scores,) = evaluate(
            lambda image: maps_of_truth(*moved, len(CONSEP.classes)), [drawn], TYPICAL, CONSEP, shift=shift
        )
        return scores.recall

    assert (recall(BY_NAME["pixels of 0.20 µm"]), recall(UNCHANGED)) == (1, 0)


def test_every_shift_has_its_row_and_a_collapse_is_marked(sample: Sample) -> None:
    """A model that finds nothing in images that are too dark; a source that is outlined in part is left out."""
    crop = replace(sample, image=sample.image[:64, :64], instances=sample.instances[:64, :64].copy(), types=None)
    found = Data(CONSEP, [replace(crop, source="tnbc"), replace(crop, source="monusac")])
    brightness = crop.image.mean()

    def maps_of(image: np.ndarray) -> np.ndarray:
        dark = image.mean() < 0.75 * brightness
        truth = maps_of_truth(crop.instances, np.zeros((64, 64), np.uint8), len(CONSEP.classes))
        truth = truth if not dark else np.zeros_like(truth)
        return np.stack([cv2.resize(p, image.shape[1::-1], interpolation=cv2.INTER_NEAREST) for p in truth])

    def scores_of(data: Data, shift: Shift) -> list:
        assert {s.source for s in data.samples} == {"tnbc"}
        return evaluate_data(maps_of, data, TYPICAL, CONSEP, shift=shift)

    unchanged = evaluate_data(maps_of, found, TYPICAL, CONSEP)
    rows = score_shifts(scores_of, found, unchanged)
    assert [(row.source, row.shift) for row in rows] == [("tnbc", shift.name) for shift in SHIFTS]
    collapsed = {row.shift for row in rows if row.collapsed}
    assert "darker, gamma 2.5" in collapsed and "light, gamma 0.6" not in collapsed and "blur 1 px" not in collapsed
    for row in rows:
        for name in SCORES:
            assert row.changes[name] == row.scores[name] - getattr(unchanged[0], name)
    dark = next(row for row in rows if row.shift == "darker, gamma 2.5").to_json()
    assert dark["scores"]["pq"] == 0 and dark["changes"]["pq"] == -unchanged[0].pq and dark["collapsed"] is True

    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard", no_color=False)
    console.print(shift_table(rows, "made up"))
    lines = console.file.getvalue().splitlines()
    for shift in SHIFTS:
        (line,) = [line for line in lines if shift.name in line]
        assert ("◀" in line) == ("\x1b[1;31m" in line) == (shift.name in collapsed)
    assert "◀ PQ is at most half of that on unchanged images" in lines[-1]
