"""Corrections from QuPath: GeoJSON beside pictures and slides → annotated images, and our own export back again."""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
from annotated import nuclei_from
from published import tiles
from scipy import ndimage
from typer.testing import CliRunner

import hover_batch
from hover_batch.cohort.layout import Format
from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import InputError
from hover_batch.export.read import NucleiTable
from hover_batch.exporting import writer
from hover_batch.geometry import Box, Grid, Mpp, Size
from hover_batch.nuclei.image import nuclei_of, types_by_id
from hover_batch.nuclei.table import TableContext, merge_parts, to_arrow, write_part
from hover_batch.nuclei.watershed import SobelConstants
from hover_batch.slide.example import _field, _halve, write_pyramidal_tiff
from hover_batch.slide.reader import open_slide
from hover_batch.store import PredictionStore
from hover_batch.taxonomy import CONSEP, PANNUKE
from kd.cli import kd_app
from kd.data.datasets import read_data

SIDE = 200
"""Side of the pictures in most tests."""


def prepare(*arguments: object):
    return CliRunner().invoke(kd_app, ["prepare", *map(str, arguments)])


def prepared(folder: Path, *arguments: object, folds: tuple[str, ...] = ("train",)):
    """Samples by id, their taxonomy, and the notes."""
    out = folder.with_name(f"{folder.name}.npz")
    result = prepare(folder, "-o", out, *arguments)
    assert result.exit_code == 0, result.exception
    data = read_data(out, folds)
    return {sample.id: sample for sample in data.samples}, data.taxonomy, result.stderr


def disc(x: float, y: float, radius: float = 10) -> shapely.Polygon:
    return shapely.Point(x, y).buffer(radius)


def feature(shape: shapely.Geometry, name: str = "", **properties: object) -> dict:
    classification = {"classification": {"name": name, "color": [1, 2, 3]}} if name else {}
    return {
        "type": "Feature",
        "geometry": shapely.geometry.mapping(shape),
        "properties": {"objectType": "annotation", **classification, **properties},
    }


