"""Warnings for pixel sizes that are unusual or do not match the objective."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import InputError
from hover_batch.geometry import Mpp
from hover_batch.slide.example import write_pyramidal_tiff
from hover_batch.slide.headers import peek
from hover_batch.slide.pixel_size import check_mpp, warnings_of


@pytest.mark.parametrize(
    ("mpp", "power"),
    [(0.25, 40), (0.5, 20), (1.0, 10), (0.2525, 40), (0.2215, 40), (0.2425, 20), (0.1725, 40), (0.11, 60), (0.3, None)],
)
def test_what_scanners_write_is_not_warned_of(mpp: float, power: float | None) -> None:
    assert warnings_of(Mpp(mpp, mpp), None, power) == []


@pytest.mark.parametrize(
    ("mpp", "power", "part"),
    [
        (0.025, None, "0.1 to 1.2 µm"),
        (2.5, None, "0.1 to 1.2 µm"),
        (0.025, 40, "magnification of 40 about 0.25 µm"),
        (0.25, 10, "magnification of 10 about 1 µm"),
        (0.5, 40, "magnification of 40 about 0.25 µm"),
        (0.1, 4, "magnification of 4 about 2.5 µm"),
    ],
)
def test_tenfold_and_mixed_up_sizes_are_warned_of(mpp: float, power: float | None, part: str) -> None:
    (warning,) = warnings_of(Mpp(mpp, mpp), None, power)
    assert part in warning and f"mpp {mpp:g}" in warning


def test_either_axis_counts() -> None:
    assert warnings_of(Mpp(0.25, 2.5), None, None) and warnings_of(Mpp(0.02, 0.25), None, None)
    (warning,) = warnings_of(Mpp(0.25, 0.5), None, None)
    assert warning.startswith("mpp 0.25 × 0.5: pixels of slides are square as a rule;")
    assert "in the columns mpp_x and mpp_y" in warning
    assert warnings_of(Mpp(0.2485, 0.25), None, None) == []


def test_the_cohorts_values_are_judged_like_the_files(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    write_pyramidal_tiff(path, np.zeros((300, 300, 3), np.uint8), 0.025)
    (warning,) = peek(SlideRecord("s", path, 2)).warnings
    assert warning.startswith("mpp 0.025:")
    off, odd = peek(SlideRecord("s", path, 2, mpp=Mpp(0.25, 0.25), magnification=4.0)).warnings
    assert "cohort's is used" in off and "magnification of 4" in odd


def test_impossible_sizes_of_the_cohort_are_refused_with_the_likely_unit() -> None:
    check_mpp(Mpp(0.25, 0.25))
    with pytest.raises(InputError, match=r"mpp 250: no slide.*\(0.25 µm if it is in nm\)"):
        check_mpp(Mpp(250, 250))
    with pytest.raises(InputError, match="mpp 0.25 × 50"):
        check_mpp(Mpp(0.25, 50))
