"""Tissue detection, and masks that the cohort gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
import shapely.geometry
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scn_slide import write_scn_slide
from synthetic_slide import write_synthetic_slide

from hover_batch.cohort.record import SlideRecord
from hover_batch.config import TissueSettings
from hover_batch.errors import InputError, SlideError
from hover_batch.geometry import Box, Grid, Mpp, Size
from hover_batch.slide.example import write_example, write_pyramidal_tiff
from hover_batch.slide.given_mask import check_mask
from hover_batch.slide.reader import open_slide
from hover_batch.slide.tissue import TissueMask, tissue_mask


def found(path: Path, mpp: float | None = None, mask: Path | None = None, **settings: Any) -> TissueMask:
    record = SlideRecord("s", path, 2, mpp=None if mpp is None else Mpp(mpp, mpp), mask_path=mask)
    with open_slide(record) as slide:
        return tissue_mask(slide, record, TissueSettings(**settings))


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.02 mm square at 0.25 µm, tissue on [1024, 3072)²."""
    path = tmp_path_factory.mktemp("slide") / "synthetic.tif"
    write_synthetic_slide(path, (4096, 4096))
    return path


def canvas(path: Path, *patches: tuple[tuple[int, int, int], Box]) -> Path:
    """A white slide of 1.2 mm at 1 µm with coloured boxes."""
    picture = np.full((1200, 1200, 3), 245, np.uint8)
    for colour, box in patches:
        picture[box.y0 : box.y1, box.x0 : box.x1] = colour
    write_pyramidal_tiff(path, picture, 1.0)
    return path


PINK = (226, 170, 200)
HEMATOXYLIN = (105, 90, 160)


def test_a_known_quarter(synthetic: Path) -> None:
    mask = found(synthetic)
    assert not mask.given
    assert mask.area_mm2(Mpp(0.25, 0.25)) == pytest.approx(0.262, rel=0.05)
    inside = mask.contains(np.array([1100.0, 2000, 3000]), np.array([1100.0, 2000, 3000]))
    outside = mask.contains(np.array([900.0, 3200, -5, 2000]), np.array([2000.0, 2000, 2000, 4097]))
    assert inside.all() and not outside.any()


def test_real_slides(data: Path) -> None:
    """CMU-1: tissue in the middle, glass to the left. TCGA: nearly all of another model's nuclei lie in the mask."""
    cmu = found(data / "slides" / "CMU-1-Small-Region.svs")
    assert cmu.contains(np.array([1200.0, 150]), np.array([2500.0, 2000])).tolist() == [True, False]
    assert 0.5 < cmu.area_mm2(Mpp(0.499, 0.499)) < 0.8
    cells = np.genfromtxt(
        data / "slides" / "TCGA-V5-A7RE_40x_colsW_pseudo_cells.csv", delimiter=",", skip_header=1, usecols=(0, 1)
    )
    tcga = found(data / "slides" / "TCGA-V5-A7RE_40x_colsW.tif", min_tissue_um2=2000)
    assert tcga.contains(cells[:, 0], cells[:, 1]).mean() > 0.98
    assert tcga.array.mean() < 0.45


def test_tiles_are_all_tissue_and_white_ones_none(tmp_path: Path) -> None:
    write_example(tmp_path)
    assert found(tmp_path / "he_0.25.tif").array.all()
    assert found(tmp_path / "he_0.5.tif").array.all()
    Image.new("RGB", (1000, 1000), (243, 241, 244)).save(tmp_path / "white.png")
    assert not found(tmp_path / "white.png", mpp=0.25).array.any()


@pytest.mark.parametrize(("height", "warned"), [(1024, False), (288, False), (224, True), (32, True), (0, False)])
def test_a_small_picture_with_little_stain_gives_a_warning(tmp_path: Path, height: int, warned: bool) -> None:
    picture = np.full((1024, 1024, 3), 245, np.uint8)
    picture[:height] = PINK
    Image.fromarray(picture).save(tmp_path / "tile.png")
    warnings = found(tmp_path / "tile.png", mpp=0.25).warnings
    assert [f"only {height / 1024:.0%} of the picture is stained" in text for text in warnings] == [True] * warned


