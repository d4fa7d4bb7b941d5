"""Each format, read back with an independent reader: no nucleus, class or coordinate is lost."""

from __future__ import annotations

import errno
import gzip
import json
import math
import resource
import sqlite3
import uuid
import warnings
from pathlib import Path
from typing import Any

import cv2
import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from export_tables import BOUNDS, annotated, boxes_of, drawn, expected, exported, same_polygons, write_table

from hover_batch.cohort.layout import Format
from hover_batch.errors import InputError, SlideError
from hover_batch.export import annotation_store, spatial
from hover_batch.export.annotation_store import sqlite_store
from hover_batch.export.read import NucleiTable
from hover_batch.exporting import writer
from hover_batch.taxonomy import CONSEP


def qupath_faults(text: bytes, width: float, height: float) -> list[str]:
    """What QuPath 0.5 would not take, or would take for something else, in GeoJSON of nuclei."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON")

    try:
        data = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        return [str(error)]
    faults = [] if data.get("type") == "FeatureCollection" else ["no FeatureCollection"]
    seen: set[str] = set()
    for feature in data["features"]:
        properties, geometry = feature["properties"], feature["geometry"]
        identity, kind = feature.get("id", ""), properties.get("classification", {})
        ring = geometry["coordinates"][0]
        values = properties.get("measurements")
        try:
            uuid.UUID(identity)
        except ValueError:
            faults.append(f"{identity!r} is no UUID")
        if identity in seen:
            faults.append(f"{identity} is there twice")
        seen.add(identity)
        if feature.get("type") != "Feature" or geometry["type"] != "Polygon" or len(geometry["coordinates"]) != 1:
            faults.append(f"{identity} is no feature of one ring")
        if properties.get("objectType") != "detection":
            faults.append(f"{identity} would be an annotation")
        color = kind.get("color", [])
        if not kind.get("name") or len(color) != 3 or not all(type(c) is int and 0 <= c <= 255 for c in color):
            faults.append(f"{identity} has no class with a colour")
        if not isinstance(values, dict) or not all(type(v) in (int, float) for v in values.values()):
            faults.append(f"{identity} has measurements that are no numbers")
        if len(ring) < 4 or ring[0] != ring[-1]:
            faults.append(f"{identity} is not closed")
        if not all(0 <= x <= width and 0 <= y <= height for x, y in ring):
            faults.append(f"{identity} lies outside the slide")
    return faults


def test_qupath(nuclei: NucleiTable, tmp_path: Path) -> None:
    path = exported(nuclei, Format.qupath, tmp_path)
    wanted = expected(nuclei)
    text = gzip.decompress(path.read_bytes())
    dx, dy = (0, 0) if nuclei.bounds is None else (BOUNDS.x0, BOUNDS.y0)
    # The drawn nuclei left of and above the bounds are outside of what QuPath shows; they are kept none the less.
    faults = qupath_faults(text, 1000, 1000)
    inside = wanted.geometry.bounds.minx.ge(dx) & wanted.geometry.bounds.miny.ge(dy)
    assert len(faults) == (~inside).sum() and all("outside" in fault for fault in faults)

    (tmp_path / "plain.geojson").write_bytes(text)
    found = geopandas.read_file(tmp_path / "plain.geojson")
    same_polygons(found.geometry, wanted.geometry.translate(-dx, -dy))
    kinds = [json.loads(kind) if isinstance(kind, str) else kind for kind in found["classification"]]
    assert [kind["name"] for kind in kinds] == wanted["type"].tolist()
    colors = {c.name: list(c.color) for c in CONSEP.nuclei}
    assert all(kind["color"] == colors[kind["name"]] for kind in kinds)
    measured = pd.DataFrame([json.loads(m) if isinstance(m, str) else m for m in found["measurements"]])
    assert list(measured) == nuclei.measured and {"area_um2", "prob_spindle", "e_od_mean"} <= set(measured)
    pd.testing.assert_frame_equal(measured.astype(np.float32), pd.DataFrame(wanted[nuclei.measured]))

    before = path.read_bytes()
    assert exported(nuclei, Format.qupath, tmp_path).read_bytes() == before, "an export is the same again"


def test_qupath_gets_no_nan(tmp_path: Path) -> None:
    nuclei = write_table(tmp_path, *drawn(), nan=True)
    text = gzip.decompress(exported(nuclei, Format.qupath, tmp_path).read_bytes())
    assert qupath_faults(text, 400, 300) == []
    lacking = ["h_od_mean" not in f["properties"]["measurements"] for f in json.loads(text)["features"]]
    assert lacking == np.isnan(expected(nuclei).h_od_mean).tolist() and 0 < sum(lacking) < len(lacking)


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda f: f.update(id="1"), "no UUID"),
        (lambda f: f["properties"].pop("objectType"), "annotation"),
        (lambda f: f["properties"]["classification"].update(color=[-1, 0, 0]), "colour"),
        (lambda f: f["properties"]["measurements"].update(area_um2=None), "no numbers"),
        (lambda f: f["properties"]["measurements"].update(area_um2=math.nan), "no JSON"),
        (lambda f: f["geometry"]["coordinates"][0].pop(), "not closed"),
    ],
)
def test_the_judge_of_qupath_files_sees_faults(tmp_path: Path, harm: Any, fault: str) -> None:
    nuclei = write_table(tmp_path, *drawn())
    data = json.loads(gzip.decompress(exported(nuclei, Format.qupath, tmp_path).read_bytes()))
    harm(data["features"][0])
    (found,) = qupath_faults(json.dumps(data).encode(), 400, 300)
    assert fault in found


def test_hovernet_json(nuclei: NucleiTable, tmp_path: Path) -> None:
    data = json.loads(exported(nuclei, Format.hovernet, tmp_path).read_text("utf-8"))
    wanted = expected(nuclei)
    assert data["mag"] == round(40 * (1.087 if nuclei.bounds else 1))
    assert [int(number) for number in data["nuc"]] == wanted.nucleus_id.tolist()
    found = list(data["nuc"].values())
    names = {int(kind): name for kind, (name, _) in data["type_info"].items()}
    assert [names[nucleus["type"]] for nucleus in found] == wanted["type"].tolist()
    assert data["type_info"]["2"] == ["inflammatory", list(CONSEP.classes[2].color)]
    rings = [np.array([*n["contour"], n["contour"][0]]) + 0.5 for n in found]
    np.testing.assert_allclose(
        np.concatenate(rings), shapely.get_coordinates(wanted.geometry), rtol=0, atol=1e-12 * 500
    )
    centroids = np.array([nucleus["centroid"] for nucleus in found]) + 0.5
    np.testing.assert_allclose(centroids, wanted[["centroid_x", "centroid_y"]], rtol=1e-12)
    np.testing.assert_array_equal(np.array([n["type_prob"] for n in found], np.float32), wanted.type_prob)
    for nucleus, box in zip(found, boxes_of(nuclei), strict=True):
        (r0, c0), (r1, c1) = nucleus["bbox"]
        assert (r0, c0) == (math.floor(box["ymin"]), math.floor(box["xmin"]))
        assert (r1, c1) == (math.ceil(box["ymax"]), math.ceil(box["xmax"]))


def test_hovernet_json_counts_pixels_as_hover_net_does(data: Path, tmp_path: Path) -> None:
    """Contours drawn by OpenCV, as hover_net's own tools draw them, cover the annotated pixels; boxes cut them out."""
    instances, types = annotated(data)
    nuclei = write_table(tmp_path, instances, types)
    found = json.loads(exported(nuclei, Format.hovernet, tmp_path).read_text("utf-8"))["nuc"].values()
    whole = 0
    for nucleus in found:
        (r0, c0), (r1, c1) = nucleus["bbox"]
        x, y = (math.floor(v + 0.5) for v in nucleus["centroid"])
        assert r0 <= y < r1 and c0 <= x < c1
        contour = np.array(nucleus["contour"])
        if contour.dtype == np.int64:
            whole += 1
            drawing = np.zeros((r1 - r0, c1 - c0), np.uint8)
            cv2.drawContours(drawing, [contour.astype(np.int32) - [c0, r0]], 0, (1,), cv2.FILLED)
            crop = instances[r0:r1, c0:c1]
            label = np.bincount(crop[drawing > 0]).argmax()
            assert (drawing[crop == label] > 0).mean() > 0.99
    assert whole > 0.95 * len(found)


