"""DICOM folders of one slide, of several, and with instances that cannot be read."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from dicom_slide import write_dicom_slide

from hover_batch.cohort.manifest import read_cohort
from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import InputError, SlideError
from hover_batch.geometry import Grid, Size
from hover_batch.slide.headers import peek
from hover_batch.slide.reader import open_slide

# wsidicom's DICOMweb client imports a name that pydicom 3 deprecates; nothing here calls it.
pytestmark = pytest.mark.filterwarnings("ignore:get_frame_offsets is deprecated:DeprecationWarning")

LEVELS = [np.zeros((200, 260, 3), np.uint8), np.zeros((100, 130, 3), np.uint8)]


def flat_folder(folder: Path, seeds: str, levels: int = 2) -> Path:
    """The instances of several slides, side by side."""
    (folder / "flat").mkdir()
    for seed in seeds:
        write_dicom_slide(folder / seed, LEVELS[:levels], 0.25, seed)
        for file in (folder / seed).iterdir():
            shutil.move(file, folder / "flat" / f"{seed}_{file.name}")
    return folder / "flat"


def record(folder: Path) -> SlideRecord:
    return SlideRecord("s", folder, 2)


def test_several_slides_in_a_folder_are_named(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path, "abc")
    with pytest.raises(InputError, match="holds several slides") as caught:
        peek(record(folder))
    for seed in "abc":
        assert f"{seed}_level0.dcm, {seed}_level1.dcm" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_stray_instance_of_another_series_is_enough(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path, "ab")
    (folder / "b_level0.dcm").unlink()
    with pytest.raises(InputError, match=r"holds several slides.*b_level1\.dcm"):
        peek(record(folder))


def folder_with_label(tmp_path: Path) -> Path:
    """A slide, and the label of another series."""
    folder = flat_folder(tmp_path, "ab", levels=1)
    import pydicom

    label = pydicom.dcmread(folder / "b_level0.dcm")
    label.ImageType = ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]
    label.save_as(folder / "label.dcm")
    (folder / "b_level0.dcm").unlink()
    return folder


def test_a_label_of_another_series_and_other_objects_are_no_slides(tmp_path: Path) -> None:
    assert peek(record(folder_with_label(tmp_path))).level0 == Size(260, 200)


@pytest.mark.slow
def test_the_words_of_wsidicom_stay_off_the_terminal(tmp_path: Path) -> None:
    folder = folder_with_label(tmp_path)
    code = f"""
from pathlib import Path
from hover_batch.cohort.manifest import read_cohort
from hover_batch.cohort.record import SlideRecord
from hover_batch.slide.headers import peek
from hover_batch.slide.reader import open_slide
from hover_batch.slide.reader import open_slide
record = SlideRecord("s", Path({str(folder)!r}), 2)
peek(record)
open_slide(record).close()
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_an_instance_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """wsidicom would go on without it: with a smaller level for the slide."""
    folder = flat_folder(tmp_path, "a")
    (folder / "a_level0.dcm").write_bytes(b"torn")
    with pytest.raises(SlideError, match=r"a_level0\.dcm: cannot be read as DICOM") as caught:
        peek(record(folder))
    assert "\n" not in str(caught.value)


def test_instances_without_a_suffix_are_read_and_counted(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path, "a")
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"1.2.840.{number}")
    (folder / "notes.txt").write_text("no DICOM")
    (read,) = read_cohort(tmp_path / "flat*").records
    assert peek(read).level0 == Size(260, 200)
    write_dicom_slide(tmp_path / "b", LEVELS, 0.25, "b")
    (tmp_path / "b" / "level0.dcm").rename(folder / "IM0")
    with pytest.raises(InputError, match="holds several slides"):
        peek(record(folder))


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    import pydicom

    folder = flat_folder(tmp_path, "a", levels=1)
    deep = pydicom.dcmread(folder / "a_level0.dcm")
    deep.BitsAllocated, deep.BitsStored, deep.HighBit = 16, 12, 11
    deep.PixelData = deep.PixelData * 2
    deep.save_as(folder / "a_level0.dcm")
    with pytest.raises(SlideError):
        peek(record(folder))


def test_grey_is_refused(tmp_path: Path) -> None:
    import pydicom

    folder = flat_folder(tmp_path, "a", levels=1)
    grey = pydicom.dcmread(folder / "a_level0.dcm")
    grey.SamplesPerPixel, grey.PhotometricInterpretation = 1, "MONOCHROME2"
    grey.PixelData = grey.PixelData[::3]
    grey.save_as(folder / "a_level0.dcm")
    with pytest.raises(SlideError, match="pixels of 1 × 8 bits; 8-bit colour is needed"):
        peek(record(folder))


