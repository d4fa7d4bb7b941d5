"""A simulated device: its streams are threads, and its memory is reused at once."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hover_batch.model.in_flight import Streams


class ThreadStep:
    """Work in a thread."""

    def __init__(self, done: Future[Tensor]) -> None:
        self._done = done
        self.seconds = 0.001

    def result(self) -> Tensor:
        return self._done.result()


class ThreadStream:
    """Thread that works in order, late by a random time before each step."""

    def __init__(self, thread: ThreadPoolExecutor, seed: int) -> None:
        self._thread = thread
        self._random = random.Random(seed)

    def run(self, work: Callable[..., Tensor], *inputs: ThreadStep) -> ThreadStep:
        def late() -> Tensor:
            tensors = [step.result() for step in inputs]
            time.sleep(self._random.random() * 0.004)
            return work(*tensors)

        return ThreadStep(self._thread.submit(late))


class Memory:
    """Memory that is overwritten and lent again once nothing refers to it.

    `allocated`: number of blocks. `lent`: how often one was lent.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self.allocated = self.lent = 0

    def empty(self, shape: Sequence[int]) -> Tensor:
        size = int(np.prod(shape))
        fits = [n for n, block in enumerate(self._free) if block.size == size]
        self.allocated, self.lent = self.allocated + (not fits), self.lent + 1
        block = self._free.pop(fits[0]) if fits else np.empty(size, np.uint8)
        view = np.frombuffer(block.data, np.uint8).reshape(tuple(shape))
        weakref.finalize(view.base, self._back, block)
        return torch.from_numpy(view)

    def _back(self, block: NDArray[np.uint8]) -> None:
        block[:] = 0x5A
        self._free.append(block)


@contextmanager
def thread_streams(memory: Memory) -> Iterator[Streams]:
    """Yield the streams of a simulated device, which copies from and to `memory`."""
    with ExitStack() as stack:
        streams = [ThreadStream(stack.enter_context(ThreadPoolExecutor(1)), seed) for seed in range(3)]
        yield Streams(*streams, memory.empty)