def test_an_empty_slide_has_no_tissue(tmp_path: Path) -> None:
    mask = found(canvas(tmp_path / "white.tif"))
    assert not mask.array.any() and mask.area_mm2(Mpp(1, 1)) == 0 and mask.polygons().is_empty
    mask.write_geojson(tmp_path / "tissue.geojson")
    assert json.loads((tmp_path / "tissue.geojson").read_text()) == {"type": "FeatureCollection", "features": []}


def test_tinted_glass_is_not_tissue(tmp_path: Path) -> None:
    tinted = np.full((1200, 1200, 3), (244, 240, 228), np.uint8)
    tinted[300:800, 300:800] = (214, 165, 178)
    write_pyramidal_tiff(tmp_path / "tinted.tif", tinted, 1.0)
    assert found(tmp_path / "tinted.tif").array.mean() == pytest.approx(25 / 144, rel=0.05)


@pytest.mark.parametrize("ink", [(25, 25, 28), (30, 150, 70), (40, 70, 190), (120, 120, 120)])
def test_pen_and_shadow_are_not_tissue(tmp_path: Path, ink: tuple[int, int, int]) -> None:
    path = canvas(tmp_path / "pen.tif", (PINK, Box(100, 100, 500, 500)), (ink, Box(700, 600, 1000, 1100)))
    mask = found(path)
    tissue, pen = mask.contains(np.array([300.0, 850]), np.array([300.0, 850]))
    assert tissue and not pen


def test_pale_and_dark_stain_are_tissue(tmp_path: Path) -> None:
    path = canvas(
        tmp_path / "stain.tif",
        (HEMATOXYLIN, Box(100, 100, 500, 500)),
        ((238, 214, 228), Box(600, 600, 1100, 1100)),
    )
    assert found(path).contains(np.array([300.0, 850]), np.array([300.0, 850])).all()


def test_a_small_canvas_is_tissue_only_where_it_was_scanned(tmp_path: Path) -> None:
    """Its stained part, 1 % of the canvas and 100 % of what was scanned, is not too small either."""
    write_scn_slide(tmp_path / "s.scn", np.full((256, 512, 3), (200, 90, 160), np.uint8), Size(3000, 3600), (600, 900))
    record = SlideRecord("s", tmp_path / "s.scn", 2, mpp=Mpp(0.25, 0.25))
    with open_slide(record) as reader:
        assert reader.info.bounds is not None
        mask = tissue_mask(reader, record, TissueSettings())
        frame, canvas = reader.info.bounds, reader.info.level0
    outside = mask.contains(np.array([10.0, 2990.0]), np.array([10.0, 3590.0]))
    assert not outside.any()
    share = frame.width * frame.height / (canvas.width * canvas.height)
    assert share < 0.02 and mask.array.mean() == pytest.approx(share, rel=0.2)


def test_small_pieces_are_dropped_and_small_holes_filled(tmp_path: Path) -> None:
    path = canvas(
        tmp_path / "pieces.tif",
        (PINK, Box(80, 80, 800, 800)),
        ((245, 245, 245), Box(200, 200, 280, 280)),  # 6,400 µm²
        ((245, 245, 245), Box(400, 400, 600, 600)),  # 40,000 µm²
        (PINK, Box(1000, 1000, 1080, 1080)),
    )
    x = y = np.array([240.0, 500, 1040])
    assert found(path, min_tissue_um2=10_000).contains(x, y).tolist() == [True, False, False]
    assert found(path, min_tissue_um2=1000).contains(x, y).tolist() == [False, False, True]


