"""Tables: positions are exact, bytes depend only on the nuclei, and other libraries can read the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from annotated import nuclei_from, take
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hover_batch.errors import SlideError
from hover_batch.export.read import NucleiTable
from hover_batch.geometry import Box, Grid, Mpp, Size
from hover_batch.nuclei import table
from hover_batch.nuclei.table import TableContext, merge_parts, table_schema, to_arrow, write_part
from hover_batch.taxonomy import CONSEP
from hover_batch.uncertainty import BetaScaling


def blobs(side: int, seed: int) -> NDArray[np.int32]:
    """Instance map (side, side) of rectangles, single pixels and lines, some at the map's edges."""
    random = np.random.default_rng(seed)
    instances = np.zeros((side, side), np.int32)
    for label, (x, y) in enumerate(random.integers(0, side, (side, 2)), start=1):
        width, height = random.integers(1, 12, 2)
        free = instances[y : y + height, x : x + width]
        free[free == 0] = label
    return instances


SIDE = Size(200, 200)


def context(scale: float = 1.0, size: Size = SIDE, bounds: Box | None = None) -> TableContext:
    # A model of 0.25 µm over a slide so many times finer (scale 0.5: a coarser one).
    level0 = Size(round(size.width * scale), round(size.height * scale))
    slide_mpp = Mpp(0.25 / scale, 0.25 / scale)
    grid = Grid(level0, scale, scale, Mpp(0.25, 0.25), size)
    return TableContext("slide-1", CONSEP, grid, slide_mpp, "file", bounds, "starter", "ab" * 32, "0.1.0")


@pytest.fixture(scope="module")
def nuclei() -> SimpleNamespace:
    instances = blobs(200, seed=1)
    return nuclei_from(instances, (instances % 5).astype(np.uint8), 5)


def merged(tmp_path: Path, nuclei: SimpleNamespace, ctx: TableContext) -> Path:
    write_part(tmp_path / "part.parquet", to_arrow(nuclei, ctx))
    merge_parts([(0, tmp_path / "part.parquet")], tmp_path / "nuclei.parquet", ctx)
    return tmp_path / "nuclei.parquet"


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.087])
def test_positions_survive_exactly(tmp_path: Path, nuclei: SimpleNamespace, scale: float) -> None:
    frame = geopandas.read_parquet(merged(tmp_path, nuclei, context(scale)))
    assert len(frame) == len(nuclei.area_px) > 100
    np.testing.assert_array_equal(frame.centroid_x, nuclei.centroid_x * scale)
    np.testing.assert_array_equal(frame.centroid_y, nuclei.centroid_y * scale)
    for polygon, contour in zip(frame.geometry, nuclei.contours, strict=True):
        np.testing.assert_array_equal(shapely.get_coordinates(polygon), contour * scale)


def test_the_two_axes_have_their_own_scales(tmp_path: Path, nuclei: SimpleNamespace) -> None:
    grid = Grid(Size(400, 100), 2.0, 0.5, Mpp(0.2, 0.8), Size(200, 200))
    part = to_arrow(nuclei, TableContext("s", CONSEP, grid, Mpp(0.1, 1.6), "csv", None, "m", "0", "0"))
    rings = shapely.get_coordinates(shapely.from_wkb(part["geometry"].to_numpy()))
    np.testing.assert_array_equal(rings, np.concatenate(nuclei.contours) * [2.0, 0.5])
    np.testing.assert_array_equal(part["area_um2"], (nuclei.area_px * (0.2 * 0.8)).astype(np.float32))
    np.testing.assert_allclose(part["perimeter_um"], nuclei.perimeter_px * 0.4, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.087])
def test_polygons_are_valid_and_covered_by_bbox(tmp_path: Path, nuclei: SimpleNamespace, scale: float) -> None:
    path = merged(tmp_path, nuclei, context(scale))
    read = pq.read_table(path)
    polygons = shapely.from_wkb(read["geometry"].to_numpy())
    assert shapely.is_valid(polygons).all()
    assert set(shapely.get_type_id(polygons)) == {shapely.GeometryType.POLYGON}
    x0, y0, x1, y1 = (np.array(member) for member in read["bbox"].combine_chunks().flatten())
    bounds = shapely.bounds(polygons)
    assert (x0 <= bounds[:, 0]).all() and (y0 <= bounds[:, 1]).all()
    assert (x1 >= bounds[:, 2]).all() and (y1 >= bounds[:, 3]).all()
    assert (shapely.area(polygons) > 0).all()


def test_columns_and_types(tmp_path: Path, nuclei: SimpleNamespace) -> None:
    schema = pq.read_schema(merged(tmp_path, nuclei, context()))
    assert schema.equals(table_schema(CONSEP))
    before = ["slide_id", "nucleus_id", "centroid_x", "centroid_y", "bbox", "type_id", "type", "type_prob"]
    probs = ["prob_miscellaneous", "prob_inflammatory", "prob_epithelial", "prob_spindle"]
    sizes = ["seg_score", "area_um2", "perimeter_um", "major_axis_um", "minor_axis_um", "eccentricity", "solidity"]
    after = ["h_od_mean", "e_od_mean", "touches_border", "seam_uncertain", "geometry"]
    assert schema.names == before + probs + sizes + after


