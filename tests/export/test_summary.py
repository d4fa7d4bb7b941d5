"""Summaries: counts, densities and exact quartiles of slides and of the cohort, in CSV and Parquet."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import file_fault
from hover_batch.export import summary
from hover_batch.export.summary import (
    MORPHOLOGY,
    Row,
    cohort_summary,
    read_count_error,
    slide_summary,
    summary_schema,
    write_summary,
)
from hover_batch.taxonomy import CONSEP
from hover_batch.uncertainty import CountError

NAMES = [c.name for c in CONSEP.nuclei]


def table(path: Path, n: int, seed: int) -> dict[str, NDArray[np.generic]]:
    """A nuclei.parquet with the columns that summaries read, in row groups smaller than it."""
    random = np.random.default_rng(seed)
    columns: dict[str, NDArray[np.generic]] = {
        "type_id": random.integers(1, 4, n).astype(np.uint8),  # no spindle
        **{name: random.gamma(2, 10, n).astype(np.float32) for name in MORPHOLOGY},
    }
    pq.write_table(pa.table(columns), path, row_group_size=50)
    return columns


def record(slide_id: str, **extra: str) -> SlideRecord:
    return SlideRecord(slide_id, Path("/slides") / slide_id, row=2, patient_id="p1", group="a", extra=extra)


@pytest.fixture
def cohort(tmp_path: Path) -> tuple[list[Row], list[dict[str, NDArray[np.generic]]], list[Path]]:
    """Two slides that worked and one between them that failed, then the cohort's row."""
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    tables = [table(path, n, n) for path, n in zip(paths, (120, 301), strict=True)]
    rows = [
        slide_summary(
            record("a", site="lung, left", status="old"), CONSEP, status="done", nuclei=paths[0], tissue_mm2=2.0,
            seconds={"infer": 3.5, "post": 1.25},
        ),
        slide_summary(
            record("bad", site="x"), CONSEP, status="failed", nuclei=None, tissue_mm2=None, seconds={"open": 0.5}
        ),
        slide_summary(
            record("b", site="y"), CONSEP, status="done", nuclei=paths[1], tissue_mm2=0.5, seconds={"infer": 6.5}
        ),
    ]  # fmt: skip
    return [*rows, cohort_summary(rows, paths, CONSEP)], tables, paths


def test_slide_row(cohort: tuple[list[Row], list[dict[str, NDArray[np.generic]]], list[Path]]) -> None:
    (row, *_), (nuclei, _), _ = cohort
    assert (row["level"], row["slide_id"], row["patient_id"], row["group"]) == ("slide", "a", "p1", "a")
    assert (row["nuclei"], row["nuclei_per_mm2"], row["failed"]) == (120, 60.0, 0)
    for kind in CONSEP.nuclei:
        n = int((nuclei["type_id"] == kind.id).sum())
        assert (row[f"n_{kind.name}"], row[f"{kind.name}_per_mm2"]) == (n, n / 2)
    assert row["n_spindle"] == 0 and row["n_epithelial"] > 0
    for name in MORPHOLOGY:
        expected = pd.Series(nuclei[name].astype(float)).quantile([0.25, 0.5, 0.75])
        assert [row[f"{name}_{q}"] for q in ("p25", "p50", "p75")] == pytest.approx(expected.tolist(), rel=1e-12)


def test_cohort_row_is_of_all_nuclei_together(
    cohort: tuple[list[Row], list[dict[str, NDArray[np.generic]]], list[Path]],
) -> None:
    rows, tables, _ = cohort
    row = rows[-1]
    assert (row["level"], row["slides"], row["failed"]) == ("cohort", 3, 1)
    assert (row["nuclei"], row["tissue_mm2"], row["nuclei_per_mm2"]) == (421, 2.5, 421 / 2.5)
    assert sum(row[f"n_{name}"] for name in NAMES) == 421
    assert (row["seconds_infer"], row["seconds_post"], row["seconds_open"]) == (10.0, 1.25, 0.5)
    for name in MORPHOLOGY:
        joined = np.concatenate([t[name] for t in tables])
        expected = pd.Series(joined.astype(float)).quantile([0.25, 0.5, 0.75])
        assert [row[f"{name}_{q}"] for q in ("p25", "p50", "p75")] == pytest.approx(expected.tolist(), rel=1e-12)


def test_intervals_of_a_slide_and_of_the_cohort(tmp_path: Path) -> None:
    error = CountError(mean=0.1, mean_variance=0.001, source=0.004, slide=0.003, field_mm2=0.002, unpaired=0.3, df=6)
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    numbers, areas = (120, 301), (2.0, 0.5)
    for path, n in zip(paths, numbers, strict=True):
        table(path, n, n)
    rows = [
        slide_summary(record(path.stem), CONSEP, status="done", nuclei=path, tissue_mm2=area, seconds={}, error=error)
        for path, area in zip(paths, areas, strict=True)
    ]
    everything = cohort_summary(rows, paths, CONSEP)
    slides = list(zip(numbers, areas, strict=True))
    for row, of, area in zip((*rows, everything), ([slides[0]], [slides[1]], slides), (*areas, 2.5), strict=True):
        interval = error.interval(of)
        assert (row["nuclei_low"], row["nuclei_high"]) == interval
        assert (row["nuclei_per_mm2_low"] * area, row["nuclei_per_mm2_high"] * area) == pytest.approx(interval)
    assert read_count_error(rows[0]["count_error"]) == error
    other = rows[1] | {"count_error": None}
    assert "nuclei_low" not in cohort_summary([rows[0], other], paths, CONSEP)
    assert read_count_error("{}") is None and read_count_error(None) is None
    write_summary([*rows, everything], CONSEP, tmp_path / "s.csv", tmp_path / "s.parquet")
    assert pq.read_table(tmp_path / "s.parquet")["nuclei_high"].to_pylist()[0] == rows[0]["nuclei_high"]


