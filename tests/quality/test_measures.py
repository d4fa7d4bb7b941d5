"""Measures of pixels: a real field, and what scanners, pens and stains do to it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from hover_batch.model.heads import MapLayout
from hover_batch.quality.measures import sharpness
from hover_batch.quality.picture import picture_measures

Picture = NDArray[np.uint8]


@pytest.fixture(scope="module")
def field(data: Path) -> tuple[Picture, NDArray[np.bool_]]:
    """RGB (512, 512, 3) at 0.25 µm, and where the annotated nuclei and their rims are."""
    image = cv2.imread(str(data / "nuclei" / "images" / "tnbc_01_1.png"))[:, :, ::-1]
    labels = cv2.imread(str(data / "nuclei" / "labels" / "tnbc_01_1.png"), cv2.IMREAD_UNCHANGED)
    near = cv2.dilate((labels > 0).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    return np.ascontiguousarray(image, np.uint8), near


def hematoxylin(image: Picture) -> Picture:
    """The plane as a run stores it, but for where there are no nuclei."""
    import torch

    from hover_batch.model.predict import stain_density

    density = stain_density(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])[0, 0].numpy()
    return np.minimum(255, np.rint(density * MapLayout.OD_SCALE)).astype(np.uint8)


def test_blur_lowers_the_sharpness_whatever_the_contrast(field: tuple[Picture, NDArray[np.bool_]]) -> None:
    image, near = field
    plane = np.where(near, hematoxylin(image), 0).astype(np.uint8)
    sharp = sharpness(plane, near)
    assert sharp is not None and sharp > 1.5
    darker = sharpness(np.minimum(255, plane.astype(np.int64) * 2).astype(np.uint8), near)
    assert darker == pytest.approx(sharp, rel=0.03)
    values = []
    for sigma in (1, 2, 4, 8):
        blurred = np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.uint8)
        values.append(sharpness(np.where(near, hematoxylin(blurred), 0).astype(np.uint8), near))
    assert sharp > values[0] > values[1] > values[2] and max(values[2:]) < 1.0
    assert sharpness(plane, np.zeros_like(near)) is None


def test_a_20x_scan_counts_as_sharp(field: tuple[Picture, NDArray[np.bool_]]) -> None:
    image, near = field
    small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    shown = np.asarray(cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR), np.uint8)
    value = sharpness(np.where(near, hematoxylin(shown), 0).astype(np.uint8), near)
    assert value is not None and value > 1.0


@pytest.mark.parametrize(
    ("color", "found"),
    [
        ((20, 40, 160), True),
        ((20, 120, 60), True),
        ((210, 25, 35), True),
        ((20, 20, 25), True),
        ((110, 60, 140), False),
    ],
)
def test_pens_are_not_stains(
    field: tuple[Picture, NDArray[np.bool_]], color: tuple[int, int, int], found: bool
) -> None:
    image, _ = field
    assert picture_measures(image, 0.25)["ink"] == 0
    drawn = image.copy()
    cv2.line(drawn, (0, 100), (511, 300), color, 60)
    assert (picture_measures(drawn, 0.25)["ink"] > 0.05) == found


def test_brown_and_grey(field: tuple[Picture, NDArray[np.bool_]]) -> None:
    image, _ = field
    good = picture_measures(image, 0.25)
    assert good["brown"] < 0.1 and good["chroma"] > 20 and good["dark"] > 0.1
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :256, 0] = 20
    assert picture_measures(np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), np.uint8), 0.25)["brown"] > 0.3
    grey = np.asarray(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), np.uint8)
    assert picture_measures(grey, 0.25)["chroma"] == 0


def test_a_small_biopsy_on_much_glass_is_not_grey(field: tuple[Picture, NDArray[np.bool_]]) -> None:
    slide = np.full((1500, 4400, 3), 245, np.uint8)
    slide[500:1000, 500:1000] = field[0][:500, :500]
    assert picture_measures(slide, 0.25)["chroma"] > 20


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("side", [1, 100])
def test_pictures_of_nothing(value: int, side: int) -> None:
    measures = picture_measures(np.full((side, side, 3), value, np.uint8), 0.25)
    assert measures == {"ink": 0.0, "brown": 0.0, "chroma": 0.0, "dark": float(value == 0)}