def write(path: Path, *features: object) -> Path:
    content = json.dumps({"type": "FeatureCollection", "features": features})
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a picture x.png and no annotations yet."""
    folder = tmp_path / "corrected"
    folder.mkdir()
    cv2.imwrite(str(folder / "x.png"), tiles(1, SIDE)[0][0][..., ::-1])
    return folder


@pytest.mark.parametrize("mpp", [pytest.param(0.25, marks=pytest.mark.slow), 0.5])
def test_exported_nuclei_come_back(tmp_path: Path, mpp: float) -> None:
    """Those of a part of the example field, pixel for pixel, except for holes and for lines one pixel wide, which
    outlines leave out."""
    name, part = f"he_{mpp}", np.ascontiguousarray(_field()[200:712, 100:612])
    folder = tmp_path / "corrected"
    folder.mkdir()
    write_pyramidal_tiff(folder / f"{name}.tif", part if mpp == 0.25 else _halve(part), mpp)
    settings = {"backend": "local", "unit": 512, "tissue": "all", "runtime": "torch", "batch": 4}
    hover_batch.segment_slide(folder / f"{name}.tif", tmp_path / "out", **settings)
    results = tmp_path / "out" / "slides" / name
    writer(Format.qupath)(NucleiTable.open(results / "nuclei.parquet"), folder / f"{name}.geojson.gz")
    samples, taxonomy, notes = prepared(folder)
    assert taxonomy == CONSEP and "skipped" not in notes and "overlap" not in notes
    sample = samples[f"qupath_{name}"]
    with open_slide(SlideRecord("s", folder / f"{name}.tif", 1)) as reader:
        grid = Grid.over(reader.info.level0, reader.info.mpp, 0.25)
        assert np.array_equal(sample.image, reader.read(grid.size.box, grid))
    maps = np.asarray(PredictionStore.open(results / "predictions.zarr", read_only=True).array[:])
    card = hover_batch.load_predictions(results).card
    instances, nuclei = nuclei_of(maps, SobelConstants.from_json(card.sobel), card.layout)
    type_of = types_by_id(instances, nuclei)
    assert len(type_of) > 60
    ious, outlined = [], np.zeros(instances.shape, np.bool_)
    for i, place in enumerate(ndimage.find_objects(instances), start=1):
        true = ndimage.binary_fill_holes(instances[place] == i)
        outlined[place] |= true
        found_id = np.bincount(sample.instances[place][true]).argmax()
        found = sample.instances == found_id
        common = np.count_nonzero(true & found[place])
        ious.append(common / (np.count_nonzero(true) + np.count_nonzero(found) - common))
        assert sample.types is not None and (sample.types[found] == type_of[i - 1]).all()
    assert np.mean((sample.instances > 0) == outlined) > 0.9998
    assert min(ious) > 0.9 and np.mean(ious) > 0.999 and np.mean(np.array(ious) == 1) > 0.9


def test_positions_count_from_the_corner_of_the_bounds(tmp_path: Path) -> None:
    from slide.scn_slide import write_scn_slide

    image, instances, _ = tiles(1, 240)[0]
    canvas, bounds = Size(720, 540), Box(300, 180, 540, 420)
    folder = tmp_path / "corrected"
    folder.mkdir()
    write_scn_slide(folder / "x.scn", np.ascontiguousarray(image), canvas, (300, 180))
    whole = np.zeros((540, 720), np.int32)
    whole[180:420, 300:540] = instances
    grid = Grid(canvas, 1, 1, Mpp(0.25, 0.25), canvas)
    context = TableContext("x", CONSEP, grid, grid.mpp, "file", bounds, "starter", "ab" * 32, "0.1.0")
    write_part(tmp_path / "part.parquet", to_arrow(nuclei_from(whole, None, len(CONSEP.classes)), context))
    merge_parts([(0, tmp_path / "part.parquet")], tmp_path / "nuclei.parquet", context)
    writer(Format.qupath)(NucleiTable.open(tmp_path / "nuclei.parquet"), folder / "x.geojson.gz")
    samples, *_ = prepared(folder)
    assert np.mean((samples["qupath_x"].instances > 0) == (whole > 0)) > 0.999


def test_regions_of_a_slide(data: Path, tmp_path: Path) -> None:
    """Each becomes an image at 0.25 µm, although the slide has 0.5; nuclei elsewhere are not used."""
    slide = data / "slides" / "CMU-1-Small-Region.svs"
    folder = tmp_path / "corrected"
    (folder / "val").mkdir(parents=True)
    (folder / "CMU.svs").symlink_to(slide)
    nuclei = [feature(disc(x, y, 8), "Epithelial") for x, y in ((150, 250), (198, 240), (620, 450), (1500, 1500))]
    regions = [
        feature(shapely.box(100, 200, 200, 280), "Region*"),
        feature(shapely.box(600, 400, 700, 500), "", isLocked=True),
    ]
    write(folder / "CMU.geojson", *nuclei, *regions)
    (folder / "val" / "other.svs").symlink_to(slide)
    write(folder / "val" / "other.geojson", feature(shapely.box(0, 0, 50, 60), "Training"))
    samples, _, notes = prepared(folder, folds=("train", "val"))
    assert list(samples) == ["qupath_CMU_200_400", "qupath_CMU_1200_800", "qupath_other_0_0"]
    first, second, empty = samples.values()
    assert [s.instances.shape for s in samples.values()] == [(160, 200), (200, 200), (120, 100)]
    assert [s.fold for s in samples.values()] == ["train", "train", "val"]
    assert [s.group for s in samples.values()] == ["CMU", "CMU", "other"]
    assert [np.count_nonzero(np.unique(s.instances)) for s in samples.values()] == [2, 1, 0]
    assert "1 nuclei are outside of all regions" in notes
    y, x = np.argwhere(second.instances > 0).mean(axis=0)
    assert (x, y) == pytest.approx((39.5, 99.5), abs=0.1)
    with open_slide(SlideRecord("s", slide, 1)) as reader:
        grid = Grid.over(reader.info.level0, reader.info.mpp, 0.25)
        assert np.array_equal(first.image, reader.read(Box(200, 400, 400, 560), grid))
    assert empty.types is not None and not empty.types.any()
    write(folder / "CMU.geojson", *nuclei)
    with pytest.raises(InputError, match=r"no region, but CMU.svs has 4440 × 5934 .* Region\* \(right-click"):
        raise prepare(folder, "-o", tmp_path / "x.npz").exception


def test_regions_that_are_drawn_twice_are_one_image(folder: Path) -> None:
    region, nucleus = feature(shapely.box(20, 20, 120, 120), "Region*"), feature(disc(60, 60), "epithelial")
    write(folder / "x.geojson", region, region, nucleus)
    samples, _, notes = prepared(folder)
    assert list(samples) == ["qupath_x_20_20"] and "1 regions equal another one; skipped" in notes
    write(folder / "x.geojson", region, feature(shapely.box(20, 20, 120, 150), "Region*"), nucleus)
    with pytest.raises(InputError, match="two regions of different size begin at 20, 20; delete one of them"):
        raise prepare(folder, "-o", folder / "x.npz").exception


def test_all_kinds_of_objects(folder: Path) -> None:
    cell = feature(disc(30, 30, 20), "epithelial", objectType="cell")
    cell["nucleusGeometry"] = shapely.geometry.mapping(disc(30, 30, 8))
    old = feature(disc(80, 30), "Spindle")
    old["id"] = "PathDetectionObject"
    del old["properties"]["objectType"]
    two_parts = shapely.MultiPolygon([disc(120, 30, 6), disc(140, 30, 6)])
    loop = shapely.Polygon([(100, 100), (120, 120), (120, 100), (100, 120)])  # crosses itself
    derived = feature(disc(30, 80), "", classification={"names": ["Inflammatory", "Positive"]})
    parent = feature(
        shapely.box(60, 60, 90, 90), "Ignore*", childObjects=[feature(disc(74.5, 74.5), "", objectType="detection")]
    )
    write(
        folder / "x.geojson",
        cell,
        old,
        feature(two_parts, "miscellaneous"),
        feature(loop, "EPITHELIAL: dividing"),
        derived,
        parent,
        feature(shapely.Point(5, 5), "epithelial"),
        feature(shapely.LineString([(5, 5), (9, 9)])),
        feature(disc(180, 180, 1), "epithelial"),
        feature(shapely.box(150, 150, 199, 199), "", objectType="tile"),
    )  # fmt: skip
    samples, taxonomy, notes = prepared(folder)
    sample = samples["qupath_x"]
    assert taxonomy == CONSEP and sample.types is not None
    name_of = {0: ""} | {c.id: c.name for c in CONSEP.nuclei}
    found = {}
    for i in np.unique(sample.instances[sample.instances > 0]):
        (kind,) = np.unique(sample.types[sample.instances == i])
        ys, xs = np.nonzero(sample.instances == i)
        found[round(xs.mean()), round(ys.mean())] = name_of[kind], len(xs)
    assert {place: name for place, (name, _) in found.items()} == {
        (30, 30): "epithelial",
        (80, 30): "spindle",
        (130, 30): "miscellaneous",
        (110, 110): "epithelial",
        (30, 80): "inflammatory",
        (74, 74): "",
    }
    assert found[30, 30][1] == pytest.approx(np.pi * 64, rel=0.05)
    for note in (
        "2 points and lines",
        "1 tiles",
        "1 objects of ignored classes",
        "1 outlines have fewer than 10 pixels",
    ):
        assert note in notes
    assert np.array_equal(sample.image, cv2.imread(str(folder / "x.png"))[..., ::-1])


def test_classes_are_mapped_by_name_or_by_option(folder: Path) -> None:
    names = ("Tumor", "Stroma", "Debris", "epithelial", "Area")
    features = [feature(disc(30 + 35 * i, 30), name) for i, name in enumerate(names[:4])]
    write(folder / "x.geojson", *features, feature(shapely.box(0, 0, 180, 90), names[4]))
    options = ["--map", "tumor=Epithelial", "--map", "Stroma=none", "--map", "DEBRIS=ignore", "--map", "Area=region"]
    samples, _, notes = prepared(folder, *options)
    sample = samples["qupath_x_0_0"]
    assert sample.instances.shape == (90, 180) and sample.types is not None
    kinds = [sample.types[30, 30 + 35 * i] for i in range(4)]
    assert kinds == [3, 0, 0, 3] and np.count_nonzero(np.unique(sample.instances)) == 3
    assert "1 nuclei have none of the classes" in notes

    def failure(*given: object) -> str:
        result = prepare(folder, "-o", folder / "data.npz", *given)
        assert isinstance(result.exception, InputError)
        return str(result.exception)

    message = failure("--map", "Area=region")
    assert "Debris, Stroma, Tumor: not among the classes miscellaneous, inflammatory, epithelial, spindle" in message
    assert "--map 'Debris=miscellaneous'" in message and "; epithelial are used as they are" in message
    assert "--map …=tumour: not a class" in failure(*options, "--map", "x=tumour")
    assert "give NAME=CLASS" in failure("--map", "Tumor")
    assert "given twice" in failure("--map", "Tumor=none", "--map", "tumor=ignore")


def test_without_classes_only_nuclei_are_learnt(folder: Path) -> None:
    write(folder / "x.geojson", feature(disc(30, 30)), feature(disc(90, 90), "nucleus"))
    samples, *_ = prepared(folder)
    assert samples["qupath_x"].types is None


def test_pannukes_classes_are_recognised(folder: Path) -> None:
    write(folder / "x.geojson", feature(disc(30, 30), "Neoplastic"), feature(disc(90, 90), "epithelial"))
    samples, taxonomy, _ = prepared(folder)
    types = samples["qupath_x"].types
    assert taxonomy == PANNUKE and types is not None and (types[30, 30], types[90, 90]) == (1, 5)
    write(folder / "x.geojson", feature(disc(30, 30), "Tumor"))
    assert prepared(folder, "--map", "Tumor=neoplastic")[1] == PANNUKE


@pytest.mark.parametrize("name", ["x.GeoJSON", "x.geojson.gz", "x.json", "x.png.geojson", "x.zip"])
def test_names_of_the_file(folder: Path, name: str) -> None:
    path = write(folder / name, feature(disc(30, 30), "epithelial"))
    if name == "x.zip":
        content = path.read_bytes()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.geojson", content)
    shutil.copy(folder / "x.png", folder / "unannotated.png")
    samples, _, notes = prepared(folder)
    assert list(samples) == ["qupath_x"] and "1 pictures have no GeoJSON file" in notes


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "holds no objects; export all objects"),
        ([feature(disc(30, 30)), feature(disc(900, 30))], "1 of 2 outlines lie outside of x.png, the first at 890, 20"),
        ([feature(shapely.box(0, 0, 200, 205), "epithelial")], "of the class epithelial covers 2,562 µm² and is 51 µm"),
        ([feature(shapely.box(0, 0, 200, 205))], r"without a class covers .* no nucleus; give it the class Region\*"),
        ([feature(shapely.Polygon([(0, 0), (900, 1), (900, 0)]))], "covers 28 µm² and is 225 µm long, which is no"),
        ([feature(disc(50, 50, 45), "Region*")], "the region at 5, 5 is not a rectangle"),
        ([feature(shapely.box(10, 20, 30, 99), "Region*")], "the region at 10, 20 has 20 × 79 pixels"),
        ([feature(disc(30, 30), objectType="cell")], "1 cells have no outline of their nucleus"),
        (["no feature"], "not valid GeoJSON"),
        ([{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": 3}}], "not valid GeoJSON"),
        ([{"type": "Feature", "geometry": None, "properties": {"childObjects": ["x"]}}], "not valid GeoJSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(folder: Path, features: list, message: str) -> None:
    write(folder / "x.geojson", *features)
    result = prepare(folder, "-o", folder.parent / "x.npz")
    with pytest.raises(InputError, match=message):
        raise result.exception
    assert not (folder.parent / "x.npz").exists()


def test_files_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    def failure() -> str:
        result = prepare(folder, "-o", tmp_path / "x.npz")
        assert isinstance(result.exception, InputError)
        return str(result.exception)

    assert "unknown layout" in failure()
    (folder / "x.geojson").touch()
    assert "x.geojson: not valid GeoJSON" in failure()
    write(folder / "x.geojson", feature(disc(30, 30)))
    second = write(folder / "x.geojson.gz", feature(disc(30, 30)))
    assert "x.png: has two annotations, x.geojson and x.geojson.gz; keep one" in failure()
    second.unlink()
    (folder / "x.tif").write_bytes(b"II*\0")
    assert "x.geojson: x.png, x.tif have this name" in failure()
    (folder / "x.png").unlink()
    assert "x.tif: cannot be read" in failure()
    (folder / "x.tif").unlink()
    assert "x.geojson: no picture or slide of this name" in failure()
    (folder / "batch1").mkdir()
    write(folder / "batch1" / "y.geojson", feature(disc(30, 30)))
    assert "batch1: has annotations, but only the subfolders train, val, test are read" in failure()


def test_positions_in_micrometres_are_noticed(folder: Path) -> None:
    write(folder / "x.geojson", *[feature(disc(20 + 12 * i, 30, 4), "spindle") for i in range(8)])
    *_, notes = prepared(folder)
    assert "the median nucleus covers 3.1" in notes and "not in µm" not in notes and "full resolution" in notes


def test_the_option_for_classes_needs_a_qupath_folder(tmp_path: Path) -> None:
    from published import write_folder

    folder = write_folder(tmp_path / "a", {"x": tiles(1, 64)[0]})
    with pytest.raises(InputError, match="--map Tumor: is for QuPath's classes"):
        raise prepare(folder, "-o", tmp_path / "x.npz", "--map", "Tumor=none").exception
