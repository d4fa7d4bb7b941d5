"""Read the tiles of a slide in blocks, and group them into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from hover_batch.cohort.record import Stage
from hover_batch.geometry import Box
from hover_batch.seconds import Seconds
from hover_batch.slide.reader import SlideReader
from hover_batch.slide_work import SlideWork

READ_BLOCK = 1024
"""Side in inference pixels of a block that is read: large compared with the file's JPEG tiles, and small in memory."""

ReadBlocks = Callable[[list[Box], Seconds], Iterable[NDArray[np.uint8]]]
"""Function from boxes in inference pixels to their pixels, RGB (y, x, 3) uint8, in order. It adds the time that it
takes to the stage `read` of the Seconds."""


def block_reader(reader: SlideReader | None, work: SlideWork) -> ReadBlocks:
    """Return a function that reads blocks of an open slide in this process.

    The function takes boxes in inference pixels and a Seconds. It yields the pixels of each box in order, RGB (y, x, 3)
    uint8, and adds its time to the stage `read` of the Seconds. While the caller uses one block, a thread reads the
    next. The errors of the reader propagate, such as SlideError if the pixels cannot be read.

    `reader`: reader of the slide; None if stored maps are used, in which case the function must not be called. `work`:
    slide to read, for its grid.
    """

    def read(boxes: list[Box], seconds: Seconds) -> Iterator[NDArray[np.uint8]]:
        assert reader is not None

        def read_one(box: Box) -> NDArray[np.uint8]:
            with seconds.measure(Stage.READ):
                return reader.read(box, work.grid)

        with ThreadPoolExecutor(1, "read") as ahead:
            following: Future[NDArray[np.uint8]] | None = None
            for box in boxes:
                block, following = following, ahead.submit(read_one, box)
                if block is not None:
                    yield block.result()
            if following is not None:
                yield following.result()

    return read


def batches(
    kept: Iterable[Box], margin: int, read: ReadBlocks, size: int, seconds: Seconds
) -> Iterator[tuple[list[Box], list[NDArray[np.uint8]]]]:
    """Read tiles, and yield them in batches of `size`; the last batch may be smaller.

    A batch has two lists of equal length: boxes from `kept`, and the pixels of their tiles with margins, each RGB
    (tile_in, tile_in, 3) uint8. Tiles that start in the same block of READ_BLOCK pixels are read together, so they may
    come in another order than in `kept`.

    `kept`: boxes of the tiles without their margins, in inference pixels. `margin`: width of the margin in inference
    pixels. `read`: function that reads the blocks; its errors propagate. `size`: number of tiles in a batch. `seconds`:
    times of the slide, to which `read` adds.
    """
    boxes: list[Box] = []
    pixels: list[NDArray[np.uint8]] = []
    together: dict[tuple[int, int], list[Box]] = {}
    for tile in kept:
        together.setdefault((tile.y0 // READ_BLOCK, tile.x0 // READ_BLOCK), []).append(tile)
    blocks = [_hull(tiles).expand(margin) for tiles in together.values()]
    for tiles, block, image in zip(together.values(), blocks, read(blocks, seconds), strict=True):
        for tile in tiles:
            boxes.append(tile)
            pixels.append(image[tile.expand(margin).slices_in(block)])
            if len(boxes) == size:
                yield boxes, pixels
                boxes, pixels = [], []
    if boxes:
        yield boxes, pixels


def _hull(tiles: list[Box]) -> Box:
    """Return the smallest box that contains all tiles."""
    return Box(min(t.x0 for t in tiles), min(t.y0 for t in tiles), max(t.x1 for t in tiles), max(t.y1 for t in tiles))