def test_all(synthetic: Path) -> None:
    mask = found(synthetic, tissue="all")
    assert mask.area_mm2(Mpp(0.25, 0.25)) == pytest.approx(1.024**2)
    assert mask.polygons().equals(shapely.box(0, 0, 4096, 4096))


def test_the_mask_is_bounded_whatever_the_slide(monkeypatch: pytest.MonkeyPatch, synthetic: Path) -> None:
    monkeypatch.setattr("hover_batch.slide.tissue.MAX_MASK_SIDE", 100)
    mask = found(synthetic)
    assert mask.array.shape == (100, 100)
    assert mask.area_mm2(Mpp(0.25, 0.25)) == pytest.approx(0.262, rel=0.1)


SQUARE = {"type": "Polygon", "coordinates": [[[0, 0], [2000, 0], [2000, 2000], [0, 2000], [0, 0]]]}
RING = {
    "type": "Polygon",
    "coordinates": [
        [[500, 500], [2500, 500], [2500, 2500], [500, 2500], [500, 500]],
        [[1000, 1000], [1000, 2000], [2000, 2000], [2000, 1000], [1000, 1000]],
    ],
}
ISLAND = {"type": "Polygon", "coordinates": [[[1400, 1400], [1600, 1400], [1600, 1600], [1400, 1600], [1400, 1400]]]}


def feature(geometry: object) -> dict[str, object]:
    return {"type": "Feature", "properties": {}, "geometry": geometry}


def saved(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    "data",
    [
        SQUARE,
        feature(SQUARE),
        {"type": "FeatureCollection", "features": [feature(SQUARE), feature({"type": "Point", "coordinates": [1, 2]})]},
        {"type": "GeometryCollection", "geometries": [SQUARE]},
        {"type": "MultiPolygon", "coordinates": [SQUARE["coordinates"]]},
        [feature(SQUARE)],
        [SQUARE, {"type": "Point", "coordinates": [1, 2]}],
    ],
)
def test_geojson_of_every_form(synthetic: Path, tmp_path: Path, data: object) -> None:
    path = saved(tmp_path / "mask.geojson", data)
    check_mask(path)
    mask = found(synthetic, mask=path)
    assert mask.given
    assert mask.area_mm2(Mpp(0.25, 0.25)) == pytest.approx(0.25, rel=0.01)


def test_geojson_holes_and_islands(synthetic: Path, tmp_path: Path) -> None:
    data = {"type": "FeatureCollection", "features": [feature(ISLAND), feature(RING)]}
    mask = found(synthetic, mask=saved(tmp_path / "mask.geojson", data))
    x = y = np.array([750.0, 1200, 1500, 2250, 2700])
    assert mask.contains(x, y).tolist() == [True, False, True, True, False]


def test_a_mask_goes_before_the_setting(synthetic: Path, tmp_path: Path) -> None:
    mask = found(synthetic, mask=saved(tmp_path / "mask.geojson", SQUARE), tissue="all")
    assert mask.given and mask.array.mean() < 0.3


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P"])
def test_png_is_stretched_over_the_canvas(synthetic: Path, tmp_path: Path, mode: str) -> None:
    values = np.zeros((50, 100), np.uint8)
    values[:25, :50] = 1
    picture = Image.fromarray(values * 255).convert(mode) if mode != "P" else Image.fromarray(values, "L")
    if mode == "P":
        picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.save(tmp_path / "mask.png")
    check_mask(tmp_path / "mask.png")
    mask = found(synthetic, mask=tmp_path / "mask.png")
    assert mask.given and mask.array.shape == (50, 100) and mask.level0_per_pixel == (40.96, 81.92)
    assert mask.contains(np.array([2000.0, 2100, 2000]), np.array([2000.0, 2000, 2100])).tolist() == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mask.geojson", b"{ not json"),
        ("mask.geojson", b'"text"'),
        ("mask.geojson", b'{"type": "FeatureCollection"}'),
        ("mask.geojson", b'{"type": "FeatureCollection", "features": []}'),
        ("mask.geojson", b'{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}'),
        ("mask.geojson", b'{"type": "Polygon", "coordinates": [[["a", 0], [1, 1], [2, 2], ["a", 0]]]}'),
        ("mask.geojson", b'{"type": "Point", "coordinates": [1, 2]}'),
        ("mask.geojson", b'{"type": "Sphere"}'),
        ("mask.geojson", b"\xff\xfe\x00"),
        ("mask.png", b"no picture at all"),
        ("mask.png", b"\x89PNG\r\n\x1a\n" + bytes(40)),
        ("mask.xyz", b"0"),
    ],
)
def test_unreadable_masks_are_refused_with_a_remedy(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"mask\..*(GeoJSON|PNG)") as caught:
        check_mask(path)
    assert "\n" not in str(caught.value)


