"""Masks of the cohort on slides with bounds, and the forms in which GeoJSON is stored."""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
from PIL import Image
from scn_slide import write_scn_slide

from hover_batch import files
from hover_batch.cohort.manifest import read_cohort
from hover_batch.cohort.record import SlideRecord
from hover_batch.config import TissueSettings
from hover_batch.errors import InputError
from hover_batch.geometry import Box, Size
from hover_batch.slide.given_mask import check_mask, given_mask
from hover_batch.slide.reader import open_slide
from hover_batch.slide.tissue import TissueMask, tissue_mask

CANVAS, BOUNDS = Size(1440, 1080), Box(600, 360, 1080, 840)
LEFT_HALF = {"type": "Polygon", "coordinates": [[[0, 0], [240, 0], [240, 480], [0, 480], [0, 0]]]}
# The scanned part's left half, its right half, and the canvas left of it.
X, Y = np.array([700.0, 950, 300]), np.array([600.0, 600, 600])


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scn") / "slide.scn"
    write_scn_slide(path, np.full((480, 480, 3), (200, 100, 180), np.uint8), CANVAS, (600, 360))
    return path


def laid(slide: Path, mask: Path | None) -> TissueMask:
    record = SlideRecord("s", slide, 2, mask_path=mask)
    with open_slide(record) as reader:
        assert (reader.info.level0, reader.info.bounds) == (CANVAS, BOUNDS)
        return tissue_mask(reader, record, TissueSettings())


def test_polygons_count_from_the_corner_of_the_bounds(slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps(LEFT_HALF))
    assert check_mask(path, CANVAS, BOUNDS) == []
    mask = laid(slide, path)
    assert mask.contains(X, Y).tolist() == [True, False, False]
    edge = np.array([590.0, 602, 836, 850])
    assert mask.contains(edge, np.full(4, 600.0)).tolist() == [False, True, True, False]


