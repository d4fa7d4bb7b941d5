"""Published layouts are recognised and read, and faults in a copy of one are reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from published import CHANNEL, tiles, write_consep, write_folder, write_pannuke
from scipy.io import savemat

from hover_batch.errors import InputError
from hover_batch.taxonomy import CONSEP, PANNUKE
from kd.data.layouts import recognise
from kd.data.layouts.pannuke import merge_channels

TO_PANNUKE = np.array([0, 0, 2, 5, 1, 3, 3, 3])
"""CoNSeP's codes → PANNUKE's ids, `other` having none."""
TO_CONSEP = np.array([0, 1, 2, 3, 3, 4, 4, 4])


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """The same nuclei, whatever their ids."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


@pytest.mark.parametrize("name", ["Fold *", "Fold*", "fold_*/Fold *"])
def test_pannuke_in_every_spelling(tmp_path, name):
    cut = tiles(4, 256)
    folder = write_pannuke(tmp_path, {"2": cut[:1], "1": cut[1:3], "3": cut[3:]}, name)
    layout = recognise(folder)
    samples = list(layout.samples(PANNUKE))
    assert len(layout) == len(samples) == 4
    assert [s.fold for s in samples] == ["1", "1", "2", "3"]
    assert [s.tissue for s in samples] == ["Breast", "Bile-duct", "Breast", "Breast"]
    assert {(s.source, s.group) for s in samples} == {("pannuke", "")}
    assert len({s.id for s in samples}) == 4
    for sample, (image, instances, types) in zip(samples, [*cut[1:3], cut[0], cut[3]], strict=True):
        assert np.array_equal(sample.image, image)
        assert sample.image.dtype == np.uint8 and sample.instances.dtype == np.int32
        assert same_partition(sample.instances, instances)
        assert np.array_equal(sample.types, np.array([0, *(CHANNEL[c] + 1 for c in range(1, 8))])[types])


def test_one_fold_of_pannuke(tmp_path):
    folder = write_pannuke(tmp_path, {"1": tiles(1, 64), "2": tiles(1, 64)})
    assert {s.fold for s in recognise(folder / "Fold 2").samples(PANNUKE)} == {"2"}


def test_pannuke_with_consep_classes(tmp_path):
    (cut,) = tiles(1, 256)
    (sample,) = recognise(write_pannuke(tmp_path, {"1": [cut]})).samples(CONSEP)
    assert np.array_equal(sample.types, TO_CONSEP[cut[2]])


@given(
    st_numpy.arrays(
        np.int32,
        st_numpy.array_shapes(min_dims=2, max_dims=2, max_side=8).map(lambda s: (*s, 6)),
        elements=st.integers(0, 3),
    )
)
def test_channels_are_merged_the_later_above(mask):
    instances, codes = merge_channels(mask)
    claimed = mask[..., :5] > 0
    assert np.array_equal(instances > 0, claimed.any(axis=2))
    assert np.array_equal(codes > 0, instances > 0)
    for (y, x), code in np.ndenumerate(codes):
        if code:
            assert claimed[y, x, code - 1] and not claimed[y, x, code:].any()
    # A nucleus is an id in a channel, or what is left of it.
    for instance in np.unique(instances[instances > 0]):
        (channel,) = np.unique(codes[instances == instance]) - 1
        assert len(np.unique(mask[..., channel][instances == instance])) == 1
    shown = {(int(c), int(mask[y, x, c - 1])) for (y, x), c in np.ndenumerate(codes) if c}
    assert len(np.unique(instances[instances > 0])) == len(shown)


@pytest.fixture(scope="module")
def pannuke_folder(tmp_path_factory) -> Path:
    return write_pannuke(tmp_path_factory.mktemp("pannuke"), {"1": tiles(2, 64), "2": tiles(2, 64)})


def _change(path: Path, change):
    array = np.load(path)
    np.save(path, change(array))


def _set(value):
    def change(array):
        array[1, 3, 4, 0] = value
        return array

    return change


def _cut(path: Path):
    path.write_bytes(path.read_bytes()[:-1000])


