"""Caches return what was written, in both formats; corruption is detected, and a killed write leaves no remains."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kd.data.stores
from hover_batch.errors import InputError
from hover_batch.taxonomy import PANNUKE
from kd.data.cache import open_cache, writing
from kd.data.datasets import folds_of, read_data
from kd.data.samples import Sample

ROOT = Path(__file__).resolve().parents[2]
FORMS = ["data.zarr", "data.npz"]


def sample(name: str, height: int, width: int, fold: str = "1", typed: bool = True, source: str = "pannuke") -> Sample:
    rng = np.random.default_rng(height * 1000 + width)
    instances = rng.integers(0, 70_000, (height, width), np.int32)
    types = rng.integers(0, 6, (height, width), np.uint8) if typed else None
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    return Sample(name, source, f"patient of {name}", image, instances, types, tissue="Bile-duct", fold=fold)


def write(path: Path, samples: list[Sample]) -> Path:
    with writing(path, PANNUKE) as cache:
        for s in samples:
            cache.add(s)
    return path


def assert_same(a: Sample, b: Sample) -> None:
    for name in ("id", "source", "group", "tissue", "fold", "image_sha256"):
        assert getattr(a, name) == getattr(b, name)
    for name in ("image", "instances", "types"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype and np.array_equal(x, y)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from("12"), st.booleans()), max_size=6)
)
def test_what_is_written_is_read(tmp_path, monkeypatch, form, sizes):
    monkeypatch.setattr(kd.data.stores, "CHUNK", 100)  # images end within chunks, at their ends, and span several
    samples = [sample(f"s{i}", h, w, fold, typed) for i, (h, w, fold, typed) in enumerate(sizes)]
    path = write(tmp_path / form, samples)
    there = list(dict.fromkeys(s.fold for s in samples))
    assert folds_of(path) == there
    data = read_data(path, there)
    assert data.taxonomy == PANNUKE
    for a, b in zip(data.samples, sorted(samples, key=lambda s: there.index(s.fold)), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_folds_and_sources(tmp_path, form):
    samples = [sample("a", 5, 4, "train"), sample("b", 6, 4, "test", source="consep"), sample("c", 7, 4, "train")]
    path = write(tmp_path / form, samples)
    assert [s.id for s in read_data(path, ["test", "train", "test"]).samples] == ["b", "a", "c"]
    assert [s.id for s in read_data(path, ["test", "train"], ["consep"]).samples] == ["b"]
    assert read_data(path, ["val"]).samples == []
    with pytest.raises(InputError, match="has no fold 3; its folds are train, test"):
        read_data(path, ["train", "3"])


@pytest.mark.parametrize("part", ["image", "instances", "types"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_chunk_names_cache_and_image(tmp_path, monkeypatch, part, damage):
    monkeypatch.setattr(kd.data.stores, "CHUNK", 100)
    path = write(tmp_path / "data.zarr", [sample("sound", 10, 10), sample("damaged", 10, 10)])
    (chunk,) = path.glob(f"{part}/c/1*/0") if part == "image" else path.glob(f"{part}/c/1")
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        chunk.unlink()
    else:
        chunk.write_bytes(content if damage == "flipped" else content[:10])
    cache = open_cache(path).samples("1", None)
    assert next(cache).id == "sound"
    with pytest.raises(
        InputError, match=r"data\.zarr: the image damaged is corrupted; run `hover-batch kd prepare` again"
    ):
        next(cache)


def test_a_damaged_npz_names_cache_and_image(tmp_path):
    path = write(tmp_path / "data.npz", [sample("a", 50, 50)])
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"data\.npz: the image a is corrupted"):
        read_data(path, ["1"])


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_cache(tmp_path, form):
    path = tmp_path / form
    with pytest.raises(InputError, match="no such cache"):
        read_data(path, ["1"])
    path.mkdir()
    with pytest.raises(InputError, match="cannot be read as a cache"):
        read_data(path, ["1"])
    with pytest.raises(InputError, match="remove it first"), writing(path, PANNUKE):
        pass  # what somebody else's is stays
    assert path.is_dir()


def test_a_npz_whose_header_is_damaged(tmp_path):
    path = write(tmp_path / "data.npz", [sample("a", 5, 5)])
    content = bytearray(path.read_bytes())
    at = content.index(b"header.npy") + 40  # within what is deflated
    content[at : at + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a cache"):
        read_data(path, ["1"])


@pytest.mark.parametrize(
    "changed", [{"width": "5"}, {"height": 0}, {"fold": [[]]}, {"typed": 1}, {"height": 10**29}, {"source": None}]
)
def test_a_header_whose_values_are_altered(tmp_path, changed):
    path = write(tmp_path / "data.zarr", [sample("a", 5, 5)])
    header = json.loads((path / "zarr.json").read_text())
    header["attributes"]["images"][0] |= changed
    (path / "zarr.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match=r"data\.zarr.*run `hover-batch kd prepare` again"):
        read_data(path, ["1"])


def test_a_cut_npz_and_one_of_others(tmp_path):
    path = write(tmp_path / "data.npz", [sample("a", 50, 50)])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="cannot be read as a cache"):
        read_data(path, ["1"])
    np.savez(path, x=np.zeros(3))
    with pytest.raises(InputError, match="cannot be read as a cache"):
        read_data(path, ["1"])


def test_a_plain_npz_opens_with_numpy(tmp_path):
    s = sample("a", 5, 4)
    with np.load(write(tmp_path / "data.npz", [s]), allow_pickle=False) as content:
        assert np.array_equal(content["image/0"], s.image)


@pytest.mark.parametrize("form", FORMS)
def test_a_failed_write_leaves_what_was_there(tmp_path, form):
    path = write(tmp_path / form, [sample("old", 5, 4)])
    with pytest.raises(InputError, match="a: two images have this id"):
        write(path, [sample("a", 5, 4), sample("a", 6, 4)])
    assert [s.id for s in read_data(path, ["1"]).samples] == ["old"]
    assert list(tmp_path.iterdir()) == [path]
    write(path, [sample("new", 5, 4)])
    assert [s.id for s in read_data(path, ["1"]).samples] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("form", FORMS)
def test_a_killed_write_looks_like_none(tmp_path, form):
    path = tmp_path / form
    code = f"""
        import os, signal
        from test_cache import sample, PANNUKE, Path, kd, writing
        kd.data.stores.CHUNK = 100
        with writing(Path({str(path)!r}), PANNUKE) as cache:
            for i in range(9):
                cache.add(sample(str(i), 20, 20))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not path.exists()
    assert list(tmp_path.iterdir()) != []
    write(path, [sample("a", 5, 4)])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("form", FORMS)
