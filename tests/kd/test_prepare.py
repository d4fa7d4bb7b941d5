"""`kd prepare`, from published folders to a cache, its table, its notes and its contact sheet."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from published import tiles, write_consep, write_folder, write_pannuke
from typer.testing import CliRunner

from hover_batch.errors import InputError
from hover_batch.taxonomy import CONSEP, PANNUKE
from kd.cli import kd_app
from kd.data.contact_sheet import COLUMNS, PICTURES, SIDE, UNTYPED, ZOOM, ContactSheet, sample_picture
from kd.data.datasets import read_data
from kd.data.pieces import pieces_of
from kd.data.samples import Sample


def run(*arguments: object):
    return CliRunner().invoke(kd_app, ["prepare", *map(str, arguments)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    cut = tiles(8, 128)
    return {
        "pannuke": write_pannuke(root / "pannuke", {"1": cut[:2], "2": cut[2:3]}),
        "consep": write_consep(root / "consep", cut[3:6], cut[6:7]),
        "folder": write_folder(root / "folder", {"x": cut[7]}),
    }


@pytest.mark.parametrize("form", ["data.zarr", "data.npz"])
def test_all_layouts_into_one_cache(folders, tmp_path, form):
    result = run(*folders.values(), "-o", tmp_path / form, "--val", 1)
    assert result.exit_code == 0, result.exception
    data = read_data(tmp_path / form, ["1", "2", "train", "val", "test"])
    assert data.taxonomy == PANNUKE
    assert [(s.source, s.fold) for s in data.samples] == [
        *[("pannuke", fold) for fold in "112"],
        *[("consep", fold) for fold in ("train", "train", "train", "val", "test")],
    ]
    nuclei = sum(len(np.unique(s.instances[s.instances > 0])) for s in data.samples if s.fold == "1")
    row = next(line for line in result.stdout.splitlines() if line.startswith("│ pannuke │ 1 "))
    assert [cell.strip() for cell in row.strip("│").split("│")][:4] == ["pannuke", "1", "2", str(nuclei)]
    assert "look at" in result.stdout
    assert "pannuke has no fold 3" in result.stderr
    sheet = cv2.imread(str(tmp_path / "data.png"))
    assert sheet.shape[1] == COLUMNS * (SIDE * ZOOM + 4)


def test_consep_alone_has_its_own_classes(folders, tmp_path):
    result = run(folders["consep"], "-o", tmp_path / "data.npz", "--sheet", tmp_path / "look.png")
    assert result.exit_code == 0, result.exception
    assert read_data(tmp_path / "data.npz", []).taxonomy == CONSEP
    assert "no fold val" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"data.npz", "look.png"}
    run(folders["pannuke"], "-o", tmp_path / "data.npz", "--classes", "consep")
    assert read_data(tmp_path / "data.npz", []).taxonomy == CONSEP


def test_what_is_odd_is_noted(folders, tmp_path):
    image, instances, types = (array.copy() for array in tiles(1, 64)[0])
    instances[:], types[:] = 0, 0
    instances[2:4, 2:4], types[2:4, 2:4] = 1, 1  # CoNSeP's `other`: PanNuke has no class for it
    instances[10:12, 10:12], instances[20:22, 20:22] = 7, 7
    types[10:12, 10:12], types[20:22, 20:22] = 2, 5
    types[40, 40] = 2
    a = write_folder(tmp_path / "a", {"x": (image, instances, types)}, fold="train")
    b = write_folder(tmp_path / "b", {"y": (image, instances, types)}, fold="test")
    result = run(a, b, "-o", tmp_path / "data.npz", "--classes", "pannuke")
    assert result.exit_code == 0, result.exception
    for note in (
        "nuclei in several pieces: 2; not changed",
        "nuclei with pixels of several classes: 2; not changed",
        "typed pixels outside nuclei: 2; not changed",
        "2 nuclei have none of the classes of pannuke",
        "the same image is in several folds (train: x, test: y)",
    ):
        assert note in result.stderr


def test_types_whose_codes_are_not_known_are_told_of(folders, tmp_path):
    folder = write_folder(tmp_path / "a", {"x": tiles(1, 64)[0]}, fold="train")
    table = folder / "dataset.csv"
    table.write_text(table.read_text().replace(",consep,", ",lizard,"))
    result = run(folder, "-o", tmp_path / "data.npz")
    assert result.exit_code == 0, result.exception
    assert "the types of lizard are not read" in result.stderr
    assert read_data(tmp_path / "data.npz", ["train"]).samples[0].types is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["consep", "-o", "data.h5"], "must end in .zarr or .npz"),
        (["consep", "-o", "absent/data.npz"], "the folder .*absent does not exist"),
        (["consep", "-o", "data.npz", "--classes", "kumar"], "--classes kumar: unknown; give one of consep, pannuke"),
        (["pannuke", "-o", "data.npz", "--val", "2"], "--val 2"),
        (["consep", "-o", "/proc/data.zarr"], "--out /proc/data.zarr: cannot be written"),
        (["consep", "consep", "-o", "data.npz"], "two images have this id"),
        (["consep", "-o", "data.npz", "--sheet", "absent/sheet.png"], "--sheet .*absent does not exist"),
        (["empty", "-o", "data.npz"], "lists no image"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_left(folders, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = write_folder(tmp_path / "empty", {})
    known = folders | {"empty": empty}
    result = run(*(known.get(a, a) for a in arguments))
    with pytest.raises(InputError, match=message):
        raise result.exception
    assert list(tmp_path.iterdir()) == [empty]


def test_a_picture_of_the_user_is_not_replaced_by_the_contact_sheet(tmp_path):
    """The sheet lies next to the cache, and so may have the name of the picture that was annotated."""
    folder = write_folder(tmp_path / "case", {"case": tiles(1, 64)[0]})
    picture = folder / "case_image.png"
    before = picture.read_bytes()
    for options in ((), ("--sheet", folder / "case_image.npz"), ("--sheet", folder)):
        result = run(folder, "-o", folder / "case_image.npz", *options)
        with pytest.raises(InputError, match="--sheet .*(is not a contact sheet|is also --out)"):
            raise result.exception
    assert picture.read_bytes() == before and not (folder / "case_image.npz").exists()
    for _ in range(2):
        assert run(folder, "-o", folder / "case_image.npz", "--sheet", folder / "sheet.png").exit_code == 0


def test_names_are_printed_as_they_are(tmp_path):
    """As markup of rich, the first would be an error, the second bold and the third a cross."""
    for source in ("[/x]", "[b]x", "a:x:"):
        folder = write_folder(tmp_path / source.replace("/", ""), {"x": tiles(1, 64)[0]}, source=source)
        (folder / "x_types.png").unlink()
        table = (folder / "dataset.csv").read_text()
        (folder / "dataset.csv").write_text(table.replace("x_types.png", ""))
        result = run(folder, "-o", tmp_path / "data.npz")
        assert result.exit_code == 0 and f"│ {source} " in result.stdout


def test_a_pipe_is_no_image(tmp_path):
    folder = write_folder(tmp_path / "x", {"x": tiles(1, 64)[0]})
    (folder / "x_image.png").unlink()
    os.mkfifo(folder / "x_image.png")
    with pytest.raises(InputError, match=r"x_image\.png cannot be read as an image"):
        raise run(folder, "-o", tmp_path / "data.npz").exception


def test_real_annotations_come_back(data, tmp_path):
    """A few of the real tiles, as they are read without a cache."""
    source = data / "nuclei"
    lines = (source / "dataset.csv").read_text().splitlines()
    few = [
        line for name in ("tnbc", "consep", "monuseg", "nucls") for line in [x for x in lines if f",{name}," in x][:2]
    ]
    for kind in ("images", "labels", "types"):
        (tmp_path / kind).symlink_to(source / kind)
    (tmp_path / "dataset.csv").write_text("\n".join([lines[0], *few]) + "\n")
    result = run(tmp_path, "-o", tmp_path / "data.zarr")
    assert result.exit_code == 0, result.exception
    splits = ("train", "val", "test")
    expected = read_data(tmp_path, splits).samples
    for a, b in zip(read_data(tmp_path / "data.zarr", splits).samples, expected, strict=True):
        assert (a.id, a.image_sha256, a.group) == (b.id, b.image_sha256, b.group)
        assert np.array_equal(a.instances, b.instances)
        assert (a.types is None) == (b.types is None)
        assert a.types is None or np.array_equal(a.types, b.types)


def blob(types: np.ndarray | None) -> Sample:
    instances = np.zeros((40, 60), np.int32)
    instances[10:20, 30:45] = 3
    return Sample("name", "source", "", np.full((40, 60, 3), 255, np.uint8), instances, types, fold="1")


@pytest.mark.parametrize("kind", [0, 1, 4])
def test_contours_lie_on_the_nucleus_in_the_colour_of_its_class(kind):
    sample = blob(np.full((40, 60), kind, np.uint8) if kind else None)
    color = PANNUKE.classes[kind].color if kind else UNTYPED
    ys, xs = np.nonzero((sample_picture(sample, PANNUKE) == color).all(axis=2))
    box = ys.min() / ZOOM, (ys.max() + 1) / ZOOM, xs.min() / ZOOM, (xs.max() + 1) / ZOOM
    assert box == pytest.approx((10, 20, 30, 45), abs=1)


def test_the_sheet_shows_the_same_samples_again(tmp_path):
    for name in ("a.png", "b.png"):
        sheet = ContactSheet(PANNUKE)
        for i in range(PICTURES + 9):
            sheet.add(Sample(str(i), "s", "", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.int32), None))
        sheet.write(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_pieces():
    instances = np.array([[5, 5, 0, 2], [0, 0, 5, 0], [5, 0, 0, 2]], np.int32)
    assert pieces_of(instances).tolist() == [2, 2]
    assert pieces_of(np.zeros((2, 2), np.int32)).tolist() == []
