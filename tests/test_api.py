"""The Python API on real H&E gives the results of the command."""

from __future__ import annotations

import shutil
from pathlib import Path

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from PIL import Image

import hover_batch
from hover_batch.errors import InputError, PackageError, SlideError
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.energy import mask_hv
from hover_batch.slide.example import _field, write_example, write_pyramidal_tiff
from hover_batch.store import PredictionStore

SETTINGS = {"backend": "local", "unit": 512, "tissue": "all"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nuclei.parquet of the real field at 0.5 µm, so that the slide's pixels are not the network's."""
    folder = tmp_path_factory.mktemp("api")
    write_example(folder)
    return hover_batch.segment_slide(folder / "he_0.5.tif", folder / "out", slide_id="he", **SETTINGS)


@pytest.fixture(scope="module")
def model() -> hover_batch.Model:
    """The starter in the default runtime, for which it is compiled in seconds."""
    return hover_batch.load_model()


def test_a_slide_and_its_table(table: Path) -> None:
    assert table == table.parents[2] / "slides" / "he" / "nuclei.parquet"
    nuclei = hover_batch.load_nuclei(table)
    assert len(nuclei) == pq.read_metadata(table).num_rows > 300
    assert hover_batch.load_nuclei(table.parent).equals(nuclei)
    read = geopandas.read_parquet(table)
    assert set(nuclei.columns) == set(read.columns)
    assert np.array_equal(shapely.to_wkb(nuclei["geometry"]), shapely.to_wkb(read["geometry"]))
    ours = geopandas.GeoDataFrame(nuclei)
    assert ours.geometry.is_valid.all() and ours.total_bounds[2] <= 500
    assert nuclei.groupby("type", observed=True).area_um2.median().between(5, 100).all()
    about = nuclei.attrs["hover_batch"]
    assert about["mpp"] == {"x": 0.5, "y": 0.5} and about["model"]["id"] == "starter"


def test_the_same_call_does_nothing_again(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = table.stat().st_mtime_ns
    slide, out = table.parents[3] / "he_0.5.tif", table.parents[2]
    assert hover_batch.segment_slide(slide, out, slide_id="he", **SETTINGS) == table
    assert table.stat().st_mtime_ns == before and "done before" in capsys.readouterr().err
    with pytest.raises(InputError, match="halo: 64 → 32"):
        hover_batch.segment_slide(slide, out, slide_id="he", halo=32, **SETTINGS)


def test_predictions_have_named_maps(table: Path) -> None:
    maps = hover_batch.load_predictions(table.parent)
    stored = PredictionStore.open(table.parent / "predictions.zarr", read_only=True).array
    assert maps.np.shape == stored.shape[1:] == (1000, 1000)
    assert len(repr(maps)) < 1000, "a notebook prints it"
    assert (maps.mpp.x, maps.level0_per_pixel, maps.level0.width, maps.bounds) == (0.25, (0.5, 0.5), 500, None)
    layout = MapLayout(5)
    window = np.s_[100:300, 640:700]
    assert maps.np[window].dtype == np.float32 and maps.np[window].shape == (200, 60)
    assert np.array_equal(maps.np[window] >= 0.5, stored[layout.NP][window] >= layout.NP_NUCLEUS)
    h = maps.h[window]
    assert h.min() < -0.5 and h.max() > 0.5 and np.abs(h).max() <= 1.01
    assert np.array_equal(np.asarray(maps.v), np.asarray(stored[layout.V]).view(np.int8) / np.float32(127))
    assert list(maps.classes) == ["background", "miscellaneous", "inflammatory", "epithelial", "spindle"]
    near = maps.np[window] >= 0.25
    total = sum(plane[window] for plane in maps.classes.values())
    assert np.allclose(total[near], 1, atol=0.02) and not total[~near].any()
    # A nucleus is dark in hematoxylin, and lies where the table says.
    nucleus = hover_batch.load_nuclei(table).nlargest(1, "seg_score").iloc[0]
    x, y = (int(nucleus[f"centroid_{axis}"] / maps.level0_per_pixel[0]) for axis in "xy")
    assert maps.np[y, x] > 0.5 and maps.hematoxylin[y, x] > 0
    assert maps.eosin[y, :].shape == (1000,)


def test_a_model_finds_the_nuclei_of_a_run_in_an_image(table: Path, model: hover_batch.Model) -> None:
    field = _field()[200:800, 100:900]
    instances, nuclei = model.nuclei(field)
    assert instances.shape == (600, 800) and len(nuclei) == instances.max() > 100
    assert list(nuclei["nucleus_id"]) == list(range(1, len(nuclei) + 1))
    assert list(nuclei.columns) == list(hover_batch.load_nuclei(table).columns)
    for row in nuclei.iloc[:: len(nuclei) // 20].itertuples():
        pixels = np.argwhere(instances == row.nucleus_id)
        assert np.allclose(pixels.mean(0) + 0.5, [row.centroid_y, row.centroid_x])
        assert np.isclose(len(pixels) * model.card.mpp**2, row.area_um2)
        assert row.geometry.bounds[0] >= pixels[:, 1].min()


def test_maps_of_an_image_are_those_of_a_slide(tmp_path: Path, model: hover_batch.Model) -> None:
    """Where the network sees the same surroundings, byte for byte: the border is mirrored otherwise in a slide.

    The image's maps are whole; a slide's h and v are stored near nuclei only.
    """
    field = _field()[:600, :600]
    write_pyramidal_tiff(tmp_path / "he.tif", field, 0.25)
    table = hover_batch.segment_slide(tmp_path / "he.tif", tmp_path / "out", **SETTINGS)
    stored = PredictionStore.open(table.parent / "predictions.zarr", read_only=True).array
    maps = model.predict(field)
    assert maps.shape == stored.shape
    inner = np.s_[:, 256:512, 256:512]
    assert not np.array_equal(maps[inner], stored[inner])
    mask_hv(maps[:, :512, :512])  # in place: the first unit
    assert maps[inner].any() and np.array_equal(maps[inner], stored[inner])


def test_an_image_without_nuclei(model: hover_batch.Model) -> None:
    instances, nuclei = model.nuclei(np.full((100, 130, 3), 245, np.uint8))
    assert not instances.any() and len(nuclei) == 0 and "area_um2" in nuclei


def test_invalid_arguments_are_refused(tmp_path: Path, model: hover_batch.Model) -> None:
    picture = tmp_path / "tile.png"
    Image.fromarray(np.full((64, 64, 3), 245, np.uint8)).save(picture)
    with pytest.raises(InputError, match="mpp"):
        hover_batch.segment_slide(picture, tmp_path / "out", backend="local")
    with pytest.raises(InputError, match="none.svs"):
        hover_batch.segment_slide(tmp_path / "none.svs", tmp_path / "out", backend="local")
    with pytest.raises(InputError, match="setting bach is not known; known are .*batch"):
        hover_batch.segment_slide(picture, tmp_path / "out", mpp=0.25, bach=3)
    for name, message in (("nobodys", "no such package"), (" ", "--model: is empty; give the name or path")):
        with pytest.raises(PackageError, match=message):
            hover_batch.segment_slide(picture, tmp_path / "out", mpp=0.25, model=name, backend="local")
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    with pytest.raises(SlideError, match="broken"):
        hover_batch.segment_slide(tmp_path / "broken.svs", tmp_path / "other", backend="local")
    assert hover_batch.segment_slide(picture, tmp_path / "out", mpp=0.25, backend="local", runtime="torch").is_file()
    for arguments in ({"slide_id": 5}, {"path": None}, {"output": 5}, {"output": " "}, {"path": "a\0"}):
        name = next(iter(arguments))
        with pytest.raises(InputError, match=f"^{name}.*(must be a str|a path is empty|cannot be a path)"):
            hover_batch.segment_slide(**{"path": picture, "output": tmp_path / "out", "mpp": 0.25, **arguments})
    for load in (hover_batch.load_nuclei, hover_batch.load_predictions):
        with pytest.raises(InputError, match="must be a str or Path, not int"):
            load(5)  # type: ignore[operator]
    for wrong in (np.zeros((9, 9)), np.zeros((9, 9, 4), np.uint8), np.zeros((0, 9, 3), np.uint8), [1]):
        with pytest.raises(InputError, match="uint8"):
            model.predict(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kept predictions"):
        hover_batch.load_predictions(tmp_path)
    with pytest.raises(SlideError, match="nuclei.parquet: does not exist"):
        hover_batch.load_nuclei(tmp_path)
    store = tmp_path / "out" / "slides" / "tile" / "predictions.zarr" / "zarr.json"
    store.write_text(store.read_text().replace('"od_scale"', '"od"').replace('"mpp"', '"pixel"'))
    with pytest.raises((SlideError, PackageError), match="pixel"):
        hover_batch.load_predictions(store.parent.parent)
    store.write_text("[]")
    with pytest.raises(SlideError, match=r"zarr\.json: is corrupted"):
        hover_batch.load_predictions(store.parent.parent)
    with pytest.raises(AttributeError, match="no attribute 'segment_slides'"):
        hover_batch.segment_slides  # noqa: B018


def test_predictions_that_lack_a_shard_are_refused(table: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(table.parent, tmp_path / "slides" / table.parent.name))
    hover_batch.load_predictions(folder)
    next(path for path in (folder / "predictions.zarr" / "c").rglob("*") if path.is_file()).unlink()
    with pytest.raises(InputError, match="is a file; give the folder of the slide"):
        hover_batch.load_predictions(folder / "nuclei.parquet")
    moved = Path(shutil.copytree(folder, tmp_path / "kept" / folder.name))
    with pytest.raises(InputError, match="not in the folder slides of a run"):
        hover_batch.load_predictions(moved)  # else it would be the slide of the same name in slides/
    with pytest.raises(SlideError, match=r"the shard of the unit 0_0 \(column_row\) is missing.*run the slide again"):
        hover_batch.load_predictions(folder)


def test_a_corrupted_table_is_refused(table: Path, tmp_path: Path) -> None:
    content = bytearray(table.read_bytes())
    with pq.ParquetFile(table) as file:
        start = file.metadata.row_group(0).column(3).data_page_offset
    content[start : start + 40] = b"\xff" * 40
    (tmp_path / "nuclei.parquet").write_bytes(content)
    with pytest.raises(SlideError, match="cannot be read as a table of nuclei"):
        hover_batch.load_nuclei(tmp_path)