MASKS, IMAGES, TYPES = "Fold 2/masks/fold2/masks.npy", "Fold 2/images/fold2/images.npy", "Fold 2/images/fold2/types.npy"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda f: (f / MASKS).unlink(), r"masks\.npy is missing"),
        (lambda f: shutil.rmtree(f / "Fold 2" / "masks"), r"masks\.npy is missing"),
        (lambda f: (f / TYPES).unlink(), r"types\.npy is missing"),
        (lambda f: shutil.copytree(f / "Fold 1", f / "Fold1"), "fold 1 occurs twice"),
        (
            lambda f: (f / "Fold 2/images/fold2").rename(f / "Fold 2/images/Fold2"),
            "Fold2: is not a fold, which are fold0",
        ),
        (lambda f: (f / "Fold 2/images/fold2").rename(f / "Fold 2/images/fold10"), "fold10: is not a fold"),
        (lambda f: _change(f / MASKS, lambda a: a[:1]), r"masks\.npy has 1 entries, but images\.npy 2"),
        (lambda f: _change(f / TYPES, lambda a: a[:1]), r"types\.npy has 1 entries, but images\.npy 2"),
        (lambda f: _change(f / MASKS, lambda a: a[..., :5]), r"should be numbers \(n, y, x, 6\)"),
        (lambda f: _change(f / MASKS, lambda a: a[:, :32]), r"images are \(64, 64\), but masks \(32, 64\)"),
        (lambda f: _change(f / MASKS, _set(0.5)), "mask 1 holds values other than whole numbers"),
        (lambda f: _change(f / MASKS, _set(np.nan)), "mask 1 holds values"),
        (lambda f: _change(f / MASKS, _set(-1)), "mask 1 holds values"),
        (lambda f: _change(f / IMAGES, _set(256)), "image 1 holds values .* from 0 to 255"),
        (lambda f: _cut(f / MASKS), r"masks\.npy cannot be read as a \.npy array"),
        (lambda f: (f / IMAGES).write_bytes(b"<html>"), r"images\.npy cannot be read"),
        (lambda f: np.save(f / TYPES, np.array([{}, {}], object)), r"types\.npy cannot be read"),
    ],
)
def test_faults_of_pannuke(pannuke_folder, tmp_path, fault, message):
    folder = tmp_path / "copy"
    shutil.copytree(pannuke_folder, folder)
    fault(folder)
    with pytest.raises(InputError, match=message):
        list(recognise(folder).samples(PANNUKE))


@pytest.fixture(scope="module")
def consep_folder(tmp_path_factory) -> Path:
    cut = tiles(13, 64)
    return write_consep(tmp_path_factory.mktemp("consep"), cut[:11], cut[11:])


@pytest.mark.parametrize(("taxonomy", "ids"), [(CONSEP, TO_CONSEP), (PANNUKE, TO_PANNUKE)])
def test_consep(consep_folder, taxonomy, ids):
    cut = tiles(13, 64)
    layout = recognise(consep_folder)
    samples = list(layout.samples(taxonomy))
    assert len(layout) == len(samples) == 13
    assert [s.fold for s in samples] == ["train"] * 11 + ["test"] * 2
    for sample, (image, instances, types) in zip(samples, cut, strict=True):
        assert np.array_equal(sample.image, image)
        assert np.array_equal(sample.instances, instances)
        assert np.array_equal(sample.types, ids[types])


def test_the_last_training_tiles_of_consep_become_val(consep_folder):
    folds = {s.id: s.fold for s in recognise(consep_folder, val=2).samples(CONSEP)}
    assert [name for name, fold in folds.items() if fold == "val"] == ["consep_train_10", "consep_train_11"]
    assert list(folds.values()).count("test") == 2
    with pytest.raises(InputError, match="--val 11"):
        recognise(consep_folder, val=11)


def _mat(folder: Path, **content):
    whole = {"inst_map": np.zeros((64, 64)), "type_map": np.zeros((64, 64))} | content
    savemat(folder / "Train/Labels/train_2.mat", {k: v for k, v in whole.items() if v is not None})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda f: (f / "Train/Labels/train_2.mat").unlink(), r"train_2\.png: no labels of this name in"),
        (lambda f: (f / "Train/Images/train_2.png").unlink(), r"train_2\.mat: no image of this name in"),
        (lambda f: (f / "Train/Images/train_2.png").write_bytes(b""), r"train_2\.png cannot be read"),
        (lambda f: (f / "Train/Labels/train_2.mat").write_bytes(b"<html>" * 99), r"train_2\.mat cannot be read"),
        (lambda f: _cut(f / "Train/Labels/train_2.mat"), r"train_2\.mat cannot be read"),
        (lambda f: _mat(f, type_map=None), "has no type_map; save"),
        (
            lambda f: _mat(f, inst_map=np.zeros((64, 32))),
            r"inst_map has shape \(64, 32\), but its image has \(64, 64\)",
        ),
        (lambda f: _mat(f, inst_map=np.full((64, 64), 0.5)), "inst_map holds values that are not ids"),
        (lambda f: _mat(f, inst_map=np.full((64, 64), np.nan)), "inst_map holds values that are not ids"),
        (lambda f: _mat(f, inst_map={"ids": np.zeros((64, 64))}), "inst_map is not an array of numbers"),
        (
            lambda f: _mat(f, type_map=np.full((64, 64), 8)),
            "train_2.mat: class code 8 is not one of consep's, .* 1 to 7",
        ),
    ],
)
def test_faults_of_consep(consep_folder, tmp_path, fault, message):
    folder = tmp_path / "copy"
    shutil.copytree(consep_folder, folder)
    fault(folder)
    with pytest.raises(InputError, match=message):
        list(recognise(folder).samples(CONSEP))