def test_calibrated_columns_stand_beside_the_raw_ones(tmp_path: Path, nuclei: SimpleNamespace) -> None:
    scaling = BetaScaling(0.5, 1.5, -0.3)
    path = merged(tmp_path, nuclei, replace(context(), scalings={"seg_score": scaling}))
    table = NucleiTable.open(path)
    assert table.calibrated == ["seg_score"] and table.schema == table_schema(CONSEP, ["seg_score"])
    read = pq.read_table(path)
    position = read.column_names.index("seg_score")
    assert read.column_names[position + 1] == "seg_score_calibrated" and "type_prob_calibrated" not in read.column_names
    expected = scaling.apply(read["seg_score"].to_numpy()).astype(np.float32)
    np.testing.assert_array_equal(read["seg_score_calibrated"].to_numpy(), expected)


def test_values_are_in_their_columns(tmp_path: Path, nuclei: SimpleNamespace) -> None:
    frame = geopandas.read_parquet(merged(tmp_path, nuclei, context()))
    np.testing.assert_array_equal(frame.nucleus_id, np.arange(1, len(nuclei.area_px) + 1))
    assert set(frame.slide_id) == {"slide-1"}
    assert frame["type"].tolist() == [CONSEP.classes[i].name for i in nuclei.type_id]
    for name, field in {"h_od_mean": "h_od", "e_od_mean": "e_od", "solidity": "solidity", "type_id": "type_id"}.items():
        np.testing.assert_array_equal(frame[name], getattr(nuclei, field))
    for name, field in {"major_axis_um": "major_axis_px", "minor_axis_um": "minor_axis_px"}.items():
        np.testing.assert_allclose(frame[name], getattr(nuclei, field) * 0.25, rtol=1e-6)
    probs = frame[[f"prob_{c.name}" for c in CONSEP.nuclei]].to_numpy()
    np.testing.assert_array_equal(probs, nuclei.class_probs)
    at_edge = (nuclei.bbox[:, :2] == 0).any(axis=1) | (nuclei.bbox[:, 2:] == 200).any(axis=1)
    assert 0 < at_edge.sum() < len(at_edge)
    np.testing.assert_array_equal(frame.touches_border, at_edge)
    np.testing.assert_array_equal(frame.seam_uncertain, nuclei.seam_uncertain)


def test_file_metadata(tmp_path: Path, nuclei: SimpleNamespace) -> None:
    path = merged(tmp_path, nuclei, context(1.087, bounds=Box(10, 20, 110, 120)))
    written = pq.ParquetFile(path).metadata.metadata
    geo = json.loads(written[b"geo"])
    assert (geo["version"], geo["primary_column"]) == ("1.1.0", "geometry")
    column = geo["columns"]["geometry"]
    assert column["crs"] is None and column["encoding"] == "WKB" and column["geometry_types"] == ["Polygon"]
    assert column["covering"]["bbox"]["ymax"] == ["bbox", "ymax"]
    assert column["bbox"] == [v * 1.087 for v in (*nuclei.bbox[:, :2].min(axis=0), *nuclei.bbox[:, 2:].max(axis=0))]
    ours = json.loads(written[b"hover_batch"])
    assert ours["bounds"] == {"x0": 10, "y0": 20, "x1": 110, "y1": 120}
    assert ours["mpp"] == {"x": 0.25 / 1.087, "y": 0.25 / 1.087} and ours["mpp_source"] == "file"
    assert ours["inference_scale"] == {"x": 1.087, "y": 1.087} and ours["inference_mpp"] == {"x": 0.25, "y": 0.25}
    assert ours["level0"] == {"width": 217, "height": 217}
    assert ours["taxonomy"] == CONSEP.to_json()
    assert ours["model"] == {"id": "starter", "sha256": "ab" * 32}
    assert (ours["schema_version"], ours["software"]) == (1, "0.1.0")


