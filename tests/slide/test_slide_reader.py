"""Pixels do not depend on the block in which they are read and are in the right place, in every format."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from dicom_slide import write_dicom_slide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from synthetic_slide import write_synthetic_slide

from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import SlideError
from hover_batch.geometry import Box, Grid, Mpp, Size
from hover_batch.slide import reader as reader_module
from hover_batch.slide.example import write_pyramidal_tiff
from hover_batch.slide.reader import SlideReader, best_level, open_slide

# wsidicom's DICOMweb client imports a name that pydicom 3 deprecates; nothing here calls it.
pytestmark = pytest.mark.filterwarnings("ignore:get_frame_offsets is deprecated:DeprecationWarning")

CMU = "slides/CMU-1-Small-Region.svs"
TCGA = "slides/TCGA-V5-A7RE_40x_colsW.tif"


def record(path: Path, mpp: float | None = None) -> SlideRecord:
    return SlideRecord("slide", path, 2, mpp=None if mpp is None else Mpp(mpp, mpp))


def opened(path: Path, mpp: float | None = None) -> SlideReader:
    slide = open_slide(record(path, mpp))
    assert isinstance(slide, SlideReader)
    return slide


def in_blocks(slide: SlideReader, grid: Grid, box: Box, width: int, height: int) -> NDArray[np.uint8]:
    """`box` read in blocks of an odd size."""
    out = np.zeros((*box.shape, 3), np.uint8)
    for y in range(box.y0, box.y1, height):
        for x in range(box.x0, box.x1, width):
            block = Box(x, y, x + width, y + height).intersect(box)
            out[block.slices_in(box)] = slide.read(block, grid)
    return out


def mirrored(index: NDArray[np.int64], extent: int) -> NDArray[np.int64]:
    return np.pad(np.arange(extent), 3 * extent, mode="symmetric")[index + 3 * extent]


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint8]:
    """Irregular pixels, so that a shift by one of them shows: RGB (523, 461, 3)."""
    noise = np.random.default_rng(5).integers(0, 256, (523, 461, 3), dtype=np.uint8)
    return noise


@pytest.mark.parametrize("name", [CMU, TCGA])
@pytest.mark.parametrize("mpp", [0.16, 0.23, 0.25, 0.5])
def test_two_partitions_of_real_slides_give_the_same_bytes(data: Path, name: str, mpp: float) -> None:
    with opened(data / name) as slide:
        grid = Grid.over(slide.info.level0, slide.info.mpp, mpp)
        x, y = round(0.62 * grid.size.width), round(0.5 * grid.size.height)
        tissue = Box(x, y, x + 1024, y + 1024)
        whole = slide.read(tissue, grid)
        assert whole.std() > 20
        assert np.array_equal(whole, in_blocks(slide, grid, tissue, 377, 513))
        # The lower border, and past it into the mirrored part.
        border = Box(x, grid.size.height - 300, x + 500, grid.size.height + 100)
        assert np.array_equal(slide.read(border, grid), in_blocks(slide, grid, border, 211, 97))


def test_the_expected_scales(data: Path) -> None:
    with opened(data / CMU) as cmu, opened(data / TCGA) as tcga:
        assert Grid.over(cmu.info.level0, cmu.info.mpp, 0.25).scale_x == 0.5
        assert Grid.over(tcga.info.level0, tcga.info.mpp, 0.25).scale_x == 1.0
        assert best_level(tcga.source.levels, Grid.over(tcga.info.level0, tcga.info.mpp, 0.5)) == 1


@pytest.mark.parametrize(("mpp", "level"), [(0.25, 0), (0.5, 1)])
def test_a_level_of_the_grids_scale_passes_through_untouched(data: Path, mpp: float, level: int) -> None:
    box = Box(1500, 1000, 2133, 1611)
    with opened(data / TCGA) as slide, openslide.OpenSlide(str(data / TCGA)) as raw:
        grid = Grid.over(slide.info.level0, slide.info.mpp, mpp)
        native = raw.read_region((box.x0 * 2**level, box.y0 * 2**level), level, (box.width, box.height))
        assert np.array_equal(slide.read(box, grid), np.asarray(native)[..., :3])


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "synthetic.tif"
    write_synthetic_slide(path, (1203, 941), tissue_fraction=0.5)
    return path


@pytest.fixture(scope="module")
def wholes(synthetic: Path) -> dict[float, tuple[Grid, NDArray[np.uint8]]]:
    """The slide read at once, by model mpp."""
    found = {}
    with opened(synthetic) as slide:
        for mpp in (0.16, 0.25, 0.37, 0.5, 1.9, 8.0):
            grid = Grid.over(slide.info.level0, slide.info.mpp, mpp)
            found[mpp] = grid, slide.read(grid.size.box, grid)
    return found


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_box_is_a_window_of_the_whole(
    synthetic: Path, wholes: dict[float, tuple[Grid, NDArray[np.uint8]]], data: st.DataObject
) -> None:
    grid, whole = wholes[data.draw(st.sampled_from(sorted(wholes)))]
    width, height = grid.size.width, grid.size.height
    x0 = data.draw(st.integers(-width, 2 * width))
    y0 = data.draw(st.integers(-height, 2 * height))
    box = Box(x0, y0, x0 + data.draw(st.integers(1, 300)), y0 + data.draw(st.integers(1, 300)))
    with opened(synthetic) as slide:
        rows = mirrored(np.arange(box.y0, min(box.y1, 3 * height)), height)
        columns = mirrored(np.arange(box.x0, min(box.x1, 3 * width)), width)
        pixels = slide.read(box, grid)
        assert pixels.shape == (box.height, box.width, 3)
        assert np.array_equal(pixels[: len(rows), : len(columns)], whole[rows[:, None], columns])


def test_parts_of_a_large_read_do_not_show(synthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(synthetic) as slide:
        for mpp in (0.25, 0.37):
            grid = Grid.over(slide.info.level0, slide.info.mpp, mpp)
            whole = slide.read(grid.size.box, grid)
            monkeypatch.setattr(reader_module, "MAX_SOURCE_PIXELS", 10_000)
            assert np.array_equal(slide.read(grid.size.box, grid), whole)
            monkeypatch.undo()


def test_a_level_of_no_whole_downsample_is_read_the_same_in_any_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sizes = [(2051, 6151), (512, 1535)]  # 4.0059 and 4.0072
    with tifffile.TiffWriter(tmp_path / "inexact.tif") as tiff:
        for number, (height, width) in enumerate(sizes):
            tiff.write(
                rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
                tile=(256, 256),
                photometric="rgb",
                compression="adobe_deflate",
                subfiletype=number,
                resolution=(40000, 40000),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    with opened(tmp_path / "inexact.tif") as slide:
        assert not slide.info.downsamples[1].is_integer()
        grid = Grid.over(slide.info.level0, slide.info.mpp, 1.1)
        assert best_level(slide.source.levels, grid) == 1
        whole = slide.read(grid.size.box, grid)
        assert np.array_equal(whole, in_blocks(slide, grid, grid.size.box, 301, 157))


@pytest.mark.parametrize("mpp", [0.16, 0.23, 0.25, 0.3, 0.5, 0.7, 1.0, 1.7])
def test_discs_stay_where_they_are(tmp_path: Path, mpp: float) -> None:
    centres = np.array([(150.3, 171.8), (700.0, 120.5), (431.7, 505.2), (811.9, 871.1)])
    radius = 24.0
    y, x = np.mgrid[:1003, :1001] + 0.5  # odd extents: the levels leave a row and a column out
    cover = sum(np.clip(radius - np.hypot(x - cx, y - cy) + 0.5, 0, 1) for cx, cy in centres)
    array = np.repeat(np.rint(255 - 200 * cover)[..., None], 3, axis=2).astype(np.uint8)
    write_pyramidal_tiff(tmp_path / "discs.tif", array, 0.25)
    with opened(tmp_path / "discs.tif") as slide:
        grid = Grid.over(slide.info.level0, slide.info.mpp, mpp)
        for cx, cy in centres:
            ix, iy, reach = cx / grid.scale_x, cy / grid.scale_y, round(2 * radius / grid.scale_x)
            box = Box(int(ix) - reach, int(iy) - reach, int(ix) + reach, int(iy) + reach)
            weight = 255.0 - slide.read(box, grid)[..., 1]
            rows, columns = np.mgrid[box.y0 : box.y1, box.x0 : box.x1] + 0.5
            found = (weight * columns).sum() / weight.sum(), (weight * rows).sum() / weight.sum()
            assert abs(found[0] - ix) < 0.1 and abs(found[1] - iy) < 0.1


def test_shrinking_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    with opened(tmp_path / "stripes.png", mpp=0.25) as slide:
        grid = Grid.over(slide.info.level0, slide.info.mpp, 0.8)
        inner = slide.read(Box(10, 10, 140, 140), grid).astype(int)
        assert np.abs(inner - 127.5).max() < 10


def test_flat_colour_stays_flat(tmp_path: Path) -> None:
    Image.new("RGB", (100, 80), (200, 100, 1)).save(tmp_path / "flat.png")
    with opened(tmp_path / "flat.png", mpp=0.3) as slide:
        for mpp in (0.16, 0.23, 0.5):
            grid = Grid.over(slide.info.level0, slide.info.mpp, mpp)
            assert (slide.read(grid.size.box.expand(5), grid) == (200, 100, 1)).all()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_pyramidal_tiff_is_never_held_whole(tmp_path: Path) -> None:
    from tiatoolbox.wsicore.wsireader import OpenSlideWSIReader, VirtualWSIReader

    path = tmp_path / "large.tif"
    write_synthetic_slide(path, (12_000, 12_000))
    before = resident_bytes()
    with opened(path) as slide:
        kind = type(slide.source.reader)  # type: ignore[attr-defined]
        assert issubclass(kind, OpenSlideWSIReader) and not issubclass(kind, VirtualWSIReader)
        grid = Grid.over(slide.info.level0, slide.info.mpp, 0.25)
        slide.read(Box(6000, 6000, 7024, 7024), grid)
        assert slide.thumbnail(700).shape == (700, 700, 3)
        assert resident_bytes() - before < 200e6  # the picture is 432 MB


def halves(array: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [array, np.ascontiguousarray(array[::2, ::2]), np.ascontiguousarray(array[::4, ::4])]


def assert_holds(slide: SlideReader, levels: list[NDArray[np.uint8]]) -> None:
    """Every level's pixels as they were written, whole and in a part that no tile borders."""
    assert slide.source.levels == tuple(Size(a.shape[1], a.shape[0]) for a in levels)
    for number, array in enumerate(levels):
        assert np.array_equal(slide.source.read(number, slide.source.levels[number].box), array)
        assert np.array_equal(slide.source.read(number, Box(3, 17, 101, 120)), array[17:120, 3:101])
    grid = Grid.over(slide.info.level0, slide.info.mpp, 0.25)
    assert np.array_equal(slide.read(Box(5, 7, 99, 301), grid), levels[0][7:301, 5:99])


