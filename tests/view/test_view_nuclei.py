"""The tiles that a page requests contain the nuclei of the table, each once, at their positions."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from annotated import nuclei_from
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hover_batch.errors import SlideError
from hover_batch.export.read import NucleiTable
from hover_batch.geometry import Grid, Mpp, Size
from hover_batch.nuclei.table import TableContext, merge_parts, to_arrow, write_part
from hover_batch.taxonomy import CONSEP
from hover_batch.view import nuclei as view_nuclei
from hover_batch.view.nuclei import CELLS, NucleiTiles

CLASSES = len(CONSEP.classes)


def write_table(folder: Path, width: int, height: int, scale: float, mpp: Mpp, seed: int) -> NucleiTable:
    """Ellipses at random on a canvas of level-0 pixels, some of them over its edges."""
    random = np.random.default_rng(seed)
    grid = Grid(
        Size(width, height),
        scale,
        scale,
        Mpp(mpp.x * scale, mpp.y * scale),
        Size(int(np.ceil(width / scale)), int(np.ceil(height / scale))),
    )
    instances = np.zeros(grid.size.box.shape, np.int32)
    for label in range(1, int(random.integers(0, 60)) + 1):
        at = [int(random.integers(0, extent)) for extent in (grid.size.width, grid.size.height)]
        axes = [int(v) for v in random.integers(1, 20, 2)]
        cv2.ellipse(instances, at, axes, float(random.uniform(0, 180)), 0, 360, label, -1)
    types = np.where(instances > 0, instances % 4 + 1, 0).astype(np.uint8)
    # Later ellipses cut earlier ones apart: each piece is a nucleus of its own.
    pieces = np.zeros_like(instances)
    for label in np.unique(instances[instances > 0]):
        count, found = cv2.connectedComponents((instances == label).astype(np.uint8))
        pieces += np.where(found > 0, found + pieces.max(), 0).astype(np.int32)
    context = TableContext("a", CONSEP, grid, mpp, "file", None, "m", "0", "0")
    part = folder / "part.parquet"
    write_part(part, to_arrow(nuclei_from(pieces, types, CLASSES), context))
    merge_parts([(0, part)], folder / "nuclei.parquet", context)
    return NucleiTable.open(folder / "nuclei.parquet")


@dataclass(frozen=True)
class Nucleus:
    id: int
    type_id: int
    contour: NDArray[np.float64]


def unpacked(content: bytes, step: float) -> list[Nucleus]:
    """What `contours` says its bytes are."""
    n = int(np.frombuffer(content, "<u4", 1)[0])
    ids = np.frombuffer(content, "<u4", n, 4)
    ends = np.frombuffer(content, "<u4", n, 4 + 4 * n)
    corners = np.frombuffer(content, "<f4", 2 * n, 4 + 8 * n).reshape(-1, 2)
    total = int(ends[-1]) if n else 0
    points = np.frombuffer(content, "<u2", 2 * total, 4 + 16 * n).reshape(-1, 2)
    types = np.frombuffer(content, "u1", n, 4 + 16 * n + 4 * total)
    assert len(content) == 4 + 17 * n + 4 * total
    rings = np.split(points, ends[:-1]) if n else []
    return [Nucleus(int(ids[i]), int(types[i]), corners[i].astype(np.float64) + rings[i] * step) for i in range(n)]


@settings(max_examples=30)
@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from([0.5, 1.0, 1.37, 2.0]),
    st.sampled_from([Mpp(0.25, 0.25), Mpp(0.5, 0.44)]),
    st.integers(0, 2**32 - 1),
)
def test_tiles_hold_the_nuclei_of_the_table_each_once(
    width: int, height: int, scale: float, mpp: Mpp, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_nuclei, "TILE_UM", 16.0)
        table = write_table(Path(folder), width, height, scale, mpp, seed)
        rows = pq.read_table(table.path).to_pandas()
        view = NucleiTiles(table)
        assert view.tile <= 64
        found: dict[int, Nucleus] = {}
        for row in range(view.rows):
            for column in range(view.columns):
                content = view.contours(column, row)
                assert content is not None
                for nucleus in unpacked(content, view.step):
                    assert nucleus.id not in found
                    found[nucleus.id] = nucleus
                    held = rows.iloc[nucleus.id - 1]
                    # The inference grid may reach over the canvas; no tile does.
                    x, y = min(held.centroid_x, width - 1e-9), min(held.centroid_y, height - 1e-9)
                    assert (x // view.tile, y // view.tile) == (column, row)
        assert sorted(found) == rows.nucleus_id.tolist()
        for held in rows.itertuples():
            nucleus = found[held.nucleus_id]
            assert nucleus.type_id == held.type_id
            ring = shapely.get_coordinates(shapely.from_wkb(held.geometry))
            np.testing.assert_allclose(nucleus.contour, ring, rtol=0, atol=view.step)
        for level in (0, 1, 4, 10):
            total = np.zeros(CLASSES, np.int64)
            side = CELLS << level
            for row in range(-(-height // side)):
                for column in range(-(-width // side)):
                    content = view.density(level, column, row)
                    assert content is not None
                    cells = np.frombuffer(content, "<u4").reshape(CLASSES, CELLS, CELLS)
                    total += cells.sum(axis=(1, 2), dtype=np.int64)
                    for kind in range(CLASSES):
                        inside = rows[
                            (rows.type_id == kind)
                            & (np.minimum(rows.centroid_x, width - 1e-9) // side == column)
                            & (np.minimum(rows.centroid_y, height - 1e-9) // side == row)
                        ]
                        expected = np.zeros((CELLS, CELLS), int)
                        at = [
                            (np.minimum(values, extent - 1e-9) % side // 2**level).astype(int)
                            for values, extent in ((inside.centroid_y, height), (inside.centroid_x, width))
                        ]
                        np.add.at(expected, tuple(at), 1)
                        np.testing.assert_array_equal(cells[kind], expected)
            assert total.tolist() == np.bincount(rows.type_id, minlength=CLASSES).tolist() == view.counts.tolist()


@pytest.fixture
def table(tmp_path: Path) -> NucleiTable:
    return write_table(tmp_path, 500, 400, 1.0, Mpp(0.25, 0.25), 7)


def test_a_row_is_the_tables(table: NucleiTable) -> None:
    view = NucleiTiles(table)
    rows = pq.read_table(table.path).drop_columns(["slide_id", "type_id", "bbox", "geometry"])
    assert len(rows) > 10
    for number, held in enumerate(rows.to_pylist(), start=1):
        row = view.row(number)
        assert row is not None and list(row) == list(held)
        text = json.loads(json.dumps(row))
        for name, value in held.items():
            kind = rows.schema.field(name).type.to_pandas_dtype()
            assert kind(text[name]) == value, "the shortest text that reads back as the same number"
    assert view.row(0) is None and view.row(len(rows) + 1) is None


def test_rows_of_later_row_groups_are_found(table: NucleiTable, tmp_path: Path) -> None:
    content = pq.read_table(table.path)
    metadata = pq.read_metadata(table.path).metadata
    cut = tmp_path / "cut.parquet"
    with pq.ParquetWriter(cut, content.schema) as writer:
        writer.write_table(content, row_group_size=7)
        writer.add_key_value_metadata({"hover_batch": metadata[b"hover_batch"]})
    view, whole = NucleiTiles(NucleiTable.open(cut)), NucleiTiles(table)
    assert pq.read_metadata(cut).num_row_groups > 2
    assert [view.row(i) for i in range(1, len(content) + 1)] == [whole.row(i) for i in range(1, len(content) + 1)]


def test_what_is_not_there_is_none(table: NucleiTable) -> None:
    view = NucleiTiles(table)
    assert view.contours(view.columns, 0) is None and view.contours(0, view.rows) is None
    assert view.density(0, 4, 0) is None and view.density(0, 0, 4) is None
    assert view.density(40, 0, 0) is not None and view.density(999_999_999, 1, 0) is None


def test_a_nucleus_too_long_for_fine_steps_is_sent_in_coarser_ones(tmp_path: Path) -> None:
    instances = np.zeros((40, 9000), np.int32)
    instances[5:30, 10:8990] = 1
    grid = Grid(Size(9000, 40), 1, 1, Mpp(0.25, 0.25), Size(9000, 40))
    context = TableContext("a", CONSEP, grid, grid.mpp, "file", None, "m", "0", "0")
    write_part(tmp_path / "part", to_arrow(nuclei_from(instances, None, CLASSES), context))
    merge_parts([(0, tmp_path / "part")], tmp_path / "nuclei.parquet", context)
    view = NucleiTiles(NucleiTable.open(tmp_path / "nuclei.parquet"))
    assert 1 / 16 < view.step < 1 / 4
    [nucleus] = unpacked(view.contours(4500 // view.tile, 0) or b"", view.step)
    assert np.abs(nucleus.contour.max(axis=0) - (8989.5, 29.5)).max() <= view.step


def test_a_harmed_table_is_said_to_be(table: NucleiTable) -> None:
    content = bytearray(table.path.read_bytes())
    content[200 : len(content) // 2] = bytes(len(content) // 2 - 200)
    table.path.write_bytes(content)
    with pytest.raises(SlideError, match="repeat the segment command"):
        NucleiTiles(table)