def test_geopandas_reads_a_field_by_bbox(tmp_path: Path, nuclei: SimpleNamespace) -> None:
    path = merged(tmp_path, nuclei, context())
    frame = geopandas.read_parquet(path)
    assert frame.crs is None
    inside = geopandas.read_parquet(path, bbox=(50, 50, 100, 100))
    x0, y0, x1, y1 = nuclei.bbox.T
    assert len(inside) == ((x0 <= 100) & (x1 >= 50) & (y0 <= 100) & (y1 >= 50)).sum()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts_y=st.sets(st.integers(1, 199), max_size=4),
    cuts_x=st.lists(st.sets(st.integers(1, 199), max_size=3), min_size=5, max_size=5),
    shuffled=st.randoms(use_true_random=False),
)
def test_bytes_do_not_depend_on_the_regions(
    tmp_path: Path,
    nuclei: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    cuts_y: set[int],
    cuts_x: list[set[int]],
    shuffled: st.randoms,
) -> None:
    monkeypatch.setattr(table, "ROW_GROUP", 37)  # so that groups span regions and regions span groups
    ctx = context(1.087)
    whole = merged(tmp_path, nuclei, ctx).read_bytes()
    assert pq.ParquetFile(tmp_path / "nuclei.parquet").metadata.row_group(0).num_rows == 37
    parts = []
    edges = [0, *sorted(cuts_y), 200]
    for row, (y0, y1) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        columns = [0, *sorted(cuts_x[row]), 200]
        for column, (x0, x1) in enumerate(zip(columns[:-1], columns[1:], strict=True)):
            a_y, a_x = nuclei.anchor_y, nuclei.anchor_x
            part = to_arrow(take(nuclei, (a_y >= y0) & (a_y < y1) & (a_x >= x0) & (a_x < x1)), ctx)
            parts.append((row, tmp_path / f"{row}-{column}.parquet"))
            write_part(parts[-1][1], part)
    shuffled.shuffle(parts)
    result = merge_parts(parts, tmp_path / "cut.parquet", ctx)
    assert (tmp_path / "cut.parquet").read_bytes() == whole
    assert result.nuclei == len(nuclei.area_px)
    assert result.seam_uncertain == nuclei.seam_uncertain.sum()


def test_select_chooses_by_level0_centroid(tmp_path: Path, nuclei: SimpleNamespace) -> None:
    ctx = context(0.5)
    write_part(tmp_path / "part.parquet", to_arrow(nuclei, ctx))
    out = tmp_path / "nuclei.parquet"
    result = merge_parts([(0, tmp_path / "part.parquet")], out, ctx, select=lambda x, y: (x < 50) & (y >= 20))
    left = pq.read_table(out)
    expected = (nuclei.centroid_x * 0.5 < 50) & (nuclei.centroid_y * 0.5 >= 20)
    np.testing.assert_array_equal(left["centroid_x"], nuclei.centroid_x[expected] * 0.5)
    np.testing.assert_array_equal(left["nucleus_id"], np.arange(1, expected.sum() + 1))
    assert result.nuclei == expected.sum() < len(expected)


def test_a_slide_without_nuclei_has_a_table(tmp_path: Path) -> None:
    empty = nuclei_from(np.zeros((9, 9), np.int32), None, 5)
    write_part(tmp_path / "part.parquet", to_arrow(empty, context()))
    for parts in ([], [(0, tmp_path / "part.parquet")]):
        result = merge_parts(parts, tmp_path / "out.parquet", context())
        assert (result.nuclei, result.seam_uncertain) == (0, 0)
        assert len(geopandas.read_parquet(tmp_path / "out.parquet")) == 0
        assert pq.read_schema(tmp_path / "out.parquet").equals(table_schema(CONSEP))


def test_the_same_nucleus_twice_is_refused(tmp_path: Path, nuclei: SimpleNamespace) -> None:
    write_part(tmp_path / "part.parquet", to_arrow(nuclei, context()))
    for rows in ((0, 0), (0, 1)):
        with pytest.raises(SlideError, match="remove that folder"):
            merge_parts([(row, tmp_path / "part.parquet") for row in rows], tmp_path / "out.parquet", context())
        assert [path.name for path in tmp_path.iterdir()] == ["part.parquet"]


def test_row_groups_have_a_fixed_length() -> None:
    pieces = [pa.table({"n": np.arange(start, stop)}) for start, stop in ((0, 3), (3, 3), (3, 25), (25, 31), (31, 40))]
    groups = list(table._cut(pieces, 10))
    assert [len(group) for group in groups] == [10, 10, 10, 10]
    np.testing.assert_array_equal(pa.concat_tables(groups)["n"], np.arange(40))
    assert [len(group) for group in table._cut(pieces[:3], 10)] == [10, 10, 5]


def test_annotated_nuclei_read_back(tmp_path: Path, data: Path) -> None:
    import cv2

    instances = cv2.imread(str(data / "nuclei" / "labels" / "consep_train_01.png"), cv2.IMREAD_UNCHANGED)
    annotated = nuclei_from(instances, None, 5)
    frame = geopandas.read_parquet(merged(tmp_path, annotated, context(1.087, Size(1000, 1000))))
    assert len(frame) == len(np.unique(instances)) - 1
    assert frame.geometry.is_valid.all()
    # The centroid of a nucleus lies in the box of its polygon, or the axes are swapped.
    bounds = frame.bounds
    assert (frame.centroid_x.between(bounds.minx - 1, bounds.maxx + 1)).all()
    assert (frame.centroid_y.between(bounds.miny - 1, bounds.maxy + 1)).all()
