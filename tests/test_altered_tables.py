"""Tables of nuclei that were altered by hand: `view`, `export` and `report` say what is wrong, in one line."""

from __future__ import annotations

import html
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from made_run import record_table, write_field, write_run
from typer.testing import CliRunner

import hover_batch
from hover_batch.cli import app
from hover_batch.cohort.layout import Format, RunLayout
from hover_batch.errors import SlideError
from hover_batch.export.read import NucleiTable
from hover_batch.view.nuclei import NucleiTiles

Change = Callable[[pa.Table], pa.Table]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of one slide, and a copy of its table."""
    folder = tmp_path_factory.mktemp("altered")
    layout = write_run(folder / "out", *write_field(folder, 200), done=["a"])
    table = layout.slide("a").nuclei_parquet
    (folder / "kept.parquet").write_bytes(table.read_bytes())
    return table, folder / "kept.parquet"


def column(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, change(table[name]))


def first(value: Any) -> Callable[[Any], Any]:
    """Another value in the first row."""
    return lambda held: pa.array([value, *held.to_pylist()[1:]], held.type)


def nan_in(wkb: Any) -> bytes:
    """The polygon with a second point whose x is NaN: it follows 13 bytes of header and a point of 16."""
    held: bytes = wkb.as_py()
    return held[:29] + struct.pack("<d", np.nan) + held[37:]


def geometries(change: Callable[[Any], Any]) -> Change:
    return column("geometry", lambda held: pa.array(shapely.to_wkb(change(shapely.from_wkb(held.to_numpy())))))


ALTERED: dict[str, Change] = {
    "its column centroid_x has values that are not finite": column("centroid_x", first(np.nan)),
    "its column centroid_y has missing values": column("centroid_y", first(None)),
    "its column centroid_y has values below 0": column("centroid_y", first(-7.0)),
    "its column area_um2 has values that are not finite": column("area_um2", first(np.inf)),
    "its column bbox has missing values": column("bbox", first(None)),
    "its column seg_score has missing values": column("seg_score", first(None)),
    "its column geometry has missing values": column("geometry", first(None)),
    "its geometry holds something else than polygons": geometries(shapely.centroid),
    "its geometry has coordinates that are not finite": column("geometry", lambda held: first(nan_in(held[0]))(held)),
    "it has no column type_id": lambda table: table.drop_columns("type_id"),
    "its column type_id is of the type int64, not uint8": column("type_id", lambda held: held.cast(pa.int64())),
    "its column geometry is of the type string, not binary": column(
        "geometry", lambda held: pa.array(["POINT (0 0)"] * len(held))
    ),
    "its column bbox is of the type double": column("bbox", lambda held: pa.array(np.zeros(len(held)))),
}
UNUSED = ("its column bbox has", "its column seg_score", "its column geometry has", "its geometry")
"""Faults in values that the report does not read, unless the nucleus is in one of its crops."""


@pytest.mark.parametrize("fault", ALTERED)
def test_altered_tables_are_refused_in_one_line(fault: str, finished: tuple[Path, Path]) -> None:
    path, kept = finished
    with pq.ParquetFile(kept) as file:
        table, about = file.read(), file.metadata.metadata
    pq.write_table(ALTERED[fault](table).replace_schema_metadata({b"hover_batch": about[b"hover_batch"]}), path)
    record_table(RunLayout(path.parents[2]).slide("a"))
    message = f"{path}: cannot be read as a table of nuclei ({fault}"
    with pytest.raises(SlideError, match=re.escape(message)):  # the viewer, which reads some columns only on demand
        NucleiTiles(NucleiTable.open(path)).row(1)
    run = str(path.parents[2])
    result = CliRunner().invoke(app, ["export", run, "--to", "qupath"])
    assert result.exit_code == 4 and result.stderr.count(message) == 1, result.output
    if "centroid" in fault:
        result = CliRunner().invoke(app, ["view", run, "--no-browser"])
        assert result.exit_code == 3 and result.stderr.count(message) == 1, result.output
    result = CliRunner().invoke(app, ["report", run])
    assert result.exit_code == 0, result.output
    if not fault.startswith(UNUSED):
        assert fault in (path.parents[2] / "report.html").read_text()


def test_an_empty_table_is_shown(finished: tuple[Path, Path]) -> None:
    path, kept = finished
    with pq.ParquetFile(kept) as file:
        table, about = file.read(), file.metadata.metadata
    pq.write_table(table.slice(0, 0).replace_schema_metadata({b"hover_batch": about[b"hover_batch"]}), path)
    record_table(RunLayout(path.parents[2]).slide("a"))
    run = str(path.parents[2])
    for arguments in (["export", run, "--to", "qupath", "--to", "csv"], ["report", run]):
        assert CliRunner().invoke(app, arguments).exit_code == 0


def of_another_run(folder: Path, table: Path) -> str:
    other = write_run(folder / "other", *write_field(folder, 225), done=["a"])
    table.write_bytes(other.slide("a").nuclei_parquet.read_bytes())
    return "checksum mismatch: slide.json records another table"


def of_another_slide(folder: Path, table: Path) -> str:
    table.write_bytes(table.parents[1].joinpath("b", table.name).read_bytes())
    return "it is the table of the slide b"


@pytest.mark.parametrize("replace", [of_another_run, of_another_slide])
def test_tables_of_other_runs_and_slides_are_refused(replace: Callable[[Path, Path], str], tmp_path: Path) -> None:
    layout = write_run(tmp_path / "out", *write_field(tmp_path, 200), done=["a", "b"])
    table = layout.slide("a").nuclei_parquet
    message = f"{table}: cannot be read as a table of nuclei ({replace(tmp_path, table)})"
    for given in (table, table.parent):
        with pytest.raises(SlideError, match=re.escape(message)):
            hover_batch.load_nuclei(given)
    for arguments, exit_code in ((["export", "--to", "csv"], 3), (["view", "--slide", "a", "--no-browser"], 3)):
        result = CliRunner().invoke(app, [arguments[0], str(layout.root), *arguments[1:]])
        assert result.exit_code == exit_code and result.stderr.count(message) == 1, result.output
    assert not layout.slide("a").exported(Format.csv).exists() and layout.slide("b").exported(Format.csv).exists()
    assert CliRunner().invoke(app, ["report", str(layout.root)]).exit_code == 0
    assert html.escape(message) in layout.report_html.read_text()


def test_the_folder_of_another_slide_is_not_done(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "out", *write_field(tmp_path, 200), done=["a", "b"])
    shutil.rmtree(layout.slide("a").folder)
    shutil.copytree(layout.slide("b").folder, layout.slide("a").folder)
    result = CliRunner().invoke(app, ["export", str(layout.root), "--to", "csv"])
    assert result.exit_code == 3 and "a: skipped: is not done" in result.stderr