def test_both_files_have_the_same_columns_in_order(
    tmp_path: Path, cohort: tuple[list[Row], list[dict[str, NDArray[np.generic]]], list[Path]]
) -> None:
    rows, _, _ = cohort
    write_summary(rows, CONSEP, tmp_path / "summary.csv", tmp_path / "summary.parquet")
    stored = pq.read_table(tmp_path / "summary.parquet")
    expected = summary_schema(CONSEP).names + ["seconds_infer", "seconds_post", "seconds_open", "site", "extra_status"]
    assert stored.column_names == expected
    assert stored["level"].to_pylist() == ["slide", "slide", "slide", "cohort"]
    assert stored["nuclei"].to_pylist() == [120, None, 301, 421]
    assert stored["site"].to_pylist() == ["lung, left", "x", "y", None]
    assert (stored["status"][0].as_py(), stored["extra_status"][0].as_py()) == ("done", "old")
    with (tmp_path / "summary.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == expected
    frame = pd.read_csv(tmp_path / "summary.csv")
    for name in ("nuclei", "tissue_mm2", "nuclei_per_mm2", "area_um2_p50", "seconds_infer"):
        np.testing.assert_allclose(frame[name], stored[name].to_pandas(), rtol=1e-5)
    again = [tmp_path / "again.csv", tmp_path / "again.parquet"]
    write_summary(rows, CONSEP, *again)
    assert again[0].read_bytes() == (tmp_path / "summary.csv").read_bytes()
    assert again[1].read_bytes() == (tmp_path / "summary.parquet").read_bytes()


@pytest.mark.parametrize("order", [("level", "extra_level"), ("extra_level", "level")])
def test_columns_of_the_cohort_do_not_replace_each_other(order: tuple[str, str]) -> None:
    record = SlideRecord("a", Path("a.svs"), 2, extra={name: name for name in order})
    row = slide_summary(record, CONSEP, status="failed", nuclei=None, tissue_mm2=None, seconds={})
    own = {name: value for name, value in row.items() if name not in summary_schema(CONSEP).names}
    assert list(own) == ["extra_level", "extra_extra_level"] and list(own.values()) == list(order)


def test_columns_of_the_cohort_do_not_hide_others_in_sql() -> None:
    names = ("Nuclei", "N_Epithelial", "Seconds_read", "Estimated_age", "Age")
    record = SlideRecord("a", Path("a.svs"), 2, extra=dict.fromkeys(names, "x"))
    row = slide_summary(record, CONSEP, status="failed", nuclei=None, tissue_mm2=None, seconds={})
    own = [name for name in row if name not in summary_schema(CONSEP).names]
    assert own == [*(f"extra_{name}" for name in names[:-1]), "Age"]


def test_a_slide_without_nuclei_or_tissue(tmp_path: Path) -> None:
    table(tmp_path / "none.parquet", 0, 0)
    row = slide_summary(
        record("blank"), CONSEP, status="done", nuclei=tmp_path / "none.parquet", tissue_mm2=0.0, seconds={}
    )
    assert (row["nuclei"], row["n_spindle"], row["tissue_mm2"], row["failed"]) == (0, 0, 0.0, 0)
    assert "nuclei_per_mm2" not in row and "area_um2_p50" not in row
    everything = cohort_summary([row], [tmp_path / "none.parquet"], CONSEP)
    assert (everything["slides"], everything["nuclei"]) == (1, 0)


def test_a_cohort_in_which_all_failed(tmp_path: Path) -> None:
    row = slide_summary(record("bad"), CONSEP, status="failed", nuclei=None, tissue_mm2=None, seconds={})
    everything = cohort_summary([row], [], CONSEP)
    assert (everything["slides"], everything["failed"], everything["nuclei"]) == (1, 1, 0)
    write_summary([row, everything], CONSEP, tmp_path / "s.csv", tmp_path / "s.parquet")
    assert pq.read_table(tmp_path / "s.parquet")["tissue_mm2"].to_pylist() == [None, None]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=60),
    batch=st.integers(1, 20),
)
def test_quantiles_are_numpys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[float], batch: int) -> None:
    monkeypatch.setattr(summary, "_BATCH", batch)
    half = len(values) // 2
    paths = []
    for name, piece in (("a", values[:half]), ("b", values[half:])):
        paths.append(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table({"v": np.array(piece, np.float32) + np.float32(0)}), paths[-1])
    expected = np.quantile(np.array(values, np.float64), [0.25, 0.5, 0.75])
    assert summary._quantiles(paths, "v", len(values)) == pytest.approx(expected.tolist(), rel=1e-12, abs=0)


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "nuclei.parquet").symlink_to("nuclei.parquet")
    with pytest.raises(OSError) as caught:
        cohort_summary([], [tmp_path / "nuclei.parquet"], CONSEP)
    said = "Too many levels of symbolic links; a link there leads to itself: give the path of the file or folder"
    assert file_fault(caught.value) == f"{tmp_path}/nuclei.parquet: {said}"
