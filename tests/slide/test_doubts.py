"""Warnings about pixels that contradict each other, on a real slide's field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from hover_batch.cohort.record import SlideRecord
from hover_batch.config import TissueSettings
from hover_batch.slide.doubts import doubts_of_levels, share_on_tissue
from hover_batch.slide.reader import open_slide
from hover_batch.slide.tissue import TissueMask

Picture = NDArray[np.uint8]


@pytest.fixture(scope="module")
def field(data: Path) -> Picture:
    """1536 × 1500 pixels of a slide, RGB (y, x, 3) uint8."""
    with open_slide(SlideRecord("s", data / "slides" / "CMU-1-Small-Region.svs", 2)) as reader:
        return reader.source.read(0, reader.info.level0.box)[600:2100, 400:1936]  # type: ignore[attr-defined]


def reduced(picture: Picture, factor: float, interpolation: int = cv2.INTER_AREA) -> Picture:
    size = round(picture.shape[1] / factor), round(picture.shape[0] / factor)
    return np.asarray(cv2.resize(picture, size, interpolation=interpolation), np.uint8)


def doubts(path: Path, *levels: Picture) -> list[str]:
    with tifffile.TiffWriter(path) as file:
        for number, pixels in enumerate(levels):
            file.write(
                pixels,
                tile=(256, 256),
                photometric="rgb",
                compression="deflate",
                subfiletype=int(number > 0),
                resolution=(20_000, 20_000),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    with open_slide(SlideRecord("s", path, 2)) as reader:
        assert len(reader.info.downsamples) == len(levels)
        return doubts_of_levels(reader)


AREA, NEAREST, CUBIC = cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_CUBIC
QUICK = [((2, 4), AREA), ((4, 16), NEAREST), ((3,), CUBIC), ((1.4, 2.9), NEAREST), ((32,), CUBIC)]


@pytest.mark.parametrize(
    ("factors", "interpolation"),
    [
        pytest.param(factors, how, marks=[] if (factors, how) in QUICK else pytest.mark.slow)
        for factors, _ in QUICK
        for how in (AREA, NEAREST, CUBIC)
    ],
)
def test_levels_however_they_were_reduced_raise_no_doubt(
    field: Picture, tmp_path: Path, factors: tuple[float, ...], interpolation: int
) -> None:
    levels = [reduced(field, factor, interpolation) for factor in factors]
    assert doubts(tmp_path / "s.tif", field, *levels) == []


def test_brighter_blurred_and_compressed_levels_raise_no_doubt(field: Picture, tmp_path: Path) -> None:
    level = cv2.convertScaleAbs(cv2.GaussianBlur(reduced(field, 4), (5, 5), 0), alpha=0.9, beta=20)
    _, coded = cv2.imencode(".jpg", level, [cv2.IMWRITE_JPEG_QUALITY, 20])
    assert doubts(tmp_path / "s.tif", field, np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)) == []


CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "mirrored": lambda level: level[:, ::-1],
    "upside down": lambda level: level[::-1],
    "shifted": lambda level: np.roll(level, (60, 90), (0, 1)),
    "inverted": lambda level: 255 - level,
    "black": np.zeros_like,
    "white": lambda level: np.full_like(level, 255),
}


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        pytest.param(name, factor, marks=[] if (factor == 4) == (number > 2) else pytest.mark.slow)
        for number, name in enumerate(CHANGES)
        for factor in (2, 4, 16)
    ],
)
def test_a_level_that_shows_something_else_is_named(field: Picture, tmp_path: Path, name: str, factor: int) -> None:
    level = CHANGES[name](reduced(field, factor))
    [doubt] = doubts(tmp_path / "s.tif", field, np.ascontiguousarray(level))
    assert f"level of 1/{factor} of the full size shows something else" in doubt


def test_a_level_that_is_flipped_about_its_only_textured_rows_is_named(tmp_path: Path) -> None:
    """Its blocks hardly move, so they still correlate; they correlate better when the level is flipped back."""
    random = np.random.default_rng(3)
    rows = np.repeat(np.repeat(random.integers(60, 240, (12, 50, 3)), 30, 0), 30, 1)
    picture = np.full((1500, 1500, 3), 240, np.uint8)
    picture[570:930] = rows + 0 * picture[570:930]
    assert doubts(tmp_path / "right.tif", picture, reduced(picture, 2)) == []
    [doubt] = doubts(tmp_path / "flipped.tif", picture, reduced(picture, 2)[::-1].copy())
    assert "level of 1/2 of the full size shows something else" in doubt


@pytest.fixture(scope="module")
def two_pieces(field: Picture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slide of 2.6 mm² with tissue in its upper left and lower right quarters, on glass."""
    glass = np.full((3000, 3400, 3), 243, np.uint8)
    glass[:1500, :1536] = glass[1500:, 1864:] = field
    path = tmp_path_factory.mktemp("doubts") / "slide.tif"
    tifffile.imwrite(
        path,
        glass,
        tile=(256, 256),
        photometric="rgb",
        compression="deflate",
        resolution=(20_000, 20_000, "CENTIMETER"),
    )
    return path


@pytest.mark.parametrize(
    ("place", "doubtful"),
    [
        (np.s_[:1500, :1536], False),
        (np.s_[1600:, 1900:], False),
        (np.s_[:1500, 500:1700], False),
        (np.s_[1500:, :1536], True),
        (np.s_[:1500, 1864:], True),
        (np.s_[::-1, 1000:2400], True),
    ],
)
def test_the_share_of_a_mask_that_lies_on_tissue(two_pieces: Path, place: tuple[slice, slice], doubtful: bool) -> None:
    given = np.zeros((3000, 3400), bool)
    given[place] = True
    with open_slide(SlideRecord("s", two_pieces, 2)) as reader:
        share = share_on_tissue(reader, TissueMask(given, (1.0, 1.0), given=True), TissueSettings())
    assert (share < 0.5) == doubtful and 0 <= share <= 1
