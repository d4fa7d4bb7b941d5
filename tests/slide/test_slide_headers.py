"""Properties from slide headers, and files that are refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from dicom_slide import write_dicom_slide
from PIL import Image

from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import InputError, SlideError
from hover_batch.geometry import Mpp, Size
from hover_batch.slide import formats
from hover_batch.slide.example import write_pyramidal_tiff
from hover_batch.slide.fingerprint import fingerprint
from hover_batch.slide.headers import peek

# wsidicom's DICOMweb client imports a name that pydicom 3 deprecates; nothing here calls it.
pytestmark = pytest.mark.filterwarnings("ignore:get_frame_offsets is deprecated:DeprecationWarning")

CMU = "slides/CMU-1-Small-Region.svs"
TCGA = "slides/TCGA-V5-A7RE_40x_colsW.tif"


def record(path: Path, mpp: float | None = None, magnification: float | None = None) -> SlideRecord:
    return SlideRecord("s1", path, 7, mpp=None if mpp is None else Mpp(mpp, mpp), magnification=magnification)


def test_aperio(data: Path) -> None:
    info = peek(record(data / CMU))
    assert info.level0 == Size(2220, 2967)
    assert info.mpp == Mpp(0.499, 0.499) and info.mpp_source == "file"
    assert info.vendor == "aperio" and info.magnification == 20
    assert info.downsamples == (1.0,) and info.bounds is None and info.warnings == ()


def test_generic_tiff_has_its_mpp_from_the_resolution_tags(data: Path) -> None:
    info = peek(record(data / TCGA))
    assert info.mpp.x == pytest.approx(0.2485, abs=1e-6)
    assert info.downsamples == (1.0, 2.0, 4.0, 8.0)
    assert info.vendor == "generic-tiff" and info.magnification is None


def test_the_cohort_goes_before_the_file_and_a_large_difference_is_told(data: Path) -> None:
    near, far = peek(record(data / CMU, mpp=0.5)), peek(record(data / CMU, mpp=0.25, magnification=40))
    assert near.mpp == Mpp(0.5, 0.5) and near.mpp_source == "cohort" and near.warnings == ()
    assert far.mpp == Mpp(0.25, 0.25) and far.magnification == 40
    assert len(far.warnings) == 1 and "0.499" in far.warnings[0] and "0.25" in far.warnings[0]


@pytest.mark.parametrize("tag", ["none", "inch", "screen"])
def test_unknown_mpp_is_refused_with_the_column_that_mends_it(tmp_path: Path, tag: str) -> None:
    path = tmp_path / "unknown.tif"
    # 28.35 pixels per cm is the 72 dpi of a program that knows nothing of microscopes.
    unit, value = {"none": ("NONE", 1.0), "inch": ("INCH", 72.0), "screen": ("CENTIMETER", 28.35)}[tag]
    tifffile.imwrite(
        path, np.zeros((512, 512, 3), np.uint8), tile=(256, 256), resolution=(value, value), resolutionunit=unit
    )
    with pytest.raises(InputError, match=r"unknown\.tif.*column mpp.*row 7") as caught:
        peek(record(path))
    assert caught.value.exit_code == 2
    assert peek(record(path, mpp=0.25)).mpp == Mpp(0.25, 0.25)


def test_a_tile_has_its_mpp_from_the_cohort_alone(tmp_path: Path) -> None:
    path = tmp_path / "tile.png"
    Image.new("RGB", (30, 20)).save(path, dpi=(101600, 101600))
    with pytest.raises(InputError, match="column mpp"):
        peek(record(path))
    assert peek(record(path, mpp=0.25)).level0 == Size(30, 20)


def test_dicom_without_pixel_spacing(tmp_path: Path) -> None:
    write_dicom_slide(tmp_path / "d", [np.zeros((200, 200, 3), np.uint8)], None, "b")
    with pytest.raises(SlideError, match="no pixel spacing"):
        peek(record(tmp_path / "d"))


def test_broken_slides_are_slide_errors_in_one_line(data: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.svs"
    torn.write_bytes((data / CMU).read_bytes()[:30_000])
    (tmp_path / "folder").mkdir()
    words = tmp_path / "words.png"
    words.write_text("no picture")
    for path in (data / "slides" / "broken.svs", torn, tmp_path / "folder", words, tmp_path / "absent.svs"):
        with pytest.raises(SlideError) as caught:
            peek(record(path, mpp=0.25))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert caught.value.exit_code == 3


def test_pictures_that_are_no_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((30, 40), np.uint16)).save(deep)
    with pytest.raises(SlideError, match="8-bit"):
        peek(record(deep, mpp=0.25))
    large = tmp_path / "large.png"
    Image.new("L", (300, 200)).save(large)
    monkeypatch.setattr(formats, "MAX_PICTURE_PIXELS", 50_000)
    with pytest.raises(SlideError, match="300 × 200.*pyramidal"):
        peek(record(large, mpp=0.25))


def test_a_very_large_picture_is_refused_from_its_header(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with Image.new("1", (21_000, 21_000)) as huge:
        huge.save(path)
    with pytest.raises(SlideError, match="21000 × 21000"):
        peek(record(path, mpp=0.25))


def test_ome_tiff_of_other_than_rgb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stack.ome.tif"
    tifffile.imwrite(path, np.zeros((5, 64, 64), np.uint16), metadata={"axes": "CYX"})
    with pytest.raises(SlideError, match="8-bit RGB"):
        peek(record(path, mpp=0.25))


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    one, moved = tmp_path / "one.tif", tmp_path / "elsewhere" / "two.tif"
    write_pyramidal_tiff(one, array, 0.25)
    moved.parent.mkdir()
    shutil.copyfile(one, moved)
    first = peek(record(one)).fingerprint
    assert peek(record(moved)).fingerprint == first
    assert peek(record(one, mpp=0.25)).fingerprint == first, "the CSV repeats the file's pixel size"
    assert peek(record(one, mpp=0.26)).fingerprint != first
    content = bytearray(one.read_bytes())
    content[-10] ^= 1
    moved.write_bytes(content)
    assert fingerprint(moved, None) != first


def test_fingerprint_of_a_folder_and_of_mirax(tmp_path: Path) -> None:
    write_dicom_slide(tmp_path / "d", [np.zeros((200, 200, 3), np.uint8)], 0.25, "c")
    first = fingerprint(tmp_path / "d", None)
    (tmp_path / "d").rename(tmp_path / "e")
    assert fingerprint(tmp_path / "e", None) == first
    (tmp_path / "e" / "more.dcm").write_bytes(b"x")
    assert fingerprint(tmp_path / "e", None) != first
    door, pixels = tmp_path / "m.mrxs", tmp_path / "m"
    door.write_bytes(b"thumbnail")
    pixels.mkdir()
    (pixels / "Data0000.dat").write_bytes(b"one")
    before = fingerprint(door, None)
    (pixels / "Data0000.dat").write_bytes(b"two")
    assert fingerprint(door, None) != before


def test_headers_tissue_and_tiles_need_neither_torch_nor_tiatoolbox(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    write_pyramidal_tiff(path, np.zeros((300, 300, 3), np.uint8), 0.25)
    write_dicom_slide(tmp_path / "d", [np.zeros((200, 200, 3), np.uint8)], 0.25, "d")
    code = f"""
