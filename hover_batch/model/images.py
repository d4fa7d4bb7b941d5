"""Prediction of whole images, tile by tile, each pixel with its real context.

Tiles lie on a grid of `tile_out` pixels from (0, 0), each read with the model's margin around it. Beyond its border the
image is reflected about its outermost pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.model.architectures import architecture

if TYPE_CHECKING:
    from hover_batch.model.card import Card
    from hover_batch.model.predict import Predictor

OfTiles = Callable[[NDArray[np.uint8]], NDArray[Any]]
"""Function from tiles (n, tile_in, tile_in, 3) uint8 RGB to planes (n, plane, tile_out, tile_out)."""


def batch_of(card: Card, shapes: Iterable[tuple[int, ...]] = ()) -> int:
    """Return a suitable number of tiles per batch on a CPU for the card's architecture.

    `card`: card of the model. `shapes`: shapes (y, x, …) in pixels of images that are processed one by one, if they are
    known. The result is then at most the number of tiles of the largest image. PackageError if the architecture is not
    known.
    """
    tile_counts = [-(-shape[0] // card.tile_out) * -(-shape[1] // card.tile_out) for shape in shapes]
    usual = architecture(card.architecture).batch
    return min(usual, max(tile_counts, default=usual))


def predict_image(predictor: Predictor, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Run the network on a whole image, tile by tile. Return its maps, (plane, y, x) uint8 (see `MapLayout`).

    Beyond its border, the image is reflected. If the GPU runs out of memory, `predictor.at_once` is halved for
    this and all later calls.

    `predictor`: loaded network. `image`: (y, x, 3) uint8 RGB of any size, with the pixel size of the model, `card.mpp`.

    PackageError if the network cannot be compiled, torch.OutOfMemoryError if one tile does not fit in the GPU's memory.
    """
    return _by_tiles(predictor.predict, [image], predictor.card, predictor.batch)[0]


def image_logits(predictor: Predictor, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """Run the network on whole images, tile by tile. Return the output for each, (channel, y, x) float32 (see `Heads`).

    Tiles of several images share batches, without effect on the output (see `hover_batch.model.predict`). Beyond its
    border, an image is reflected. If the GPU runs out of memory, `predictor.at_once` is halved for this and all later
    calls.

    `predictor`: loaded network. `images`: (y, x, 3) uint8 RGB each, of any sizes, with the pixel size of the model,
    `card.mpp`.

    PackageError if the network cannot be compiled, torch.OutOfMemoryError if one tile does not fit in the GPU's memory.
    """
    return _by_tiles(predictor.logits, images, predictor.card, predictor.batch)


def _by_tiles(of_tiles: OfTiles, images: Sequence[NDArray[np.uint8]], card: Card, batch: int) -> list[NDArray[Any]]:
    side = card.tile_out
    padded = [_padded(image, card) for image in images]
    grids = [(-(-image.shape[0] // side), -(-image.shape[1] // side)) for image in images]
    places = [(i, r * side, c * side) for i, (rows, cols) in enumerate(grids) for r in range(rows) for c in range(cols)]
    whole: list[NDArray[Any]] = []
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        tiles = np.stack([padded[i][y : y + card.tile_in, x : x + card.tile_in] for i, y, x in some])
        for (i, y, x), planes in zip(some, of_tiles(tiles), strict=True):
            if i == len(whole):
                rows, cols = grids[i]
                whole.append(np.empty((len(planes), rows * side, cols * side), planes.dtype))
            whole[i][:, y : y + side, x : x + side] = planes
    return [planes[:, : image.shape[0], : image.shape[1]] for planes, image in zip(whole, images, strict=True)]


def _padded(image: NDArray[np.uint8], card: Card) -> NDArray[np.uint8]:
    """Pad an image by the margin on every side, and on the right and below to whole tiles."""
    right, below = -image.shape[1] % card.tile_out, -image.shape[0] % card.tile_out
    margin = card.margin
    return np.pad(image, ((margin, below + margin), (margin, right + margin), (0, 0)), mode="reflect")
