"""A data set has the rows of the runs' tables, each once, and other programs read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import duckdb
import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotated import nuclei_from
from dataset_runs import MadeRun, check, held, rows_of

from hover_batch.dataset import nuclei_file
from hover_batch.dataset.hilbert import hilbert_index
from hover_batch.dataset.slides import read_entries, read_slides_table
from hover_batch.dataset.update import add_run
from hover_batch.errors import InputError
from hover_batch.geometry import Size
from hover_batch.taxonomy import CONSEP

SIZES = {"a": 700, "b": 120, "c": 0, "d": 80, "e": 110, "f": 30}
"""Nuclei of each slide: a fills a file by itself, the others share."""

pytestmark = pytest.mark.usefixtures("small_files")


@pytest.fixture
def run(nuclei: tuple[Any, Size], tmp_path: Path) -> MadeRun:
    made = MadeRun(tmp_path / "run", *nuclei)
    for slide_id, rows in SIZES.items():
        made.list(slide_id, patient=slide_id.upper(), site="north")
        made.put(slide_id, rows)
    return made


def silent(line: str) -> None:
    pass


def test_each_nucleus_is_there_once_with_all_columns(run: MadeRun, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    lines: list[str] = []
    added = add_run(run.layout.root, dataset, (), lines.append)
    assert added.added == list(SIZES) and added.exit_code == 0
    assert lines[0] == "[1/6] a: 700 nuclei" and len(lines) == 6
    check(dataset, {(slide_id, run.model): run.table(slide_id) for slide_id in SIZES})
    files = {entry.slide_id: entry.nuclei_files for entry in read_entries(dataset)}
    assert files["b"] == files["d"] == files["e"] != files["f"] and files["a"] != files["b"] and files["c"] == ()


def test_real_nuclei(data: Path, tmp_path: Path) -> None:
    """Annotated nuclei of two images, in row groups that are cut along the curve."""
    made: MadeRun | None = None
    rows = pd.read_csv(data / "nuclei" / "dataset.csv")
    most = rows[rows.source == "consep"].nlargest(2, "n_nuclei")
    for slide_id, (_, row) in zip("ab", most.iterrows(), strict=True):
        labels = cv2.imread(str(data / "nuclei" / row["labels"]), cv2.IMREAD_UNCHANGED)
        assert labels is not None
        nuclei = nuclei_from(labels.astype(np.int32), None, len(CONSEP.classes))
        made = made or MadeRun(tmp_path / "run", nuclei, Size(1000, 1000))
        made.nuclei = nuclei
        made.put(slide_id, len(nuclei.type_id))
    assert made is not None
    add_run(made.layout.root, tmp_path / "dataset", (), silent)
    wanted = {(slide_id, made.model): made.table(slide_id) for slide_id in "ab"}
    assert all(len(table) > 300 for table in wanted.values())
    check(tmp_path / "dataset", wanted)


def test_the_table_of_slides_has_the_summary_the_csv_and_the_provenance(run: MadeRun, tmp_path: Path) -> None:
    run.list("a", patient="Ä", site="south", nuclei_files="no file", n_epithelial="text", Run="7", extra_run="8")
    add_run(run.layout.root, tmp_path / "dataset", (), silent)
    table = read_slides_table(tmp_path / "dataset")
    rows = {row["slide_id"]: row for row in table.to_pylist()}
    first = rows["a"]
    assert first["patient_id"] == "Ä" and first["site"] == "south" and rows["b"]["site"] == "north"
    assert first["extra_nuclei_files"] == "no file" and first["extra_n_epithelial"] == "text"
    assert first["extra_Run"] == "7" and first["extra_extra_run"] == "8"  # SQL would take Run for run
    assert first["nuclei"] == first["nuclei_rows"] == 700 and first["n_epithelial"] + first["n_spindle"] > 100
    assert first["tissue_mm2"] == pytest.approx(0.0625) and first["run"] == str(run.layout.root)
    assert first["model"] == "starter-00000000" and first["model_sha256"] == "0" * 64 and first["mpp_x"] == 0.25
    assert json.loads(first["taxonomy"]) == CONSEP.to_json() and first["fingerprint"] == "of a"
    assert rows["c"]["flags"] == "no_nuclei" and "level" not in first
    assert str(table.schema.field("site").type) == "string" and str(table.schema.field("nuclei").type) == "int64"


def test_a_huge_slide_is_cut_into_several_files(run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nuclei_file, "FILE_ROWS", 350)
    add_run(run.layout.root, tmp_path / "dataset", ["a"], silent)
    [entry] = read_entries(tmp_path / "dataset")
    assert len(entry.nuclei_files) == 3
    check(tmp_path / "dataset", {entry.key: run.table("a")})
    run.put("a", 650, seed=1)
    add_run(run.layout.root, tmp_path / "dataset", ["a"], silent)
    check(tmp_path / "dataset", {entry.key: run.table("a")})


def test_other_programs_read_the_files(run: MadeRun, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    add_run(run.layout.root, dataset, (), silent)
    files = sorted({str(dataset / name) for e in read_entries(dataset) for name in e.nuclei_files})
    box = (200.0, 300.0, 420.0, 480.0)
    wanted = {
        (slide_id, number)
        for slide_id in SIZES
        for number, at in zip(*(run.table(slide_id)[name].to_pylist() for name in ("nucleus_id", "bbox")), strict=True)
        if at["xmax"] >= box[0] and at["xmin"] <= box[2] and at["ymax"] >= box[1] and at["ymin"] <= box[3]
    }
    frame = pd.concat([geopandas.read_parquet(file, bbox=box) for file in files])
    assert set(zip(frame.slide_id, frame.nucleus_id, strict=True)) == wanted and len(frame) == len(wanted) > 30
    whole = geopandas.read_parquet(files[0])
    assert whole.geometry.is_valid.all() and whole.crs is None
    with pq.ParquetFile(files[0]) as file:
        geo = json.loads(file.metadata.metadata[b"geo"])
    assert geo["version"] == "1.1.0" and geo["columns"]["geometry"]["covering"]["bbox"]["xmin"] == ["bbox", "xmin"]
    assert geo["columns"]["geometry"]["bbox"] == pytest.approx(
        [f(at[name] for at in rows_of(Path(files[0]))["bbox"].to_pylist()) for f, name in
         ((min, "xmin"), (min, "ymin"), (max, "xmax"), (max, "ymax"))]
    )  # fmt: skip
    condition = f"bbox.xmax >= {box[0]} AND bbox.xmin <= {box[2]} AND bbox.ymax >= {box[1]} AND bbox.ymin <= {box[3]}"
    with duckdb.connect() as db:
        found = db.execute(f"SELECT slide_id, nucleus_id FROM read_parquet($f) WHERE {condition}", {"f": files})
        assert set(found.fetchall()) == wanted
        by_patient = db.execute(
            f"SELECT patient_id, model, count(*) FROM read_parquet($f) JOIN '{dataset}/slides.parquet' s "
            "USING (slide_id, model) GROUP BY ALL",
            {"f": files},
        ).fetchall()
    assert {(of, n) for of, _, n in by_patient} == {(name.upper(), rows) for name, rows in SIZES.items() if rows}


def test_a_window_of_a_slide_skips_the_other_row_groups(run: MadeRun, tmp_path: Path) -> None:
    """The pages of all row groups that the window does not need are corrupted, and nobody notices."""
    dataset = tmp_path / "dataset"
    add_run(run.layout.root, dataset, (), silent)
    entries = {entry.slide_id: entry for entry in read_entries(dataset)}
    path = dataset / entries["a"].nuclei_files[0]
    metadata = pq.read_metadata(path)
    names = [metadata.row_group(0).column(i).path_in_schema for i in range(metadata.num_columns)]
    content = bytearray(path.read_bytes())
    kept = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        low, high = (group.column(names.index(f"bbox.{name}")).statistics for name in ("xmin", "xmax"))
        assert group.column(names.index("slide_id")).statistics.min == "a" and group.num_rows <= 110
        if low.min <= 100:
            kept += 1
            continue
        assert high.max > 100
        for i in range(metadata.num_columns):
            chunk = group.column(i)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    assert 0 < kept < metadata.num_row_groups - 1
    path.write_bytes(content)
    want = sum(at["xmin"] <= 100 for at in run.table("a")["bbox"].to_pylist())
    with duckdb.connect() as db:
        query = f"SELECT count(geometry) FROM '{path}' WHERE slide_id = 'a' AND bbox.xmin <= 100"
        assert db.execute(query).fetchall() == [(want,)]
        with pytest.raises(duckdb.Error):
            db.execute(f"SELECT count(geometry), sum(area_um2) FROM '{path}'").fetchall()
    assert len(geopandas.read_parquet(path, bbox=(0, 0, 99, 1000))) <= want
    with pytest.raises(OSError):
        geopandas.read_parquet(path)
    # The slides of a shared file are told apart by the statistics of slide_id.
    shared = pq.read_metadata(dataset / entries["b"].nuclei_files[0])
    ranges = [shared.row_group(i).column(names.index("slide_id")).statistics for i in range(shared.num_row_groups)]
    assert [(r.min, r.max) for r in ranges] == [("b", "b"), ("b", "b"), ("d", "d"), ("e", "e"), ("e", "e")]


def test_the_curve_visits_each_cell_next_to_the_last() -> None:
    side = 64
    y, x = (axis.ravel().astype(float) for axis in np.mgrid[:side, :side])
    index = hilbert_index(x + 0.5, y + 0.5, side, side)
    order = np.argsort(index)
    assert len(np.unique(index)) == side * side
    assert (np.abs(np.diff(x[order])) + np.abs(np.diff(y[order])) == 1).all()
    outside = hilbert_index(np.array([-5.0, 900.0]), np.array([3.0, 3.0]), side, side)
    assert list(outside) == list(
        hilbert_index(np.array([0.0, np.nextafter(side, 0)]), np.array([3.0, 3.0]), side, side)
    )


def test_an_empty_data_set_is_valid(run: MadeRun, tmp_path: Path) -> None:
    for slide_id in SIZES:
        run.unfinish(slide_id)
    added = add_run(run.layout.root, tmp_path / "dataset", (), silent)
    assert added.exit_code == 4 and added.skipped.keys() == SIZES.keys()
    assert held(tmp_path / "dataset") == {}
    assert isinstance(read_slides_table(tmp_path / "dataset"), pa.Table)


@pytest.mark.parametrize("start", [4, 40, 400])
def test_corrupted_pages_of_slides_parquet_are_named(run: MadeRun, tmp_path: Path, start: int) -> None:
    """pyarrow raises an OSError for them."""
    add_run(run.layout.root, tmp_path / "dataset", (), lambda line: None)
    path = tmp_path / "dataset" / "slides.parquet"
    content = bytearray(path.read_bytes())
    content[start : start + 60] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(InputError, match="slides.parquet is corrupted"):
        read_slides_table(tmp_path / "dataset")