def test_two_writers_of_one_cache_do_not_disturb_each_other(tmp_path, form):
    path = tmp_path / form
    with writing(path, PANNUKE) as first:
        first.add(sample("first", 5, 4))
        assert [s.id for s in read_data(write(path, [sample("second", 5, 4)]), ["1"]).samples] == ["second"]
        first.add(sample("last", 5, 4))
    assert [s.id for s in read_data(path, ["1"]).samples] == ["first", "last"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kd.data.stores.NpzStore, "append", full)
    with pytest.raises(InputError, match="the disk is full"):
        write(tmp_path / "data.npz", [sample("a", 5, 4)])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_once(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kd.data.stores.np, "save", full)
    monkeypatch.setattr(zipfile.ZipFile, "_write_end_record", full)
    with pytest.raises(InputError, match="the disk is full"):
        write(tmp_path / "data.npz", [sample("a", 5, 4)])
    gc.collect()  # an error while a forgotten file is closed would be a warning, hence a failure
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_an_error_in_reading_is_not_blamed_on_the_cache(tmp_path, form):
    with pytest.raises(FileNotFoundError, match="absent.png"), writing(tmp_path / form, PANNUKE) as cache:
        cache.add(sample("a", 5, 4))
        (tmp_path / "absent.png").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_npz_needs_no_zarr_ray_tiatoolbox_or_torch(tmp_path):
    path = write(tmp_path / "data.npz", [sample("a", 5, 4)])
    code = f"""
        import sys
        from pathlib import Path
        sys.modules |= dict.fromkeys(("zarr", "ray", "tiatoolbox", "torch"))  # an import of these fails
        from kd.data.datasets import read_data
        print(read_data(Path({str(path)!r}), ["1"]).samples[0].id)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.stdout == "a\n", ended.stderr
