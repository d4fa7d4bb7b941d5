"""OME-Zarr label images: the pixels of the instances, whatever the shards, and metadata as ome-zarr reads it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import zarr
from export_tables import BOUNDS, annotated, drawn, expected, exported, write_table
from numpy.typing import NDArray
from scipy import ndimage

from hover_batch.cohort.layout import Format
from hover_batch.errors import SlideError
from hover_batch.export import ome_zarr, read
from hover_batch.export.read import NucleiTable
from hover_batch.taxonomy import CONSEP


def level(path: Path, name: str, number: int = 0) -> NDArray[Any]:
    return np.asarray(zarr.open_array(path / name / str(number), mode="r")[:])


def test_annotated_instances_come_back(data: Path, tmp_path: Path) -> None:
    """Except for holes, and for parts beside the largest, which outlines do not have."""
    instances, types = annotated(data)
    nuclei = write_table(tmp_path, instances, types)
    path = exported(nuclei, Format.ome_zarr, tmp_path)
    found, kinds = level(path, "nuclei"), level(path, "types")
    assert (found.dtype, kinds.dtype) == (np.uint32, np.uint8)
    assert np.mean((found > 0) == (instances > 0)) > 0.999
    whole = 0
    size_of = np.bincount(instances.ravel())
    for (nucleus_id, kind), place in zip(
        expected(nuclei)[["nucleus_id", "type_id"]].to_numpy(), ndimage.find_objects(found), strict=True
    ):
        pixels = found[place] == nucleus_id
        labels = instances[place][pixels]
        whole += (labels == labels[0]).all() and len(labels) == size_of[labels[0]]
        assert (kinds[place][pixels] == kind).all()
    assert whole > 0.98 * nuclei.rows


def test_pixels_whose_centre_is_in_the_outline(nuclei: NucleiTable, tmp_path: Path) -> None:
    """By definition, on a slide of other pixels, too; the last of overlapping nuclei owns a pixel."""
    found = level(exported(nuclei, Format.ome_zarr, tmp_path), "nuclei")
    grid = nuclei.grid
    wanted = np.zeros(found.shape, np.uint32)
    y, x = (np.indices(found.shape) + 0.5) * np.array([grid.scale_y, grid.scale_x])[:, None, None]
    for nucleus_id, polygon in zip(*expected(nuclei)[["nucleus_id", "geometry"]].to_numpy().T, strict=True):
        x0, y0, x1, y1 = polygon.bounds
        near = np.s_[int(y0 / grid.scale_y) : int(y1 / grid.scale_y) + 2, int(x0 / grid.scale_x) :]
        near = near[0], slice(near[1].start, int(x1 / grid.scale_x) + 2)
        grown = shapely.buffer(polygon, 1e-6, quad_segs=1)  # on the outline counts as inside
        wanted[near][shapely.intersects_xy(grown, x[near], y[near])] = nucleus_id
    np.testing.assert_array_equal(found, wanted)
    assert len(np.unique(found)) > 0.9 * nuclei.rows


@pytest.fixture
def few(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NucleiTable:
    """As `nuclei`, but on a corner of the annotated image, since each shard is several files."""
    monkeypatch.setattr(read, "BATCH", 30)
    if request.param == "drawn":
        return write_table(tmp_path, *drawn(), scale=1.087, bounds=BOUNDS)
    instances, types = (np.ascontiguousarray(array[:400, :300]) for array in annotated(request.getfixturevalue("data")))
    table = write_table(tmp_path, instances, types)
    assert table.rows > 2 * read.BATCH
    return table


@pytest.mark.parametrize(("few", "shard"), [("annotated", 64), ("drawn", 256)], indirect=["few"])
def test_pixels_do_not_depend_on_shards(
    few: NucleiTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int
) -> None:
    whole = exported(few, Format.ome_zarr, tmp_path).rename(tmp_path / "whole")
    monkeypatch.setattr(ome_zarr, "SHARD", shard)
    monkeypatch.setattr(ome_zarr, "CHUNK", 32)
    monkeypatch.setattr(ome_zarr, "_SMALLEST", 100)
    path = exported(few, Format.ome_zarr, tmp_path)
    numbers = sorted(int(entry.name) for entry in (path / "nuclei").iterdir() if entry.is_dir())
    assert len(numbers) > 2
    for name in ("nuclei", "types"):
        base = level(whole, name)
        for number in numbers:
            np.testing.assert_array_equal(level(path, name, number), base[:: 2**number, :: 2**number])


def test_a_nucleus_in_the_hole_of_another_keeps_its_pixels(tmp_path: Path) -> None:
    instances = np.zeros((60, 60), np.int32)
    instances[10:50, 10:50] = 1
    instances[20:40, 20:40] = 0
    instances[25:35, 25:35] = 2
    nuclei = write_table(tmp_path, instances, (instances > 0).astype(np.uint8))
    found = level(exported(nuclei, Format.ome_zarr, tmp_path), "nuclei")
    np.testing.assert_array_equal(found == 2, instances == 2)


def test_ome_zarr_s_own_readers_accept_it(nuclei: NucleiTable, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their dependencies warn at import
        reader, io = pytest.importorskip("ome_zarr.reader"), pytest.importorskip("ome_zarr.io")
        models = pytest.importorskip("ome_zarr_models.v05")
    path = exported(nuclei, Format.ome_zarr, tmp_path)
    group = zarr.open_group(path, mode="r")
    models.Labels.from_zarr(group)
    for name in ("nuclei", "types"):
        models.ImageLabel.from_zarr(group[name])
    _, ids, types = list(reader.Reader(io.parse_url(path))())
    np.testing.assert_array_equal(ids.data[0].compute(), level(path, "nuclei"))
    assert types.metadata["color"] == {c.id: [v / 255 for v in (*c.color, 255)] for c in CONSEP.nuclei}
    assert types.metadata["properties"] == {c.id: {"name": c.name} for c in CONSEP.nuclei}
    assert [axis["unit"] for axis in ids.metadata["axes"]] == ["micrometer"] * 2
    # The centre of an inference pixel, in µm from the centre of the first level-0 pixel.
    scale, shift = ids.metadata["coordinateTransformations"][0]
    row = 40
    in_level0 = (row + 0.5) * nuclei.grid.scale_y - 0.5
    assert row * scale["scale"][0] + shift["translation"][0] == pytest.approx(in_level0 * nuclei.mpp.y)


def test_a_table_in_another_order_is_refused(tmp_path: Path) -> None:
    nuclei = write_table(tmp_path, *drawn())
    table = pq.read_table(nuclei.path)
    pq.write_table(table.take(np.arange(nuclei.rows)[::-1]), nuclei.path)
    with pytest.raises(SlideError, match=r"not in their order.*repeat the segment command"):
        exported(nuclei, Format.ome_zarr, tmp_path)
    assert not list(tmp_path.glob("*.zarr"))
