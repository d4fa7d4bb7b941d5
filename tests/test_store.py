"""Tests of the prediction store: whole units, zeros outside, and the first writer wins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hover_batch.geometry import Box, Size, cell_box
from hover_batch.store import PredictionStore

SIZE, UNIT, PLANES = Size(1300, 900), 512, 3


def random_maps(shape: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (PLANES, *shape), dtype=np.uint8)


def make(path: Path) -> PredictionStore:
    return PredictionStore.create(path / "p.zarr", SIZE, PLANES, UNIT, {"mpp": [0.25, 0.25]})


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[PredictionStore, NDArray[np.uint8]]:
    """A store written unit by unit, and the whole slide it holds."""
    store = make(tmp_path_factory.mktemp("store"))
    whole = random_maps((SIZE.height, SIZE.width))
    for column, row in SIZE.box.cells(UNIT):
        box = cell_box(column, row, UNIT).intersect(SIZE.box)
        store.write(box, whole[:, box.y0 : box.y1, box.x0 : box.x1])
    return store, whole


@given(x=st.integers(-200, 1400), y=st.integers(-200, 1000), w=st.integers(0, 700), h=st.integers(0, 700))
def test_any_box_reads_written_values_and_zeros_outside(
    filled: tuple[PredictionStore, NDArray[np.uint8]], x: int, y: int, w: int, h: int
) -> None:
    store, whole = filled
    padded = np.pad(whole, ((0, 0), (200, 1000), (200, 1000)))
    expected = padded[:, y + 200 : y + 200 + h, x + 200 : x + 200 + w]
    assert np.array_equal(store.read(Box(x, y, x + w, y + h)), expected)


def test_one_shard_per_unit(filled: tuple[PredictionStore, NDArray[np.uint8]]) -> None:
    store, _ = filled
    shards = [p for p in (store.path / "c").rglob("*") if p.is_file()]
    assert len(shards) == len(list(SIZE.box.cells(UNIT)))


def test_the_first_writer_wins(tmp_path: Path) -> None:
    store, box = make(tmp_path), Box(512, 0, 1024, 512)
    first = random_maps(box.shape)
    digest = store.write(box, first)
    assert digest is not None
    assert store.write(box, random_maps(box.shape, seed=1)) == digest
    assert store.write(box, np.zeros_like(first)) == digest  # zarr by itself would delete the shard
    assert np.array_equal(store.read(box), first)


@pytest.mark.parametrize("shape", [(512, 512), (388, 276)])
def test_without_zarrs_the_shards_are_read_and_written_by_zarr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    box = Box(0, 0, 512, 512) if shape == (512, 512) else Box(1024, 512, 1300, 900)
    maps = random_maps(shape)
    (tmp_path / "zarrs").mkdir()
    fast = make(tmp_path / "zarrs")
    pipeline = zarr.config.get("codec_pipeline.path")
    fast.write(box, maps)
    assert zarr.config.get("codec_pipeline.path") == pipeline, "users' arrays keep their codecs"
    monkeypatch.setattr("hover_batch.store.find_spec", lambda _: None)
    slow = make(tmp_path)
    slow.write(box, maps)
    assert type(slow.array._async_array.codec_pipeline) is not type(fast.array._async_array.codec_pipeline)
    assert np.array_equal(slow.read(box), maps) and np.array_equal(make(tmp_path / "zarrs").read(box), maps)


def test_an_error_of_zarrs_is_reported_by_zarr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is a RuntimeError there; the executors wait for space on an OSError."""
    store, box = make(tmp_path), Box(512, 0, 1024, 512)

    async def full(*_: object, **__: object) -> None:
        raise RuntimeError("No space left on device (os error 28)")

    monkeypatch.setattr("zarrs.ZarrsCodecPipeline.write", full)
    maps = random_maps(box.shape)
    assert store.write(box, maps) is not None
    assert np.array_equal(store.read(box), maps)


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    store = make(tmp_path)
    (store.path / ".shard.x.partial" / "c").mkdir(parents=True)
    (store.path / ".y.partial").touch()
    store.sweep()
    assert [path.name for path in store.path.iterdir()] == ["zarr.json"]


def test_an_empty_unit_has_no_shard(tmp_path: Path) -> None:
    store, box = make(tmp_path), Box(0, 0, 512, 512)
    assert store.write(box, np.zeros((PLANES, 512, 512), np.uint8)) is None
    assert not store.read(box).any()


def test_create_opens_an_existing_store_and_plain_zarr_reads_it(tmp_path: Path) -> None:
    box = Box(1024, 512, 1300, 900)
    maps = random_maps(box.shape)
    make(tmp_path).write(box, maps)
    assert np.array_equal(make(tmp_path).read(box), maps)
    array = zarr.open_array(tmp_path / "p.zarr", mode="r")
    assert array.attrs["mpp"] == [0.25, 0.25]
    assert np.array_equal(array[:, 512:900, 1024:1300], maps)


def test_a_removed_shard_is_zero_and_can_be_written_again(tmp_path: Path) -> None:
    store, box = make(tmp_path), Box(512, 0, 1024, 512)
    maps = random_maps(box.shape)
    store.write(box, maps)
    store.remove(box)
    assert store.shard_sha256(box) is None and not store.read(box).any()
    digest = store.write(box, maps)
    assert digest == store.shard_sha256(box) is not None and np.array_equal(store.read(box), maps)