def test_tissue_geojson_counts_as_the_nuclei_do_and_comes_back(slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "tissue.geojson"
    array = np.zeros((9, 12), bool)
    array[3:7, 5:7] = True  # the left half, of 120 level-0 pixels a mask pixel
    TissueMask(array, (120.0, 120.0)).write_geojson(path, BOUNDS)
    (written,) = json.loads(path.read_text())["features"]
    points = np.array(written["geometry"]["coordinates"][0][0])
    assert (points.min(axis=0).tolist(), points.max(axis=0).tolist()) == ([0, 0], [240, 480])
    assert laid(slide, path).contains(X, Y).tolist() == [True, False, False]


def test_polygons_that_count_from_the_canvas_are_refused(tmp_path: Path) -> None:
    """Moved by the corner a second time, they would lie beside the tissue."""
    ring = (np.array(LEFT_HALF["coordinates"][0]) + (200, 0)).tolist()
    path = tmp_path / "mask.geojson"
    for shift, part in ((600, "100% of the mask"), (120, "50% of the mask")):
        moved = [[[x + shift + 40, y] for x, y in ring]]
        path.write_text(json.dumps({"type": "Polygon", "coordinates": moved}))
        with pytest.raises(InputError, match=f"{part} lies outside.*480 × 480.*subtract 600, 360"):
            check_mask(path, CANVAS, BOUNDS)


@pytest.mark.parametrize("size", [(480, 480), (48, 48), (960, 960)])
def test_a_png_of_the_aspect_of_the_bounds_covers_them(slide: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    values = np.zeros(size[::-1], np.uint8)
    values[:, : size[0] // 2] = 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert check_mask(tmp_path / "mask.png", CANVAS, BOUNDS) == []
    mask = laid(slide, tmp_path / "mask.png")
    assert mask.contains(X, Y).tolist() == [True, False, False]
    edge = np.array([598.0, 602, 836, 844])
    assert mask.contains(edge, np.full(4, 600.0)).tolist() == [False, True, True, False]


@pytest.mark.parametrize("size", [(1440, 1080), (144, 108), (73, 55)])
def test_a_png_of_the_aspect_of_the_canvas_covers_it(slide: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    values = np.zeros(size[::-1], np.uint8)
    values[:, : size[0] // 2] = 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert laid(slide, tmp_path / "mask.png").contains(X, Y).tolist() == [True, False, True]


def test_a_png_of_another_aspect_is_refused_and_one_that_fits_both(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.new("L", (200, 100), 255).save(path)
    with pytest.raises(InputError, match=r"200 × 100.*neither.*480 × 480.*1440 × 1080"):
        check_mask(path, CANVAS, BOUNDS)
    Image.new("L", (100, 100), 255).save(path)
    inner = Box(100, 100, 600, 600)
    with pytest.raises(InputError, match=r"fits both.*500 × 500.*1000 × 1000"):
        check_mask(path, Size(1000, 1000), inner)
    Image.fromarray(np.triu(np.full((500, 500), 255, np.uint8))).save(path)
    assert check_mask(path, Size(1000, 1000), inner) == []


def test_a_stretched_png_is_warned_of_without_bounds(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.triu(np.full((100, 200), 255, np.uint8))).save(path)
    assert check_mask(path, Size(2000, 1000)) == []
    (warning,) = check_mask(path, Size(1000, 1000))
    assert "200 × 100" in warning and "1000 × 1000" in warning


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_a_transparent_colour_is_no_tissue(tmp_path: Path, mode: str) -> None:
    """Programs that reduce a PNG write a transparent colour instead of an alpha channel."""
    drawn = Image.fromarray(np.uint8(np.indices((100, 100))[1] < 30) * 255).convert(mode)
    white = drawn.getpixel((0, 0))
    drawn.putpixel((99, 99), white)
    drawn.save(tmp_path / "key.png", transparency=white if mode != "1" else 255)
    with pytest.raises(InputError, match="no tissue on the slide"):
        check_mask(tmp_path / "key.png", Size(1000, 1000))
    drawn.save(tmp_path / "key.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    mask = given_mask(tmp_path / "key.png", Size(1000, 1000), None, 10.0)
    assert mask.mean() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_16_bit_mask_keeps_small_labels_or_is_refused(tmp_path: Path, channels: int) -> None:
    labels = np.zeros((100, 100), np.uint16)
    labels[20:40], labels[40:60] = 100, 400
    assert cv2.imwrite(str(tmp_path / "mask.png"), labels if channels == 1 else np.dstack([labels] * channels))
    if channels == 1:
        mask = given_mask(tmp_path / "mask.png", Size(1000, 1000), None, 10.0)
        assert mask.mean() == pytest.approx(0.4, abs=0.01)
    else:
        with pytest.raises(InputError, match="16 bits per channel.* save it as a grey PNG"):
            check_mask(tmp_path / "mask.png")


def test_a_mask_of_the_whole_slide_is_warned_of(tmp_path: Path) -> None:
    """A PNG of labels 1 (background) and 2 (tissue), and a rectangle around everything."""
    labels = np.ones((50, 100), np.uint8)
    labels[:20] = 2
    Image.fromarray(labels).save(tmp_path / "mask.png")
    for canvas in ((), (Size(2000, 1000),)):
        (warning,) = check_mask(tmp_path / "mask.png", *canvas)
        assert "covers the whole slide" in warning and "0 on background" in warning
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps(shapely.geometry.mapping(shapely.box(0, 0, 2000, 1000))))
    (warning,) = check_mask(path, Size(2000, 1000))
    assert "covers the whole slide" in warning
    assert check_mask(path, Size(2000, 2000)) == []


def test_polygons_mostly_beside_the_slide_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps(shapely.geometry.mapping(shapely.box(900, 0, 1900, 500))))
    (warning,) = check_mask(path, Size(1000, 1000))
    assert "90% of the mask lies outside of the slide of 1000 × 1000 pixels" in warning


def test_polygons_in_millimetres_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps(shapely.geometry.mapping(shapely.box(1, 2, 5, 4))))
    (warning,) = check_mask(path, Size(40_000, 30_000))
    assert "measure only 4 × 2 pixels; positions must be in level-0 pixels" in warning
    assert check_mask(path, Size(3000, 2000)) == []


@pytest.mark.parametrize("value", ["1e300", "-1e12", "NaN", "Infinity", "1" + 400 * "0"])
def test_impossible_coordinates_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps(LEFT_HALF).replace("240", value))
    with pytest.raises(InputError, match=r"not valid GeoJSON \((a coordinate of|int too large) .*level-0 pixels"):
        check_mask(path, CANVAS, BOUNDS)


def test_a_mask_without_tissue_is_refused_before_the_run(tmp_path: Path) -> None:
    Image.new("L", (100, 100), 0).save(tmp_path / "mask.png")
    away = {"type": "Polygon", "coordinates": [[[900, 900], [990, 900], [990, 990], [900, 900]]]}
    (tmp_path / "mask.geojson").write_text(json.dumps(away))
    for name in ("mask.png", "mask.geojson"):
        with pytest.raises(InputError, match="the mask has no tissue on the slide of 500 × 500"):
            check_mask(tmp_path / name, Size(500, 500))


TEXT = json.dumps([{"type": "Feature", "properties": {}, "geometry": LEFT_HALF}])


def zipped(files: dict[str, str]) -> bytes:
    """A zip archive of these files, as QuPath exports one."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"images": [], "annotations": []}, r"\{'images': \[\], 'annotations': \[\]\} is no object with a type"),
        (5, "5 is no object with a type"),
        ({"type": "FeatureCollection", "features": None}, "a FeatureCollection without a list of features"),
    ],
)
def test_json_of_other_programs_is_described(tmp_path: Path, content: object, reason: str) -> None:
    (tmp_path / "coco.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"not valid GeoJSON \({reason}\); give polygons as GeoJSON"):
        check_mask(tmp_path / "coco.json")


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        gzip.compress(TEXT.encode()),
        gzip.compress(TEXT.encode("utf-8-sig")),
        zipped({"objects.geojson": TEXT, "__MACOSX/._objects.geojson": "x"}),
    ],
)
@pytest.mark.parametrize("name", ["mask.geojson", "mask.geojson.gz", "mask.zip"])
def test_geojson_of_every_encoding(slide: Path, tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert laid(slide, tmp_path / name).contains(X, Y).tolist() == [True, False, False]


def test_torn_zip_files_and_those_of_several_masks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.zip"
    for content, said in (
        (zipped({"a.geojson": TEXT, "b.geojson": TEXT}), "a zip archive of 2 files; one GeoJSON file is needed"),
        (zipped({"a.geojson": TEXT})[:-30], "zip"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"not valid GeoJSON.*{said}"):
            check_mask(path)
        (tmp_path / "a.png").touch()
        (tmp_path / "cohort.csv").write_text("path,mask_path,mpp\na.png,mask.zip,0.25\n")
        (fault,) = read_cohort(tmp_path / "cohort.csv").faults
        assert said in fault.message


def test_torn_and_endless_gzip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mask.geojson.gz"
    path.write_bytes(gzip.compress(TEXT.encode())[:-20])
    with pytest.raises(InputError, match="not valid GeoJSON.*gzip"):
        check_mask(path)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 1 << 20)
    path.write_bytes(gzip.compress(b" " * (1 << 21)))
    with pytest.raises(InputError, match="larger than 1 MiB"):
        check_mask(path)


def test_palette_masks_are_read_only_where_number_and_colour_agree(slide: Path, tmp_path: Path) -> None:
    indices = np.zeros((480, 480), np.uint8)
    indices[:, :240] = 1
    path = tmp_path / "mask.png"
    for palette, agrees in (([0, 0, 0, 255, 0, 0], True), ([255, 255, 255, 0, 0, 0], False)):
        picture = Image.fromarray(indices).convert("P")
        picture.putpalette(palette)
        picture.save(path)
        if agrees:
            assert laid(slide, path).contains(X, Y).tolist() == [True, False, False]
        else:
            with pytest.raises(InputError, match="palette picture .* save it as a grey PNG"):
                check_mask(path, CANVAS, BOUNDS)


def square(x: int, y: int, side: int) -> list[list[int]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


@pytest.mark.parametrize(
    ("kind", "coordinates", "area"),
    [
        ("MultiPolygon", [[square(0, 0, 60)], [square(40, 40, 60)]], 2 * 3600 - 400),
        # An outline drawn by hand that crosses itself.
        ("Polygon", [[[0, 0], [99, 0], [99, 60], [20, 60], [20, -9], [60, -9], [60, 99], [0, 99], [0, 0]]], 8280),
        ("Polygon", [square(0, 0, 60), square(20, 20, 20)], 3600 - 400),
        ("Polygon", [[[0, 0], [60, 0], [60, 60], [99, 60], [60, 60], [0, 60], [0, 0]]], 3600),
    ],
    ids=["overlapping polygons", "overlapping loops", "a hole", "a spike"],
)
def test_area_that_is_covered_twice_is_tissue(tmp_path: Path, kind: str, coordinates: object, area: int) -> None:
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps({"type": kind, "coordinates": coordinates}))
    mask = given_mask(path, Size(100, 100), None, scale=0.1)
    assert mask.sum() / 100 == pytest.approx(area, rel=0.01)  # pixels that the outline crosses count as a whole


def feature(x: int, side: int, classification: object = None) -> dict[str, object]:
    properties = {"objectType": "annotation", **({"classification": classification} if classification else {})}
    return {
        "type": "Feature",
        "properties": properties,
        "geometry": {"type": "Polygon", "coordinates": [square(x, 0, side)]},
    }


@pytest.mark.parametrize(
    ("ignored", "name"),
    [
        ({"name": "Ignore*", "color": [180, 180, 180]}, "Ignore*"),
        ({"names": ["Tumor", "Fold*"]}, "Fold*"),
        ("Ignore*", "Ignore*"),
    ],
)
def test_classes_that_qupath_ignores_are_no_tissue(tmp_path: Path, ignored: object, name: str) -> None:
    """Neither beside the tissue nor on it; only Region*, for which QuPath has the star, too, is tissue."""
    path = tmp_path / "mask.geojson"
    features = [
        feature(0, 40, {"name": "Region*"}),
        feature(30, 10, ignored),
        feature(60, 20, ignored),
        feature(90, 10),
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    mask = given_mask(path, Size(100, 100), None, scale=1)
    assert [mask[5, x] for x in (5, 35, 70, 95)] == [True, False, False, True]
    for canvas in ((), (Size(100, 100),)):
        (warning,) = check_mask(path, *canvas)
        assert f"2 polygons of the class {name} left out of the tissue" in warning and "rename the class" in warning
    path.write_text(json.dumps(features[1:3]))
    with pytest.raises(InputError, match=rf"no polygon besides those of {re.escape(name)}, which QuPath ignores"):
        check_mask(path)


@pytest.mark.parametrize("kind", [{"id": "PathCellObject"}, {"properties": {"objectType": "detection"}}], ids=str)
def test_detections_are_no_tissue(tmp_path: Path, kind: dict[str, object]) -> None:
    """For example, QuPath's export of all objects, or the exported nuclei of a run."""
    path = tmp_path / "mask.geojson"
    nucleus = {**feature(60, 20), "properties": {}, **kind}
    path.write_text(json.dumps([feature(0, 40), nucleus]))
    mask = given_mask(path, Size(100, 100), None, scale=1)
    assert [mask[5, x] for x in (5, 70)] == [True, False]
    (warning,) = check_mask(path, Size(100, 100))
    assert "1 detection of QuPath, such as nuclei, left out of the tissue" in warning
    path.write_text(json.dumps([nucleus]))
    with pytest.raises(InputError, match="no polygon besides detections, such as nuclei; give polygons as GeoJSON"):
        check_mask(path)


def test_a_png_that_exif_turns_is_refused(tmp_path: Path) -> None:
    path, exif = tmp_path / "mask.png", Image.Exif()
    picture = Image.fromarray(np.triu(np.full((100, 100), 255, np.uint8)))
    for value, refused in ((1, False), (6, True)):
        exif[274] = value
        picture.save(path, exif=exif)
        if refused:
            with pytest.raises(InputError, match="the tag Orientation is 6.*save it as it lies on the slide"):
                check_mask(path, Size(1000, 1000))
        else:
            assert check_mask(path, Size(1000, 1000)) == []
