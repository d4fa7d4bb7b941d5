"""Tests of the prediction store: whole units, zeros outside, and the first writer wins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hover_batch.errors import SlideError
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


@pytest.mark.parametrize("spot", ["chunk", "index", "end", "all but a few bytes", "everything"])
def test_a_damaged_shard_is_named(tmp_path: Path, spot: str) -> None:
    store, box = make(tmp_path), Box(512, 0, 1024, 512)
    store.write(box, random_maps(box.shape))
    shard = next(path for path in (store.path / "c").rglob("*") if path.is_file())
    content = bytearray(shard.read_bytes())
    if spot in ("chunk", "index"):
        content[2 if spot == "chunk" else -20] ^= 0xFF
    else:
        content = content[: {"end": len(content) // 2, "all but a few bytes": 3, "everything": 0}[spot]]
    shard.write_bytes(content)
    with pytest.raises(SlideError, match=f"{shard}: .* damaged .*; remove slide.json .* repeat the segment command"):
        store.read(box)


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    store = make(tmp_path)
    (store.path / ".y.partial").touch()
    store.sweep()
    assert [path.name for path in store.path.iterdir()] == ["zarr.json"]


def test_an_empty_unit_has_no_shard(tmp_path: Path) -> None:
    store, box = make(tmp_path), Box(0, 0, 512, 512)
    assert store.write(box, np.zeros((PLANES, 512, 512), np.uint8)) is None
    assert not store.read(box).any()


@pytest.mark.parametrize(("unit", "sparse"), [(512, False), (1024, True), (256, True)])
def test_zarr_reads_what_we_write_and_writes_what_we_read(tmp_path: Path, unit: int, sparse: bool) -> None:
    whole = random_maps((SIZE.height, SIZE.width))
    if sparse:
        whole[:, :600] = 0
        whole[1] = 0
    ours = PredictionStore.create(tmp_path / "ours", SIZE, PLANES, unit, {"mpp": [0.25, 0.25]})
    theirs = PredictionStore.create(tmp_path / "theirs", SIZE, PLANES, unit, {})
    theirs.array[:] = whole
    for column, row in SIZE.box.cells(unit):
        box = cell_box(column, row, unit).intersect(SIZE.box)
        digest = ours.write(box, whole[:, box.y0 : box.y1, box.x0 : box.x1])
        assert (digest is not None) == theirs.has_shard(box) == ours.has_shard(box)
    array = zarr.open_array(tmp_path / "ours", mode="r")
    assert array.attrs["mpp"] == [0.25, 0.25] and np.array_equal(array[:], whole)
    assert np.array_equal(PredictionStore.open(tmp_path / "theirs", read_only=True).read(SIZE.box), whole)


def test_create_opens_an_existing_store(tmp_path: Path) -> None:
    box = Box(1024, 512, 1300, 900)
    maps = random_maps(box.shape)
    make(tmp_path).write(box, maps)
    assert np.array_equal(make(tmp_path).read(box), maps)


def test_a_removed_shard_is_zero_and_can_be_written_again(tmp_path: Path) -> None:
    store, box = make(tmp_path), Box(512, 0, 1024, 512)
    maps = random_maps(box.shape)
    store.write(box, maps)
    store.remove(box)
    assert store.shard_sha256(box) is None and not store.read(box).any()
    digest = store.write(box, maps)
    assert digest == store.shard_sha256(box) is not None and np.array_equal(store.read(box), maps)