def test_ome_tiff(tmp_path: Path, field: NDArray[np.uint8]) -> None:
    levels = halves(field)
    path = tmp_path / "slide.ome.tif"
    options = {"tile": (128, 128), "photometric": "rgb", "compression": "adobe_deflate"}
    spacing = {"PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(levels[0], subifds=2, metadata={"axes": "YXS", **spacing}, **options)  # type: ignore[arg-type]
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, metadata=None, **options)  # type: ignore[arg-type]
    # OpenSlide sees one level of it.
    assert openslide.OpenSlide.detect_format(str(path)) == "generic-tiff"
    with opened(path) as slide:
        assert slide.info.mpp == Mpp(0.25, 0.25) and slide.info.downsamples[0] == 1.0
        assert_holds(slide, levels)


def test_dicom_folder(tmp_path: Path, field: NDArray[np.uint8]) -> None:
    levels = halves(field)[:2]
    write_dicom_slide(tmp_path / "dicom", levels, 0.25, "a")
    with opened(tmp_path / "dicom") as slide:
        assert slide.info.mpp == Mpp(0.25, 0.25)
        assert slide.info.magnification == 40
        assert_holds(slide, levels)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_plain_tiles(tmp_path: Path, field: NDArray[np.uint8], suffix: str) -> None:
    path = tmp_path / f"tile.{suffix}"
    Image.fromarray(field).save(path)
    with opened(path, mpp=0.25) as slide:
        assert_holds(slide, [field])
        assert slide.info.mpp_source == "cohort"


