"""Whole images through a network, tile by tile, each pixel with its real surroundings.

Tiles lie on the grid of `tile_out` from (0, 0), each read wider by the model's margin. Only beyond an image's border
are there no pixels: there it is mirrored about its outermost ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.config import InferSettings

if TYPE_CHECKING:
    from hover_batch.model.package import Card
    from hover_batch.model.predict import Predictor

OfTiles = Callable[[NDArray[np.uint8]], NDArray[Any]]
"""Tiles (n, tile_in, tile_in, 3) uint8 RGB → planes (n, plane, tile_out, tile_out)."""


def batch_of(card: Card, shapes: Iterable[tuple[int, ...]] = ()) -> int:
    """Tiles a batch: a HoVerNet's features are large. Where images of these shapes (y, x, …) are all there is, and go
    one by one, no more than the largest has."""
    tiles = [-(-shape[0] // card.tile_out) * -(-shape[1] // card.tile_out) for shape in shapes]
    most = 2 if card.architecture.startswith("hovernet") else InferSettings.batch
    return min(most, max(tiles, default=most))


def predict_image(predictor: Predictor, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The maps (plane, y, x) uint8 of a whole image (y, x, 3) uint8, as MapLayout says."""
    return _by_tiles(predictor.predict, [image], predictor.card, predictor.batch)[0]


def image_logits(predictor: Predictor, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """The network's output (channel, y, x) float32 for each whole image (y, x, 3) uint8, as Heads says.

    Tiles of several images share batches, which changes nothing: see `hover_batch.model.predict`.
    """
    return _by_tiles(predictor.logits, images, predictor.card, predictor.batch)


def _by_tiles(of_tiles: OfTiles, images: Sequence[NDArray[np.uint8]], card: Card, batch: int) -> list[NDArray[Any]]:
    keep = card.tile_out
    padded = [_padded(image, card) for image in images]
    grids = [(-(-image.shape[0] // keep), -(-image.shape[1] // keep)) for image in images]
    places = [(i, r * keep, c * keep) for i, (rows, cols) in enumerate(grids) for r in range(rows) for c in range(cols)]
    whole: list[NDArray[Any]] = []
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        tiles = np.stack([padded[i][y : y + card.tile_in, x : x + card.tile_in] for i, y, x in some])
        for (i, y, x), planes in zip(some, of_tiles(tiles), strict=True):
            if i == len(whole):
                rows, cols = grids[i]
                whole.append(np.empty((len(planes), rows * keep, cols * keep), planes.dtype))
            whole[i][:, y : y + keep, x : x + keep] = planes
    return [planes[:, : image.shape[0], : image.shape[1]] for planes, image in zip(whole, images, strict=True)]


def _padded(image: NDArray[np.uint8], card: Card) -> NDArray[np.uint8]:
    """The image with a margin on every side, and more at the right and the lower one to make whole tiles."""
    right, below = -image.shape[1] % card.tile_out, -image.shape[0] % card.tile_out
    margin = card.margin
    return np.pad(image, ((margin, below + margin), (margin, right + margin), (0, 0)), mode="reflect")
