"""Image files are read as stored, and those that would be misread are refused with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from published import tiles, write_consep, write_folder
from scipy.io import loadmat, savemat

from hover_batch.errors import InputError
from hover_batch.taxonomy import CONSEP
from kd.data.datasets import read_data
from kd.data.layouts import recognise
from kd.data.layouts.pictures import read_codes, read_image, read_instances
from kd.data.pieces import pieces_of

ORIENTATION = 0x0112


def ramp(height: int, width: int) -> np.ndarray:
    """RGB pixels (y, x, 3) that no turn or flip maps onto themselves."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 2, x * 2, y + x], axis=2).astype(np.uint8)


def turned(path: Path, pixels: np.ndarray, orientation: int) -> Path:
    """The pixels, and a tag by which viewers turn them."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_an_orientation_is_ignored(tmp_path, suffix, orientation):
    pixels = ramp(20, 30)
    path = turned(tmp_path / f"x{suffix}", pixels, orientation)
    assert np.array_equal(read_image(path), pixels)
    labels = turned(tmp_path / "l.png", pixels[..., 1], orientation)
    assert np.array_equal(read_codes(labels, (20, 30)), pixels[..., 1])


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_jpeg_with_an_orientation(tmp_path, orientation):
    path = turned(tmp_path / "x.jpg", ramp(24, 40), orientation)
    assert np.abs(read_image(path).astype(int) - ramp(24, 40)).mean() < 5


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_tiff_with_an_orientation_is_refused(tmp_path, orientation):
    tags = [(ORIENTATION, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "x.tif", ramp(20, 30), photometric="rgb", extratags=tags)
    tifffile.imwrite(tmp_path / "l.tif", ramp(20, 30)[..., 0].astype(np.uint16), extratags=tags)
    message = f"orientation tag {orientation}; save its stored pixels as a PNG"
    with pytest.raises(InputError, match=rf"x\.tif: .*{message}"):
        read_image(tmp_path / "x.tif")
    with pytest.raises(InputError, match=rf"l\.tif: .*{message}"):
        read_instances(tmp_path / "l.tif", (20, 30))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("stored", [{}, {"compression": "zstd"}, {"tile": (16, 16)}])
def test_label_tiffs_of_all_integers(tmp_path, capfd, dtype, stored):
    labels = np.zeros((40, 50), dtype)
    labels[5:15, 5:15], labels[20:30, 20:35] = 1, 100
    tifffile.imwrite(tmp_path / "l.tif", labels, **stored)
    assert np.array_equal(read_instances(tmp_path / "l.tif", (40, 50)), labels)
    assert capfd.readouterr().err == ""


def test_ids_beyond_32_bits_are_refused(tmp_path):
    labels = np.zeros((40, 50), np.int64)
    labels[5:15, 5:15] = 1 << 32  # 0 in 32 bits
    tifffile.imwrite(tmp_path / "l.tif", labels)
    with pytest.raises(InputError, match="int64 .* should be ids from 0 to 2147483647"):
        read_instances(tmp_path / "l.tif", (40, 50))


def test_a_plain_tiff(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", ramp(20, 30), photometric="rgb")
    assert np.array_equal(read_image(tmp_path / "x.tif"), ramp(20, 30))


def test_an_instance_folder_and_consep_are_read_as_stored(tmp_path):
    image, instances, types = tiles(1, 64)[0]
    folder = write_folder(tmp_path / "folder", {"x": (image, instances, types)})
    turned(folder / "x_image.png", np.ascontiguousarray(image), 3)
    (sample,) = read_data(folder, ["train"]).samples
    assert np.array_equal(sample.image, image) and np.array_equal(sample.instances, instances)
    consep = write_consep(tmp_path / "consep", [(image, instances, types)], [])
    turned(consep / "Train/Images/train_1.png", np.ascontiguousarray(image), 6)
    (sample,) = recognise(consep).samples(CONSEP)
    assert np.array_equal(sample.image, image) and np.array_equal(sample.instances, instances)


def write_png(path: Path, pixels: np.ndarray) -> None:
    cv2.imwrite(str(path), pixels)


def write_tiff(path: Path, pixels: np.ndarray) -> None:
    tifffile.imwrite(path, pixels, photometric="rgb")


@pytest.mark.parametrize(
    ("name", "pixels", "write"),
    [
        ("12bit.png", ramp(20, 30).astype(np.uint16) * 16, write_png),
        ("grey.png", ramp(20, 30)[..., 0].astype(np.uint16) * 257, write_png),
        ("signed.tif", ramp(20, 30).astype(np.int16), write_tiff),
        ("float.tif", ramp(20, 30) / np.float32(255), write_tiff),
    ],
)
def test_images_of_more_than_8_bits_are_refused(tmp_path, name, pixels, write: Callable[..., None]):
    write(tmp_path / name, pixels)
    with pytest.raises(InputError, match=rf"{name}: an image of {pixels.dtype}, .*8-bit RGB PNG"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["absent.png", "folder.png", "short.png", "short.jpg", "short.tif", "empty.png"])
def test_missing_and_truncated_images_give_one_message(tmp_path, capfd, name):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    if name.startswith("short"):
        Image.fromarray(ramp(200, 300)).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-900])
    with pytest.raises(InputError, match=f"{name} cannot be read as an image; check that it exists and is complete"):
        read_image(tmp_path / name)
    assert "imread" not in capfd.readouterr().err


def test_images_of_8_bits_become_rgb(tmp_path):
    pixels = ramp(20, 30)
    for name, stored in (("grey", pixels[..., 0]), ("alpha", np.dstack([pixels, pixels[..., 0]]))):
        Image.fromarray(stored).save(tmp_path / f"{name}.png")
        expected = np.repeat(pixels[..., :1], 3, axis=2) if name == "grey" else pixels
        assert np.array_equal(read_image(tmp_path / f"{name}.png"), expected)


def discs(n: int) -> np.ndarray:
    """n separate nuclei, their ids from 1 on, in 16 bits."""
    labels = np.zeros((-(-n // 20) * 12, 240), np.uint16)
    for i in range(n):
        cv2.circle(labels, (6 + i % 20 * 12, 6 + i // 20 * 12), 4, i + 1, -1)
    return labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((discs(40) > 0) * np.uint8(255), "semantic mask.*1 in all.*on up to 40 separate nuclei"),
        ((discs(40) > 0).astype(np.uint16), "semantic mask"),
        ((discs(40) % 5).astype(np.uint8), "semantic mask.*4 in all"),
        (((discs(40) + 220) % 256 * (discs(40) > 0)).astype(np.uint8), "8-bit labels with 255.*16-bit grey PNG"),
        (discs(600).astype(np.uint8), "8-bit labels with 255"),
        (discs(1000).astype(np.uint8), "semantic mask"),
        (discs(300).clip(0, 255).astype(np.uint8), "8-bit labels with 255"),
        ((discs(1) > 0) * np.uint8(255), "8-bit labels with 255.*a mask of 0 and 255"),
        (discs(40) + 1, r"the background has an id, but must be 0 \(no pixels are 0, and 1 covers 6\d%"),
        (np.where(discs(300) > 0, discs(300) - 1, 700), r"must be 0 \(49 pixels are 0, and 700 covers 6\d%"),
    ],
)
def test_labels_that_are_no_instance_ids_are_refused(tmp_path, labels, message):
    write_png(tmp_path / "l.png", labels)
    with pytest.raises(InputError, match=rf"l\.png: .*{message}"):
        read_instances(tmp_path / "l.png", labels.shape)


@pytest.mark.parametrize("scale", [0.75, 1.5, 2])
@pytest.mark.parametrize("way", [cv2.INTER_LINEAR, cv2.INTER_CUBIC])
def test_interpolated_labels_are_refused(tmp_path, scale, way):
    """Edges would become nuclei: of 48 real ones, 492."""
    labels = np.repeat(np.repeat(discs(300), 2, axis=0), 2, axis=1)
    ids = cv2.resize(labels.astype(np.float32), None, fx=scale, fy=scale, interpolation=way).clip(0).astype(np.uint16)
    write_png(tmp_path / "l.png", ids)
    with pytest.raises(InputError, match=r"l\.png: .* ids are in several pieces.* nearest neighbour"):
        read_instances(tmp_path / "l.png", ids.shape)
    nearest = cv2.resize(labels, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    write_png(tmp_path / "l.png", nearest)
    assert np.array_equal(read_instances(tmp_path / "l.png", nearest.shape), nearest)


@pytest.mark.parametrize("read", [read_instances, read_codes])
def test_labels_in_a_jpeg_are_refused(tmp_path, read):
    cv2.imwrite(str(tmp_path / "l.jpg"), discs(40).astype(np.uint8))
    (tmp_path / "l.jpg").rename(tmp_path / "l.png")
    with pytest.raises(InputError, match=r"l\.png: a JPEG, whose compression changes ids"):
        read(tmp_path / "l.png", discs(40).shape)


def in_two_pieces() -> np.ndarray:
    labels = discs(30)
    labels[labels == 2] = 1
    return labels


@pytest.mark.parametrize(
    "labels",
    [
        discs(300),
        discs(254).astype(np.uint8),
        discs(255),
        (discs(1) * 255).astype(np.uint16),  # a crop of larger labels
        np.zeros((8, 8), np.uint8),
        in_two_pieces(),
        np.pad(in_two_pieces()[:, :24], 3),  # a crop that shows one nucleus, in two pieces
    ],
)
def test_labels_that_are_instance_ids_are_read(tmp_path, labels):
    write_png(tmp_path / "l.png", labels)
    assert np.array_equal(read_instances(tmp_path / "l.png", labels.shape), labels)


def test_a_semantic_inst_map_of_consep_is_refused(tmp_path):
    folder = write_consep(tmp_path, tiles(1, 128), [])
    path = folder / "Train/Labels/train_1.mat"
    content = loadmat(path)
    savemat(path, {"inst_map": np.minimum(content["inst_map"], 1), "type_map": content["type_map"]})
    with pytest.raises(InputError, match=r"train_1\.mat: inst_map: looks like a semantic mask"):
        list(recognise(folder).samples(CONSEP))


@pytest.mark.parametrize("split", [", ", " , ", ",\t"])
def test_blanks_around_the_cells_of_the_table_are_dropped(tmp_path, split):
    folder = write_folder(tmp_path, {"x": tiles(1, 64)[0]})
    table = folder / "dataset.csv"
    table.write_text("\n".join(split.join(line.split(",")) for line in table.read_text().splitlines()))
    (sample,) = read_data(folder, ["train"]).samples
    assert (sample.id, sample.source, sample.fold) == ("x", "consep", "train")


def test_a_quoted_cell_after_a_blank(tmp_path):
    folder = write_folder(tmp_path, {"x": tiles(1, 64)[0]})
    table = folder / "dataset.csv"
    table.write_text(table.read_text().replace("x,x_image.png", '"x, 1", "x_image.png"'))
    assert [s.id for s in read_data(folder, ["train"]).samples] == ["x, 1"]


def test_pieces_below_a_size_are_not_counted():
    instances = np.zeros((12, 12), np.int32)
    instances[:5, :5] = instances[7:, 7:] = 3
    instances[0, 11] = instances[11, 0] = 3
    instances[6, 0] = 9
    assert pieces_of(instances).tolist() == [4, 1]
    assert pieces_of(instances, smallest=20).tolist() == [2, 0]


@pytest.mark.parametrize("pages", [2, 3])
def test_a_tiff_of_several_pages_is_refused(tmp_path: Path, pages: int) -> None:
    """A stack of ids and classes, or the three channels of a picture, of which OpenCV would read the first."""
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((pages, 40, 40), np.uint8), photometric="minisblack")
    with pytest.raises(InputError, match=f"a TIFF of {pages} pages"):
        read_image(tmp_path / "x.tif")
    with pytest.raises(InputError, match=f"a TIFF of {pages} pages"):
        read_instances(tmp_path / "x.tif", (40, 40))