def test_annotation_store(nuclei: NucleiTable, tmp_path: Path) -> None:
    path = exported(nuclei, Format.annotation_store, tmp_path)
    wanted = expected(nuclei)
    store = reader()(path)
    try:
        found = dict(store.items())
        same_polygons([a.geometry for a in found.values()], wanted.geometry)
        properties = pd.DataFrame([a.properties for a in found.values()])
        assert properties["type"].tolist() == wanted["type"].tolist()
        pd.testing.assert_frame_equal(
            properties[nuclei.measured].astype(np.float32), pd.DataFrame(wanted[nuclei.measured])
        )
        assert properties.seam_uncertain.tolist() == wanted.seam_uncertain.tolist()
        some = store.query((100, 100, 200, 200), where="props['type'] == 'epithelial'")
        meets = wanted.geometry.intersects(shapely.box(100, 100, 200, 200)) & wanted["type"].eq("epithelial")
        assert {a.properties["nucleus_id"] for a in some.values()} == set(wanted.nucleus_id[meets])
    finally:
        store.close()
    features = json.loads(gzip.decompress(exported(nuclei, Format.qupath, tmp_path).read_bytes()))["features"]
    assert list(found) == [feature["id"] for feature in features], "a nucleus has one UUID in all formats"


def reader() -> Any:
    """tiatoolbox's own SQLiteStore, where Python lets it read."""
    from tiatoolbox.annotation.storage import SQLiteStore

    return SQLiteStore if hasattr(sqlite3.Connection, "enable_load_extension") else sqlite_store()