@pytest.mark.parametrize(
    ("fault", "levels"), [*product(["deflated", "planar", "7 bits", "no width"], [2, 1]), ("no volume", 1)]
)
def test_an_instance_that_wsidicom_leaves_out_is_refused(tmp_path: Path, fault: str, levels: int) -> None:
    """It would silently read the next coarser level instead."""
    import pydicom

    folder = flat_folder(tmp_path, "a", levels)
    largest = pydicom.dcmread(folder / "a_level0.dcm")
    if fault == "deflated":
        largest.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    elif fault == "planar":
        largest.PlanarConfiguration = 1
    elif fault == "7 bits":
        largest.BitsStored = 7
    elif fault == "no width":
        del largest.TotalPixelMatrixColumns
    else:
        del largest.ImagedVolumeWidth, largest.ImagedVolumeHeight
    largest.save_as(folder / "a_level0.dcm")
    with pytest.raises(SlideError, match=r"a_level0\.dcm: the encoding of the pixels or the header is not supp"):
        peek(record(folder))


def test_two_pictures_of_one_plane_are_refused(tmp_path: Path) -> None:
    """wsidicom would read only one of them."""
    import pydicom

    folder = flat_folder(tmp_path, "a", levels=1)
    [file] = folder.iterdir()
    second = pydicom.dcmread(file)
    second.SOPInstanceUID = second.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    second.save_as(folder / "second.dcm", enforce_file_format=True)
    with pytest.raises(SlideError, match="holds several pictures of .* in the same focal plane; keep one"):
        peek(record(folder))


def test_several_optical_paths_are_refused(tmp_path: Path) -> None:
    """wsidicom would read only one of them."""
    import pydicom

    folder = flat_folder(tmp_path, "a", levels=1)
    [file] = folder.iterdir()
    second = pydicom.dcmread(file)
    second.SOPInstanceUID = second.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    second.OpticalPathSequence[0].OpticalPathIdentifier = "polarized"
    second.save_as(folder / "second.dcm", enforce_file_format=True)
    with pytest.raises(SlideError, match=r"several optical paths \(0, polarized\)"):
        peek(record(folder))


def split_slide(folder: Path, numbers: Sequence[int], source: str | None = "1.2.3") -> Path:
    """A sparsely tiled slide that is split into one file for each of its 3 × 2 tiles; only the files `numbers`."""
    import pydicom
    from pydicom.sequence import Sequence as Items

    write_dicom_slide(folder, [np.full((256, 384, 3), 90, np.uint8)], 0.25, "a")
    whole = pydicom.dcmread(folder / "level0.dcm")
    (folder / "level0.dcm").unlink()
    tile = len(whole.PixelData) // whole.NumberOfFrames
    for number in numbers:
        part = copy.deepcopy(whole)
        part.SOPInstanceUID = part.file_meta.MediaStorageSOPInstanceUID = f"1.2.4.{number}"
        part.ConcatenationUID, part.InConcatenationNumber = "1.2.5", number
        part.InConcatenationTotalNumber, part.ConcatenationFrameOffsetNumber = 6, number - 1
        if source:
            part.SOPInstanceUIDOfConcatenationSource = source
        part.DimensionOrganizationType, part.NumberOfFrames = "TILED_SPARSE", 1
        frame, position, path = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        position.XOffsetInSlideCoordinateSystem = position.YOffsetInSlideCoordinateSystem = "0"
        position.ZOffsetInSlideCoordinateSystem = "0"
        position.ColumnPositionInTotalImagePixelMatrix = (number - 1) % 3 * 128 + 1
        position.RowPositionInTotalImagePixelMatrix = (number - 1) // 3 * 128 + 1
        path.OpticalPathIdentifier = "0"
        frame.PlanePositionSlideSequence, frame.OpticalPathIdentificationSequence = Items([position]), Items([path])
        part.PerFrameFunctionalGroupsSequence = Items([frame])
        part.PixelData = whole.PixelData[(number - 1) * tile : number * tile]
        part.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


def test_an_instance_in_several_files_is_read_as_a_whole(tmp_path: Path) -> None:
    slide = record(split_slide(tmp_path / "s", range(1, 7)))
    info = peek(slide)
    with open_slide(slide) as reader:
        pixels = reader.read(info.level0.box, Grid(info.level0, 1, 1, info.mpp, info.level0))
    assert pixels.shape == (256, 384, 3) and (pixels == 90).all()


@pytest.mark.parametrize(("numbers", "missing"), [((1, 2, 3), "4, 5, 6 are"), ((2, 3, 4, 5, 6), "1 is")])
def test_a_missing_file_of_an_instance_is_no_white_area(tmp_path: Path, numbers: tuple[int, ...], missing: str) -> None:
    with pytest.raises(SlideError, match=f"split into 6 files, of which {missing} missing; copy the whole slide"):
        peek(record(split_slide(tmp_path / "s", numbers)))


def test_files_of_an_instance_that_cannot_be_joined_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="do not name the same source instance"):
        peek(record(split_slide(tmp_path / "s", range(1, 7), source=None)))
