"""Batches in flight give the bytes of batches one by one, in whichever order a device's streams work.

The streams are threads here, or those of a GPU if there is one.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hover_batch.config import InferSettings, Precision
from hover_batch.model.in_flight import IN_FLIGHT, InFlight, Streams, in_flight
from hover_batch.model.package import Card
from hover_batch.model.predict import Predictor
from hover_batch.taxonomy import CONSEP

CARD = Card(
    name="tiny", architecture="unet", encoder="mit_b0", taxonomy=CONSEP, mpp=0.25, tile_in=64, tile_out=32, sobel={},
    licence="test",
)  # fmt: skip
BATCH = 4


class ThreadStep:
    """Work in a thread."""

    def __init__(self, done: Future[Tensor]) -> None:
        self.done = done
        self.seconds = 0.001

    def result(self) -> Tensor:
        return self.done.result()


class ThreadStream:
    """A stream that is a thread, and late by a random time before each step."""

    def __init__(self, seed: int) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.late = random.Random(seed)

    def run(self, work: Callable[..., Tensor], *inputs: ThreadStep) -> ThreadStep:
        def late() -> Tensor:
            tensors = [step.result() for step in inputs]
            time.sleep(self.late.random() * 0.004)
            return work(*tensors)

        return ThreadStep(self.thread.submit(late))


class Memory:
    """Host memory that is overwritten and lent again as soon as nothing refers to it."""

    def __init__(self) -> None:
        self.free: dict[int, list[NDArray[np.uint8]]] = {}
        self.lent = 0
        self.owned = 0

    def empty(self, shape: Sequence[int]) -> Tensor:
        size = int(np.prod(shape))
        free = self.free.setdefault(size, [])
        self.owned += not free
        block = free.pop() if free else np.empty(size, np.uint8)
        block[:] = 0xA5
        view = block[:].reshape(tuple(shape))
        weakref.finalize(view, self._back, block)
        self.lent += 1
        return torch.from_numpy(view)

    def _back(self, block: NDArray[np.uint8]) -> None:
        block[:] = 0x5A
        self.free[block.size].append(block)


class Net(nn.Module):
    """A small network whose output depends on the pixels; `before` is called with each batch."""

    def __init__(self, before: Callable[[Tensor], None] = lambda image: None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.into = nn.Conv2d(3, CARD.heads.channels, 3, padding=1)
        with torch.no_grad():
            self.into.weight.copy_(torch.randn(self.into.weight.shape, generator=generator) * 4)
        self.before = before

    def forward(self, image: Tensor) -> Tensor:
        self.before(image)
        output: Tensor = self.into(image - 0.5)
        return output


@pytest.fixture(params=["threads", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def predictor_of(device: str) -> Iterator[Callable[..., Predictor]]:
    """`predictor_of(network, precision)` on a GPU, or on one whose streams are threads."""
    pools = [ThreadStream(seed) for seed in range(3)]

    def make(network: nn.Module, precision: Precision = "fp32", memory: Memory | None = None) -> Predictor:
        kind = "cuda" if device == "cuda" else "cpu"
        settings = InferSettings(batch=BATCH, precision=precision, device=kind, runtime="torch", threads=1)
        predictor = Predictor(network, CARD, settings)
        if device == "threads":
            predictor.streams = Streams(*pools, (memory or Memory()).empty)
            predictor._threads = None  # whole batches, as on a GPU
        return predictor

    yield make
    for pool in pools:
        pool.thread.shutdown()
