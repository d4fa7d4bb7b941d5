"""The anchor decides ownership: exactly one core of a tiling contains it."""

from __future__ import annotations

import numpy as np
from synthetic_maps import LAYOUT

from hover_batch.geometry import Box
from hover_batch.nuclei.measure import concatenate, measure
from hover_batch.nuclei.regions import MARGIN, clear_of_margin, owned
from hover_batch.nuclei.watershed import REACH


def test_a_nucleus_on_a_seam_has_one_owner() -> None:
    instances = np.zeros((20, 20), np.int32)
    instances[5:10, 8:12] = 1  # across x = 10, anchor at (8, 5)
    instances[9:12, 14] = 2  # across y = 10, anchor at (14, 9)
    instances[10, 10] = 3
    nuclei = measure(instances, np.zeros((LAYOUT.planes, 20, 20), np.uint8), LAYOUT)
    cores = [Box(x, y, x + 10, y + 10) for y in (0, 10) for x in (0, 10)]
    parts = [owned(core, nuclei) for core in cores]
    assert [part.anchor_x.tolist() for part in parts] == [[8], [14], [], [10]]
    np.testing.assert_array_equal(concatenate(parts).area_px, nuclei.area_px)


def test_the_margin_covers_all_pixels_that_affect_a_component() -> None:
    assert MARGIN >= REACH
    window = Box(1000, 2000, 1100, 2050)
    inside = [MARGIN, MARGIN, 100 - MARGIN, 50 - MARGIN]
    bounds = np.array([inside] + [[*inside[:k], inside[k] + (1 if k > 1 else -1), *inside[k + 1 :]] for k in range(4)])
    assert clear_of_margin(bounds, window).tolist() == [True, False, False, False, False]
