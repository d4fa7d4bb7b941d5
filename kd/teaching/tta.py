"""Test-time augmentation: average a network's output over the eight right-angle rotations and flips of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

from hover_batch.model.heads import HV, NP, Heads

Logits = NDArray[np.float32]
LogitsOf = Callable[[Sequence[NDArray[np.uint8]]], list[Logits]]
"""Function from images (y, x, 3) uint8 RGB to a network's outputs (channel, y, x) float32."""

VIEWS = tuple(product(range(4), (False, True)))
"""Views as (number of quarter turns, whether the turned image is flipped from left to right)."""


def averaged(logits_of: LogitsOf, images: Sequence[NDArray[np.uint8]], n_types: int) -> list[Logits]:
    """Return a network's output for each image, (channel, y, x) float32, averaged over the eight VIEWS.

    h and v are averaged. For np and tp, probabilities are averaged, and their logarithms are returned.

    `logits_of`: runs the network; it is called once, with all 8 views of all images, and its errors propagate.
    `images`: images (y, x, 3) uint8 RGB. `n_types`: number of classes, background included.
    """
    views = [np.ascontiguousarray(turned(image, *view)) for image in images for view in VIEWS]
    outputs = iter(logits_of(views))
    return [_mean(np.stack([turned_back(next(outputs), *view) for view in VIEWS]), Heads(n_types)) for _ in images]


def _mean(outputs: Logits, heads: Heads) -> Logits:
    """Return the mean (channel, y, x) of outputs (n, channel, y, x)."""
    mean: Logits = outputs.mean(axis=0)
    for branch in (NP, heads.tp):
        mean[branch] = logsumexp(log_softmax(outputs[:, branch], axis=1), axis=0) - np.log(len(outputs))
    return mean


def turned(image: NDArray[np.uint8], turns: int, flip: bool) -> NDArray[np.uint8]:
    """Return an image (y, x, 3) uint8, rotated counterclockwise and then, if `flip`, flipped left to right.

    The result is a view of `image`, not a copy.

    `turns`: number of quarter turns. `flip`: whether the rotated image is flipped.
    """
    view = np.rot90(image, turns)
    return view[:, ::-1] if flip else view


def turned_back(output: Logits, turns: int, flip: bool) -> Logits:
    """Turn the output for a rotated or flipped image back to the orientation of the image. Return a new array.

    h and v are distances along the axes, so they swap and change sign when the axes do.

    `output`: (channel, y, x) output of a network for `turned(image, turns, flip)`. `turns`: number of quarter turns of
    that image. `flip`: whether it was flipped.
    """
    h, v = output[HV]
    if flip:
        h = -h
    for _ in range(turns):
        h, v = -v, h
    back = np.concatenate([output[NP], h[None], v[None], output[HV.stop :]])
    back = back[..., ::-1] if flip else back
    return np.ascontiguousarray(np.rot90(back, -turns, axes=(1, 2)))
