"""Figures of the report: histograms, densities in cells, scales, and randomly chosen nuclei."""

from __future__ import annotations

import base64
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_run import write_field, write_run
from numpy.typing import NDArray

from hover_batch.export import read
from hover_batch.export.read import NucleiTable
from hover_batch.geometry import Mpp, Size
from hover_batch.report.charts import HEIGHT, WIDTH, histogram, nice_ceiling, strips
from hover_batch.report.measure import CELLS, MEASURES, MIN_CELL_UM, Cells, Measure, Measured, measure
from hover_batch.report.pictures import heatmaps, reduced_picture
from hover_batch.slide.tissue import TissueMask
from hover_batch.taxonomy import CONSEP


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> NucleiTable:
    folder = tmp_path_factory.mktemp("figures")
    # The tenth slide keeps every nucleus.
    layout = write_run(folder / "out", *write_field(folder, 1000), done=[f"s{number}" for number in range(10)])
    return NucleiTable.open(layout.slide("s9").nuclei_parquet)


def test_one_pass_counts_what_the_columns_hold(table: NucleiTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BATCH", 300)
    found = measure(table, 5)
    columns = pq.read_table(table.path).to_pandas()
    assert len(columns) > 1000
    for m in MEASURES:
        for kind in CONSEP.classes:
            values = columns[columns.type_id == kind.id][m.column]
            expected, _ = np.histogram(np.clip(values, m.low, np.nextafter(m.high, 0)), m.bins, (m.low, m.high))
            # A value on an edge may fall to either side of it, by the rounding of float32.
            assert found.histograms[m.column][kind.id].sum() == len(values)
            assert np.abs(np.cumsum(found.histograms[m.column][kind.id]) - np.cumsum(expected)).max(initial=0) <= 2
    rows, cells = found.cells.shape
    assert found.counts.shape == (len(CONSEP.classes), rows, cells)
    x, y = (np.arange(n + 1) * found.cells.side for n in (cells, rows))
    for kind in CONSEP.classes:
        of = columns[columns.type_id == kind.id]
        expected, _, _ = np.histogram2d(of.centroid_y, of.centroid_x, (y, x))
        assert (found.counts[kind.id] == expected).all()
    centroids = set(zip(columns.centroid_x, columns.centroid_y, strict=True))
    assert len(found.chosen) == 5 and {tuple(at) for at in found.chosen} <= centroids
    assert (measure(table, 5).chosen == found.chosen).all()
    assert len(measure(table, 10**6).chosen) == len(columns)


@given(st.integers(1, 200_000), st.integers(1, 200_000), st.floats(0.1, 2.0), st.floats(0.9, 1.1))
def test_cells_cover_the_canvas(width: int, height: int, mpp: float, oblong: float) -> None:
    cells = Cells.over(Size(width, height), Mpp(mpp, mpp * oblong))
    assert max(cells.shape) <= CELLS and min(cells.shape) >= 1
    assert cells.side * mpp >= MIN_CELL_UM * (1 - 1e-9)
    assert cells.mm2.shape == cells.shape
    assert cells.mm2.sum() == pytest.approx(width * height * mpp * mpp * oblong / 1e6)


@given(st.floats(1e-6, 1e9))
def test_a_scale_ends_at_the_next_of_1_2_5(value: float) -> None:
    top = nice_ceiling(value)
    assert value * (1 - 1e-9) <= top <= value * 2.5 * (1 + 1e-9)
    assert f"{top:.0e}"[0] in "125" and top == pytest.approx(float(f"{top:.0e}"))
    assert nice_ceiling(0) == nice_ceiling(-value) == 1


def test_a_histogram_steps_from_bin_to_bin() -> None:
    counts = np.zeros((5, 4), np.int64)
    counts[2], counts[4] = [1, 0, 3, 0], [0, 2, 2, 0]
    drawn = histogram(Measure("area_um2", "Area", 0, 200, 4), counts, CONSEP.nuclei)
    assert [curve.kind.name for curve in drawn.curves] == ["inflammatory", "spindle"]
    assert drawn.top == 0.75
    points = [tuple(map(float, point.split(","))) for point in drawn.curves[0].points.split()]
    assert [x for x, _ in points] == [0, 90, 90, 180, 180, 270, 270, WIDTH]
    assert [y for _, y in points] == [100, 100, HEIGHT, HEIGHT, 0, 0, HEIGHT, HEIGHT]
    assert list(drawn.ticks.values()) == ["0", "50", "100", "150", "≥ 200"]


def test_strips_share_a_scale() -> None:
    first, second, third, _ = CONSEP.nuclei
    drawn = strips(
        {None: [(40.0, "a"), (10.0, "b"), (30.0, "c")], first: [(5.0, "a")], second: [], third: [(0.0, "a")]}
    )
    assert [strip.kind for strip in drawn] == [None, first, third]
    assert {strip.top for strip in drawn} == {50}
    assert [x for x, _ in drawn[0].dots] == [0.8 * WIDTH, 0.2 * WIDTH, 0.6 * WIDTH]
    assert drawn[0].median_value == 30 and drawn[0].median == pytest.approx(0.6 * WIDTH)


def decoded(uri: str) -> NDArray[np.uint8]:
    """(y, x, 4) BGRA."""
    image = cv2.imdecode(np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    return np.asarray(image, np.uint8)


def test_heatmaps_show_density_on_tissue_only(tmp_path: Path) -> None:
    cells = Cells(Size(400, 200), Mpp(0.5, 0.5), 100)  # 50 µm a side
    counts = np.zeros((5, 2, 4), np.int64)
    counts[3, 0, 3], counts[3, 1, 1], counts[2, 1, 1] = 20, 10, 5
    tissue = np.zeros((2, 4), bool)
    tissue[:, 1:3] = True
    measured = Measured(cells, {}, counts, np.empty((0, 2)))
    every, *by_class = heatmaps(measured, CONSEP.nuclei, TissueMask(tissue, (100.0, 100.0)))
    assert [map.kind for map in by_class] == list(CONSEP.nuclei) and every.kind is None
    # 20 nuclei in a cell of 0.0025 mm².
    assert [map.top for map in (every, *by_class)] == [10_000, None, 2000, 10_000, None]
    shown = decoded(by_class[2].picture)
    # On tissue, and where nuclei are.
    assert (shown[..., 3] > 0).tolist() == [[False, True, True, True], [False, True, True, False]]
    brightness = shown[..., :3].astype(int).sum(axis=2)
    assert brightness[0, 3] > brightness[1, 1] > brightness[0, 1] == brightness[1, 2]
    assert decoded(heatmaps(measured, CONSEP.nuclei, None)[0].picture)[..., 3].all()


def test_a_mask_coarser_than_the_cells_leaves_no_gaps() -> None:
    cells = Cells(Size(400, 400), Mpp(0.5, 0.5), 50)
    tissue = np.array([[True, True], [False, True]])
    measured = Measured(cells, {}, np.zeros((5, 8, 8), np.int64), np.empty((0, 2)))
    alpha = decoded(heatmaps(measured, CONSEP.nuclei, TissueMask(tissue, (200.0, 200.0)))[0].picture)[..., 3] > 0
    assert alpha.tolist() == np.repeat(np.repeat(tissue, 4, axis=0), 4, axis=1).tolist()


def test_the_picture_of_a_thin_strip_stays_a_picture(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "strip.jpg"), np.full((2000, 1, 3), 90, np.uint8))
    assert (reduced_picture(tmp_path / "strip.jpg", 480) or "").startswith("data:image/jpeg")
