"""Batches in flight give the bytes of batches one by one, in whatever order a device's streams work.

The streams are threads here, and those of a GPU if there is one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from thread_streams import Memory, thread_streams
from torch import Tensor, nn

from hover_batch.config import InferSettings, Precision
from hover_batch.model.card import Card
from hover_batch.model.heads import Heads
from hover_batch.model.in_flight import IN_FLIGHT, Tiles, in_flight
from hover_batch.model.predict import Predictor
from hover_batch.taxonomy import CONSEP

CARD = Card(
    name="tiny", architecture="unet", encoder="mit_b0", taxonomy=CONSEP, mpp=0.25, tile_in=64, tile_out=32, sobel={},
    licence="test",
)  # fmt: skip
BATCH = 4
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


class Net(nn.Module):
    """A convolution. `before` is called with each batch; in between, values are `scale` times as large."""

    def __init__(self, before: Callable[[Tensor], None] = lambda image: None, scale: float = 1.0) -> None:
        super().__init__()
        self.into = nn.Conv2d(3, Heads(5).channels, 3, padding=1)
        weight = torch.randn(self.into.weight.shape, generator=torch.Generator().manual_seed(0))
        self.into.load_state_dict({"weight": 4 * scale * weight, "bias": torch.zeros(len(weight))})
        self.before, self.scale = before, scale

    def forward(self, image: Tensor) -> Tensor:
        self.before(image)
        output: Tensor = self.into(image) / self.scale
        return output


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture(params=["threads", pytest.param("cuda", marks=NO_GPU)])
def predictor_of(request: pytest.FixtureRequest, memory: Memory) -> Iterator[Callable[..., Predictor]]:
    """`predictor_of(network, precision)` on a device whose batches are in flight."""
    with thread_streams(memory) as streams:

        def make(network: nn.Module, precision: Precision = "fp32") -> Predictor:
            device = "cuda" if request.param == "cuda" else "cpu"
            settings = InferSettings(batch=BATCH, precision=precision, device=device, runtime="torch", threads=1)
            predictor = Predictor(network, CARD, settings)
            if device == "cpu":
                predictor.streams, predictor._threads = streams, None  # whole batches, as on a GPU
            return predictor

        yield make


def some_batches(count: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Batches of 1 to BATCH tiles; every fourth one is black."""
    rng = np.random.default_rng(seed)
    batches = [rng.integers(0, 256, (1 + n % BATCH, 64, 64, 3), np.uint8) for n in range(count)]
    for batch in batches[::4]:
        batch[:] = 0
    return batches


def found(predictor: Predictor, batches: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Maps of the batches, as `pipeline.infer` gets them."""

    def keyed() -> Iterator[tuple[int, Tiles]]:
        for n, batch in enumerate(batches):
            tiles = list(batch.copy())
            yield n, tiles
            for tile in tiles:  # the caller may go on with the pixels once they are submitted
                tile[:] = 77

    results = [(n, pending.result()) for n, pending in in_flight(keyed(), predictor.submit)]
    assert [n for n, _ in results] == list(range(len(batches)))
    return [maps for _, maps in results]


def assert_same(found: list[NDArray[np.uint8]], wanted: list[NDArray[np.uint8]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == np.uint8 and one.shape == other.shape and np.array_equal(one, other)


def test_bytes_are_those_of_batches_one_by_one_from_several_threads(
    predictor_of: Callable[..., Predictor], memory: Memory
) -> None:
    predictor = predictor_of(Net())
    simulated = predictor.device.type == "cpu"
    units = [some_batches(12, seed) for seed in range(3)]
    wanted = [[predictor.predict(batch) for batch in unit] for unit in units]
    assert len({maps.tobytes() for unit in wanted for maps in unit}) > 20
    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(lambda unit: found(predictor, unit), units))
    for unit, maps in zip(results, wanted, strict=True):  # all of them are still there
        assert_same(unit, maps)
    if simulated:
        assert memory.lent == 2 * 36
        del results, unit, maps
        kept = memory.allocated
        assert_same(found(predictor, units[0]), wanted[0])
        assert memory.allocated == kept, "memory of finished batches is lent again"


def test_no_more_batches_are_in_flight_than_allowed() -> None:
    submitted, yielded = [], []

    def submit(tiles: Tiles) -> int:
        submitted.append(len(tiles))
        assert len(submitted) - len(yielded) <= IN_FLIGHT
        return len(tiles)

    for key, pending in in_flight(enumerate(some_batches(9)), submit):  # type: ignore[arg-type, type-var]
        assert len(submitted) == min(9, key + IN_FLIGHT), "while one is used, the next is computed"
        yielded.append(pending)
    assert yielded == submitted


def test_the_host_does_not_wait_for_the_device(memory: Memory) -> None:
    """Submitting returns while the network still computes."""
    go = threading.Event()

    def wait(image: Tensor) -> None:
        assert go.wait(10)

    with thread_streams(memory) as streams:
        predictor = Predictor(Net(wait), CARD, InferSettings(batch=BATCH, device="cpu", runtime="torch", threads=1))
        predictor.streams, predictor._threads = streams, None
        pending = [predictor.submit(batch) for batch in some_batches(3)]
        assert not predictor.turn.locked()
        go.set()
        for one, batch in zip(pending, some_batches(3), strict=True):
            assert np.array_equal(one.result(), predictor.predict(batch))
            started, ended = one.span
            assert 0 < one.seconds <= ended - started


def test_overflows_of_fp16_are_computed_in_fp32(predictor_of: Callable[..., Predictor]) -> None:
    """Black tiles do not overflow, so some batches are kept as they are."""
    network, batches = Net(scale=1e5), some_batches(9)
    short, exact = predictor_of(network, "fp16"), predictor_of(network, "fp32")
    maps = found(short, batches)
    assert_same(maps, [short.predict(batch) for batch in batches])
    assert_same(maps[1:4], [exact.predict(batch) for batch in batches[1:4]])


def test_out_of_memory_halves_the_batch_and_changes_no_byte(predictor_of: Callable[..., Predictor]) -> None:
    def hold_two(image: Tensor) -> None:
        if len(image) > 2:
            raise torch.OutOfMemoryError("out of memory")

    batches = some_batches(9)
    predictor, one_by_one = predictor_of(Net(hold_two)), predictor_of(Net(hold_two))
    wanted = [one_by_one.predict(batch) for batch in batches]
    assert_same(found(predictor, batches), wanted)
    assert predictor.at_once == 2 and predictor.batch == BATCH


def test_errors_of_the_network_reach_the_caller_of_result(predictor_of: Callable[..., Predictor]) -> None:
    calls = []

    def break_at_third(image: Tensor) -> None:
        calls.append(len(image))
        if len(calls) == 3:
            raise RuntimeError("the device is lost")

    predictor, intact, batches = predictor_of(Net(break_at_third)), predictor_of(Net()), some_batches(5)
    pending = [predictor.submit(batch) for batch in batches]
    for n, one in enumerate(pending):
        if n == 2:
            with pytest.raises(RuntimeError, match="the device is lost"):
                one.result()
        else:
            assert np.array_equal(one.result(), intact.predict(batches[n]))