def test_jpeg_tile(tmp_path: Path, field: NDArray[np.uint8]) -> None:
    Image.fromarray(field).save(tmp_path / "tile.jpg", quality=95)
    with opened(tmp_path / "tile.jpg", mpp=0.25) as slide, Image.open(tmp_path / "tile.jpg") as picture:
        assert_holds(slide, [np.asarray(picture)])


def test_transparent_is_white(tmp_path: Path) -> None:
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[:, :20] = (10, 20, 30, 255)
    pixels[:, 20:40] = (100, 100, 100, 51)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    with opened(tmp_path / "clear.png", mpp=0.25) as slide:
        row = slide.read(Box(0, 5, 60, 6), Grid.over(slide.info.level0, slide.info.mpp, 0.25))[0]
        assert (row[:20] == (10, 20, 30)).all() and (row[20:40] == 224).all() and (row[40:] == 255).all()


def test_missing_tiles_are_white(data: Path) -> None:
    with opened(data / TCGA) as slide:
        grid = Grid.over(slide.info.level0, slide.info.mpp, 0.25)
        assert (slide.read(Box(0, 0, 512, 512), grid) == 255).all()


def test_thumbnail(data: Path) -> None:
    with opened(data / CMU) as slide:
        assert slide.thumbnail(500).shape == (500, 374, 3)
        assert slide.thumbnail(10_000).shape == (2967, 2220, 3)