def test_without_a_spatial_index_the_annotation_store_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_store, "_compile_options", lambda: ["ENABLE_JSON1"])
    with pytest.raises(InputError, match=r"--to annotation-store: .*R\*Tree.*use a Python"):
        writer(Format.annotation_store)


def test_an_annotation_store_that_does_not_fit_on_the_disk(
    nuclei: NucleiTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(sqlite_store()):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self.con.execute("PRAGMA max_page_count = 20")  # to SQLite, as a full disk

    monkeypatch.setattr(annotation_store, "sqlite_store", lambda: Small)
    with pytest.raises(OSError) as raised:
        exported(nuclei, Format.annotation_store, tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.glob("*.db")) and not list(tmp_path.glob(".*"))
    with pytest.raises(OSError, match="unable to open"):
        exported(nuclei, Format.annotation_store, tmp_path / "absent")


def test_csv(nuclei: NucleiTable, tmp_path: Path) -> None:
    found = pd.read_csv(exported(nuclei, Format.csv, tmp_path), float_precision="round_trip")
    wanted = expected(nuclei)
    columns = [name for name in wanted.columns if name != "geometry"]
    assert [name for name in found if name not in ("xmin", "ymin", "xmax", "ymax")] == columns
    pd.testing.assert_frame_equal(found[columns].astype(wanted[columns].dtypes), pd.DataFrame(wanted[columns]))
    boxes = pd.DataFrame(boxes_of(nuclei))
    pd.testing.assert_frame_equal(found[list(boxes)].astype(np.float64), boxes)


def anndata_is(found: Any, nuclei: NucleiTable, wanted: geopandas.GeoDataFrame) -> None:
    assert found.shape == (nuclei.rows, len(nuclei.measured)) and found.var_names.tolist() == nuclei.measured
    np.testing.assert_array_equal(found.X, wanted[nuclei.measured].to_numpy())
    assert found.obs["type"].tolist() == wanted["type"].tolist()
    assert found.obs["type"].cat.categories.tolist() == [c.name for c in CONSEP.nuclei]
    assert list(found.uns["type_colors"]) == ["#e6be00", "#00a03c", "#dc1e28", "#1e5ae6"]
    np.testing.assert_array_equal(found.obs["nucleus_id"], wanted.nucleus_id)
    np.testing.assert_array_equal(found.obsm["spatial"], wanted[["centroid_x", "centroid_y"]].to_numpy())
    assert found.obs_names.is_unique


@pytest.fixture
def scverse() -> Any:
    """The module spatialdata. Its dependencies warn at import, and its readers of themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("spatialdata")


def test_anndata(nuclei: NucleiTable, tmp_path: Path, scverse: Any) -> None:
    import anndata

    anndata_is(anndata.read_h5ad(exported(nuclei, Format.anndata, tmp_path)), nuclei, expected(nuclei))


def test_spatialdata(nuclei: NucleiTable, tmp_path: Path, scverse: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        path = exported(nuclei, Format.spatialdata, tmp_path)
    exported(nuclei, Format.spatialdata, tmp_path)  # replaces the first
    wanted = expected(nuclei)
    found = scverse.read_zarr(path)
    anndata_is(found["table"], nuclei, wanted)
    same_polygons(found["nuclei"].geometry, wanted.geometry)
    joined, table = scverse.join_spatialelement_table(
        sdata=found, spatial_element_names="nuclei", table_name="table", how="inner"
    )
    assert len(joined["nuclei"]) == table.n_obs == nuclei.rows, "the table annotates the polygons"
    um = scverse.transform(found["nuclei"], to_coordinate_system="um")
    np.testing.assert_allclose(um.area, wanted.area * nuclei.mpp.x * nuclei.mpp.y, rtol=1e-9)


def test_without_the_extra_its_formats_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spatial, "find_spec", lambda name: None)
    for format in (Format.spatialdata, Format.anndata):
        with pytest.raises(InputError, match=r"pip install 'hover-batch\[spatialdata\]'"):
            writer(format)


@pytest.mark.parametrize("format", Format)
def test_a_slide_without_nuclei(format: Format, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if format in (Format.spatialdata, Format.anndata):
        request.getfixturevalue("scverse")
    empty = np.zeros((50, 60), np.int32)
    nuclei = write_table(tmp_path, empty, empty.astype(np.uint8))
    path = exported(nuclei, format, tmp_path)
    match format:
        case Format.qupath:
            assert json.loads(gzip.decompress(path.read_bytes())) == {"type": "FeatureCollection", "features": []}
        case Format.hovernet:
            assert json.loads(path.read_text())["nuc"] == {}
        case Format.csv:
            assert len(pd.read_csv(path)) == 0
        case Format.annotation_store:
            store = reader()(path)
            assert len(store) == 0
            store.close()
        case _:
            assert path.exists()


@pytest.mark.parametrize("format", Format)
def test_what_does_not_fit_on_the_disk_leaves_nothing(
    format: Format, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if format in (Format.anndata, Format.spatialdata):
        request.getfixturevalue("scverse")
    nuclei, out = write_table(tmp_path, *drawn()), tmp_path / "out"
    out.mkdir()
    write = writer(format)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # no file may be longer
    try:
        with pytest.raises(OSError):
            write(nuclei, out / f"nuclei.{format.suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(out.iterdir())


def test_a_harmed_table_leaves_the_earlier_export(nuclei: NucleiTable, tmp_path: Path) -> None:
    path = exported(nuclei, Format.qupath, tmp_path)
    before = path.read_bytes()
    with pq.ParquetFile(nuclei.path) as file:
        column = file.schema_arrow.names.index("geometry") + 3  # bbox is four columns
        where = file.metadata.row_group(0).column(column)
        assert where.path_in_schema == "geometry"
    with nuclei.path.open("r+b") as file:
        file.seek(where.data_page_offset + 40)
        file.write(b"\xff" * 400)
    for _ in range(2):
        with pytest.raises(SlideError, match=r"nuclei\.parquet: .*repeat the segment command"):
            exported(nuclei, Format.qupath, tmp_path)
    assert path.read_bytes() == before
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no table PAR1"])
def test_what_is_no_table_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "nuclei.parquet").write_bytes(content)
    fault = "is missing" if content is None else "cannot be read as a table of nuclei"
    with pytest.raises(SlideError, match=rf"nuclei\.parquet: {fault}"):
        NucleiTable.open(tmp_path / "nuclei.parquet")


def rewritten(nuclei: NucleiTable, change: Any) -> NucleiTable:
    """The table with other rows and columns, and what its metadata say."""
    with pq.ParquetFile(nuclei.path) as file:
        table, about = change(file.read()), file.metadata.metadata
    pq.write_table(table.replace_schema_metadata({b"hover_batch": about[b"hover_batch"]}), nuclei.path)
    return NucleiTable.open(nuclei.path)


def test_a_table_of_other_columns_or_classes_is_refused(tmp_path: Path) -> None:
    nuclei = write_table(tmp_path, *drawn())
    where = nuclei.schema.get_field_index("type_id")
    beyond = pa.array([9] * nuclei.rows, pa.uint8())
    harmed = rewritten(nuclei, lambda t: t.set_column(where, t.schema.field("type_id"), beyond))
    with pytest.raises(SlideError, match="type_id above 4, the last of its classes"):
        list(harmed.batches(["type_id"]))
    with pytest.raises(SlideError, match="no column geometry, solidity"):
        rewritten(nuclei, lambda t: t.drop_columns(["solidity", "geometry"]))
    pq.write_table(pa.table({"a": [1]}), nuclei.path)
    with pytest.raises(SlideError, match="is not a table of nuclei; give the nuclei.parquet"):
        NucleiTable.open(nuclei.path)


def test_the_guide_has_every_format_and_its_cost() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    contents, costs = (table.split("\n\n")[0] for table in guide.split("\n| `--to` |")[1:])
    for format in Format:
        assert f"`{format}`" in contents and f"\n| `{format}` |" in costs


def test_numbers_are_short_and_bring_back_the_same(tmp_path: Path) -> None:
    nuclei = write_table(tmp_path, *drawn())
    (batch,) = nuclei.batches()
    found = pd.DataFrame(nuclei.measurements(batch))
    assert max(len(repr(value)) for value in found.to_numpy().ravel().tolist()) <= 14
    for name in nuclei.measured:
        np.testing.assert_array_equal(found[name].astype(np.float32), batch[name].to_numpy())
    assert len(nuclei.polygons(batch)) == nuclei.rows