HEADER = "sample_id,image,labels,types,source,split"
ROW = "x,x_image.png,x_labels.png,x_types.png,consep,val\n"


def as_tiff(folder: Path, kind: str, array: np.ndarray) -> None:
    """An image's labels or types in a TIFF, which holds other numbers than a PNG."""
    cv2.imwrite(str(folder / f"x_{kind}.tif"), array)
    table = folder / "dataset.csv"
    table.write_text(table.read_text().replace(f"x_{kind}.png", f"x_{kind}.tif"))


def image_tiff(folder, **how):
    """Replace the image by a TIFF that OpenCV reads as black, or of which it reads only one channel."""
    how = {"photometric": "rgb"} | how
    tifffile.imwrite(folder / "x.tif", cv2.imread(str(folder / "x_image.png"))[..., ::-1], metadata=None, **how)
    table = folder / "dataset.csv"
    table.write_text(table.read_text().replace("x_image.png", "x.tif"))


def test_a_folder_with_types_of_known_codes(tmp_path):
    (cut,) = tiles(1, 64)
    (sample,) = recognise(write_folder(tmp_path / "a", {"x": cut})).samples(PANNUKE)
    assert np.array_equal(sample.types, TO_PANNUKE[cut[2]])
    (sample,) = recognise(write_folder(tmp_path / "b", {"x": cut}, source="nucls")).samples(PANNUKE)
    assert sample.types is None
    assert recognise(write_folder(tmp_path / "c", {"x": cut}, source="pannuke")).classes == "pannuke"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda f: (f / "x_labels.png").unlink(), r"x_labels\.png cannot be read as an image"),
        (
            lambda f: cv2.imwrite(str(f / "x_labels.png"), np.zeros((64, 60), np.uint16)),
            r"x_labels\.png: shape \(64, 60\)",
        ),
        (lambda f: cv2.imwrite(str(f / "x_types.png"), np.full((64, 64), 9, np.uint8)), r"x_types\.png: class code 9"),
        (
            lambda f: cv2.imwrite(str(f / "x_labels.png"), np.zeros((64, 64, 3), np.uint8)),
            r"x_labels\.png: uint8 of shape \(64, 64, 3\), but should be ids",
        ),
        (
            lambda f: as_tiff(f, "labels", np.full((64, 64), 1.5, np.float32)),
            r"x_labels\.tif: float32 .* but should be",
        ),
        (lambda f: image_tiff(f, compression="png"), r"x\.tif: a TIFF with compression PNG; save it as a PNG"),
        (lambda f: image_tiff(f, photometric="cielab"), r"x\.tif: a TIFF with CIELab colours; save it as an RGB PNG"),
        (
            lambda f: image_tiff(f, photometric="minisblack", planarconfig="contig"),
            r"x\.tif: a grey TIFF with 3 samples per pixel; save it as an RGB PNG",
        ),
        (lambda f: as_tiff(f, "labels", np.full((64, 64), -1, np.int16)), r"x_labels\.tif: int16 .* ids from 0 to"),
        (lambda f: as_tiff(f, "types", np.ones((64, 64), np.float32)), r"x_types\.tif: float32 .* but should be"),
        (
            lambda f: (f / "dataset.csv").write_text((f / "dataset.csv").read_text() + ROW),
            "rows 2 and 3 have the same sample_id x; change one",
        ),
        (lambda f: (f / "dataset.csv").write_text(f"{HEADER}\n"), "it lists no image"),
        (
            lambda f: (f / "dataset.csv").write_text(f"{HEADER}\n{ROW.strip()}".replace("val", "tset")),
            "row 2 has the split tset; write train, val or test",
        ),
        (
            lambda f: (f / "dataset.csv").write_text(f"{HEADER}\n\n{ROW.strip()}\n\n\n{ROW.strip()}\n"),
            "rows 3 and 6 have the same sample_id x",
        ),
        (
            lambda f: (f / "dataset.csv").write_text(f"{HEADER},magnification\n{ROW.strip()},20x\n"),
            "row 2 has magnification 20x; rescale images and labels to 40",
        ),
        (
            lambda f: (f / "dataset.csv").write_text(f"{HEADER},magnification\n{ROW.strip()},obj. x20\n"),
            r"row 2 has magnification obj\. x20; rescale",
        ),
        (
            lambda f: (f / "dataset.csv").write_text(f"{HEADER},MPP\n{ROW.strip()},0.5\n"),
            "row 2 has mpp 0.5; rescale images and labels to 40",
        ),
        (
            lambda f: (f / "dataset.csv").write_text(f"{HEADER},mpp_x,mpp_y\n{ROW.strip()},0.25,0.5\n"),
            "row 2 has mpp_y 0.5; rescale images and labels to 40",
        ),
        (
            lambda f: (f / "dataset.csv").write_text(f"{HEADER},mpp\n{ROW.strip()},-0.25\n"),
            "row 2 has mpp -0.25; rescale images and labels to 40",
        ),
        (
            lambda f: (f / "dataset.csv").write_text(f'{HEADER},mpp\n{ROW.strip()},"0,5"\n'),
            "row 2 has mpp 0,5; rescale images and labels to 40",
        ),
        (
            lambda f: (f / "dataset.csv").write_text(f"{HEADER},image\n{ROW.strip()},other.png\n"),
            "several columns image; keep one of each",
        ),
        (
            lambda f: (f / "dataset.csv").write_text(f"{HEADER}\n{ROW.strip()}".replace("val", "\u0663")),
            "row 2 has the split \u0663; write train",
        ),
        (lambda f: (f / "dataset.csv").write_text(f"{HEADER}\n{'x' * 200_000}\n"), "dataset.csv cannot be read as CSV"),
        (lambda f: (f / "dataset.csv").write_bytes("Präparat".encode("cp1252")), "dataset.csv: not UTF-8"),
        (lambda f: (f / "dataset.csv").write_text("sample_id,image\n"), "no column labels, types, source, split"),
        (
            lambda f: (f / "dataset.csv").write_text(f"{HEADER}\nx,x_image.png\n"),
            "row 2 has no labels, source, split",
        ),
    ],
)
def test_faults_of_a_folder(tmp_path, fault, message):
    folder = write_folder(tmp_path, {"x": tiles(1, 64)[0]})
    fault(folder)
    with pytest.raises(InputError, match=message):
        list(recognise(folder).samples(CONSEP))