def test_an_empty_box(synthetic: Path) -> None:
    with opened(synthetic) as slide:
        grid = Grid.over(slide.info.level0, slide.info.mpp, 0.25)
        assert slide.read(Box(4, 4, 4, 9), grid).shape == (5, 0, 3)


def test_a_grid_of_another_slide_is_refused(synthetic: Path) -> None:
    with opened(synthetic) as slide, pytest.raises(ValueError, match="laid over"):
        slide.read(Box(0, 0, 5, 5), Grid.over(Size(100, 100), slide.info.mpp, 0.25))


def test_pixels_lost_in_the_middle_are_a_slide_error(tmp_path: Path, data: Path) -> None:
    """The header can be read, the tiles cannot: seen at the read, in one line with path and reason."""
    whole = (data / CMU).read_bytes()
    path = tmp_path / "torn.svs"
    path.write_bytes(whole[:50_000] + bytes(900_000) + whole[950_000:])
    with opened(path) as slide:
        grid = Grid.over(slide.info.level0, slide.info.mpp, 0.5)
        with pytest.raises(SlideError, match=r"torn\.svs: cannot be read: .+") as caught:
            slide.read(grid.size.box, grid)
    assert "\n" not in str(caught.value)


def test_an_interruption_does_not_come_between_closing_a_handle_and_noting_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, the handle would be closed again when it is collected, and the process would crash."""
    slide = opened(data / CMU)
    handle, invalidate = slide.source.reader.openslide_wsi._osr, openslide.lowlevel._OpenSlide.invalidate

    def interrupted(closed: openslide.lowlevel._OpenSlide) -> None:
        if closed is handle:  # not one of another test that is collected now
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # long enough for the main thread to be interrupted
        invalidate(closed)

    with monkeypatch.context() as patch:
        patch.setattr(openslide.lowlevel._OpenSlide, "invalidate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            slide.close()
        for thread in threading.enumerate():
            if thread.name == "close":
                thread.join()
    assert not handle._valid