import sys
from pathlib import Path
from hover_batch.cohort.record import SlideRecord
from hover_batch.slide import example, reader, tiles, tissue
for path in ({str(path)!r}, {str(tmp_path / "d")!r}):
    print(reader.peek(SlideRecord("s", Path(path), 2)).mpp.x)
print(sorted({{"torch", "tiatoolbox", "ray"}} & set(sys.modules)))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["0.25", "0.25", "[]", ""]


@pytest.mark.parametrize("first", ["reader", "annotation store"])
def test_importing_tiatoolbox_leaves_logging_and_stdout_alone(data: Path, first: str) -> None:
    use = {
        "reader": f"""
with open_slide(SlideRecord("s", Path({str(data / CMU)!r}), 2)):
    pass""",
        "annotation store": "sqlite_store()",
    }
    code = f"""
import logging, warnings
from pathlib import Path
from hover_batch.cohort.record import SlideRecord
from hover_batch.export.annotation_store import sqlite_store
from hover_batch.slide.reader import open_slide
show = warnings.showwarning
{use[first]}
print(logging.getLogger().handlers, warnings.showwarning is show)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\n"


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_are_refused_rather_than_blackened(tmp_path: Path, name: str) -> None:
    """A 12-bit picture in 16: Pillow would show its high bytes, all but black, without a word."""
    deep = np.random.default_rng(0).integers(0, 4096, (64, 64, 3)).astype(np.uint16)
    assert cv2.imwrite(str(tmp_path / name), deep)
    with pytest.raises(SlideError, match="8-bit grey or colour"):
        peek(record(tmp_path / name, mpp=0.25))