def test_a_table_that_a_spreadsheet_wrote(tmp_path):
    folder = write_folder(tmp_path, {"x": tiles(1, 64)[0]})
    (folder / "dataset.csv").write_text((folder / "dataset.csv").read_text(), "utf-8-sig")
    assert [s.id for s in recognise(folder).samples(CONSEP)] == ["x"]


@pytest.mark.parametrize("mpp", [".25", "2.5e-1", '"0,25"', "0.25 um"])
def test_the_pixel_size_may_be_written_in_many_ways(tmp_path, mpp):
    folder = write_folder(tmp_path, {"x": tiles(1, 64)[0]})
    (folder / "dataset.csv").write_text(f"{HEADER},mpp\n{ROW.strip()},{mpp}\n")
    assert [s.id for s in recognise(folder).samples(CONSEP)] == ["x"]


def test_ids_past_16_bits_are_renumbered(tmp_path):
    """As float32, in which labels are warped, 2^30 and 2^30 + 1 are one nucleus."""
    image, instances, types = tiles(1, 64)[0]
    folder = write_folder(tmp_path, {"x": (image, instances, types)})
    as_tiff(folder, "labels", np.where(instances > 0, instances.astype(np.int32) + (1 << 30), 0))
    (sample,) = recognise(folder).samples(CONSEP)
    assert same_partition(sample.instances, instances)
    assert sample.instances.max() == len(np.unique(instances)) - 1


def test_what_is_no_layout(tmp_path):
    with pytest.raises(InputError, match="unknown layout"):
        recognise(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        recognise(tmp_path / "absent")