def test_a_torn_png_mask_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="mask"):
        check_mask(path)


def test_a_missing_mask_is_refused(tmp_path: Path) -> None:
    for name in ("absent.geojson", "absent.png"):
        with pytest.raises(InputError, match="mask_path"):
            check_mask(tmp_path / name)


def test_a_mask_beside_the_slide_is_a_slide_error(synthetic: Path, tmp_path: Path) -> None:
    away = {"type": "Polygon", "coordinates": [[[9000, 9000], [9900, 9000], [9900, 9900], [9000, 9000]]]}
    with pytest.raises(SlideError, match="level-0 pixels"):
        found(synthetic, mask=saved(tmp_path / "mask.geojson", away))


def test_geojson_goes_out_and_comes_back(synthetic: Path, tmp_path: Path) -> None:
    mask = found(synthetic)
    mask.write_geojson(tmp_path / "tissue.geojson")
    data = json.loads((tmp_path / "tissue.geojson").read_text())
    assert len(data["features"]) == 1
    assert data["features"][0]["properties"]["objectType"] == "annotation"
    again = found(synthetic, mask=tmp_path / "tissue.geojson")
    resized = cv2.resize(again.array.astype(np.uint8), mask.array.shape[::-1], interpolation=cv2.INTER_NEAREST)
    # The same but for the pixels that the outline runs through.
    array, around = mask.array.astype(np.uint8), np.ones((3, 3), np.uint8)
    assert (cv2.erode(array, around) <= resized).all() and (resized <= cv2.dilate(array, around)).all()
    assert int(resized.sum()) == pytest.approx(int(array.sum()), rel=0.04)


masks = arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


@given(masks)
def test_polygons_are_the_mask(array: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    outline = TissueMask(array, (2.0, 3.0)).polygons()
    assert outline.is_valid
    pixels = [shapely.box(2 * x, 3 * y, 2 * x + 2, 3 * y + 3) for y, x in np.argwhere(array)]
    assert outline.equals(shapely.union_all(pixels))


@given(masks, st.integers(-40, 60), st.integers(-40, 60), st.integers(0, 50), st.integers(0, 50))
def test_meets_is_any_pixel_under_the_box(
    array: np.ndarray[Any, np.dtype[np.bool_]], x: int, y: int, width: int, height: int
) -> None:
    """Mask pixels of 5 × 4 level-0 pixels, inference pixels of 0.5: compared pixel by pixel of level 0, doubled."""
    mask = TissueMask(array, (5.0, 4.0))
    level0 = Size(5 * array.shape[1], 4 * array.shape[0])
    grid = Grid.over(level0, Mpp(0.5, 0.5), 0.25)
    fine = np.repeat(np.repeat(array, 8, axis=0), 10, axis=1)
    box = Box(x, y, x + width, y + height)
    inside = box.intersect(grid.size.box)
    expected = not inside.empty and bool(fine[inside.y0 : inside.y1, inside.x0 : inside.x1].any())
    assert mask.meets(box, grid) == expected
