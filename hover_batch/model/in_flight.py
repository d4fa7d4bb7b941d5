"""Batches in flight: while a device computes one, the next is uploaded and the last one's maps are downloaded.

Nothing here imports torch, which fake networks do not need.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

IN_FLIGHT = 2
"""Batches in flight per unit: one is computed while another is prepared and its predecessor's maps are used."""

Key = TypeVar("Key")
Tiles = Sequence[NDArray[np.uint8]]
"""Tiles of a batch, RGB (tile_in, tile_in, 3) uint8 each."""
Predict = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""Function from tiles (n, tile_in, tile_in, 3) to their maps (n, plane, tile_out, tile_out), as `Predictor.predict`."""


class Computed:
    """Batch that is computed at once, in the calling thread. `clock`: measures `seconds`."""

    clock: ClassVar[staticmethod[[], float]] = staticmethod(time.monotonic)

    def __init__(self, predict: Predict, tiles: NDArray[np.uint8]) -> None:
        started, clock = time.time(), self.clock()
        self._maps = predict(tiles)
        self.seconds = self.clock() - clock
        self.span = started, time.time()

    def result(self) -> NDArray[np.uint8]:
        """Return the maps (n, plane, tile_out, tile_out) uint8, without waiting."""
        return self._maps


class Step(Protocol):
    """Work in a stream. `seconds`: time that the device took for it, known after `result`."""

    @property
    def seconds(self) -> float:
        """Seconds that the device took for the work; known only after `result`."""
        ...

    def result(self) -> Tensor:
        """Wait for the work, and return the tensor that it returned. Errors of the work and of its inputs propagate."""
        ...


class Stream(Protocol):
    """Queue of a device: its work is done in order, and in parallel with that of other streams."""

    def run(self, work: Callable[..., Tensor], *inputs: Any) -> Step:
        """Queue `work`, and return its step without waiting. `Step.result` raises the errors of the work.

        `work`: called with the tensors of `inputs`; returns a tensor. `inputs`: steps of this or of other streams. The
        device begins the work after they are done.
        """
        ...


@dataclass(frozen=True)
class Streams:
    """Streams of a device, and `empty`, which allocates host memory (uint8) that it can copy from and to."""

    upload: Stream
    compute: Stream
    download: Stream
    empty: Callable[[Sequence[int]], Tensor]


class InFlight:
    """Batch that a device uploads, computes and downloads while the caller goes on.

    `tiles`: (n, tile_in, tile_in, 3) uint8 in memory from `streams.empty`, which the caller must not change. `shape`:
    shape of the maps. `upload`: copies tiles to the device. `compute`: turns tiles on the device into a flat
    uint8 tensor: the maps and a last byte, which is 0 if they must be computed again. `again`: predicts tiles without
    streams, and handles overflows and a lack of memory.
    """

    def __init__(
        self,
        streams: Streams,
        tiles: Tensor,
        shape: tuple[int, ...],
        upload: Callable[[Tensor], Tensor],
        compute: Callable[[Tensor], Tensor],
        again: Callable[[NDArray[np.uint8]], Computed],
    ) -> None:
        self.seconds = 0.0
        self.span = (time.time(), 0.0)
        self._tiles, self._shape, self._again = tiles, shape, again

        def download(block: Tensor) -> Tensor:
            return streams.empty(block.shape).copy_(block, non_blocking=True)

        uploaded = streams.upload.run(lambda: upload(tiles))
        self._computed = streams.compute.run(compute, uploaded)
        self._downloaded = streams.download.run(download, self._computed)

    def result(self) -> NDArray[np.uint8]:
        """Wait for the maps, (n, plane, tile_out, tile_out) uint8, and return them; `seconds` and `span` are set.

        If fp16 overflowed or the device ran out of memory, the batch is predicted again without streams. Errors of the
        network propagate.
        """
        maps = self._maps()
        if maps is None:
            redone = self._again(self._tiles.numpy())
            maps, self.seconds = redone.result(), self.seconds + redone.seconds
        self.span = self.span[0], time.time()
        return maps

    def _maps(self) -> NDArray[np.uint8] | None:
        """Return the maps, or None if they must be computed again."""
        from torch import OutOfMemoryError

        try:
            block = self._downloaded.result().numpy()
        except OutOfMemoryError:
            return None
        self.seconds = self._computed.seconds
        return block[:-1].reshape(self._shape) if block[-1] else None


Pending = Computed | InFlight
"""Batch that was submitted.

`seconds`: time for which the device computed. `span`: start and end in seconds since 1970. Both are known after
`result`, which waits for the maps, (n, plane, tile_out, tile_out) uint8, and returns them.
"""


def in_flight(
    batches: Iterable[tuple[Key, Tiles]], submit: Callable[[Tiles], Pending]
) -> Iterator[tuple[Key, Pending]]:
    """Submit batches one after the other, and yield the key and the pending result of each, in order.

    At most IN_FLIGHT batches are pending at a time.

    `batches`: key and tiles of each batch; read only as far as needed. `submit`: function that starts a batch and
    returns it without its result, such as `Predictor.submit`; its errors propagate.
    """
    waiting: deque[tuple[Key, Pending]] = deque()
    for key, tiles in batches:
        waiting.append((key, submit(tiles)))
        if len(waiting) == IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting
