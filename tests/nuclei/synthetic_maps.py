"""Stored maps for tests: from instance maps, and random ones with hard cases."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from hover_batch.geometry import Box
from hover_batch.model.heads import MapLayout
from kd.training.targets import hv_targets

LAYOUT = MapLayout(5)


class Canvas:
    """The maps (plane, y, x) of a whole slide, readable anywhere; counts its reads."""

    def __init__(self, maps: NDArray[np.uint8]) -> None:
        self.maps = maps
        self.box = Box(0, 0, maps.shape[2], maps.shape[1])
        self.reads: list[Box] = []

    def read(self, box: Box) -> NDArray[np.uint8]:
        self.reads.append(box)
        out = np.zeros((len(self.maps), *box.shape), np.uint8)
        common = box.intersect(self.box)
        if not common.empty:
            out[:, *common.slices_in(box)] = self.maps[:, *common.slices_in(self.box)]
        return out


def maps_of(
    instances: NDArray[np.int32], types: NDArray[np.uint8], rng: np.random.Generator, noise: float
) -> NDArray[np.uint8]:
    """Quantised maps (plane, y, x) of an instance map, blurred and noisy like a network's; exact where noise is 0."""

    def seen(plane: NDArray[np.float32]) -> NDArray[np.float32]:
        if not noise:
            return plane
        blurred = cv2.GaussianBlur(plane, (5, 5), 0)
        return (blurred + rng.normal(0, noise, plane.shape)).astype(np.float32)

    probability = np.clip(seen((instances > 0).astype(np.float32)), 0, 1)
    np_map = np.minimum(255, np.floor(256 * probability)).astype(np.uint8)
    hv = [np.round(127 * np.clip(seen(plane), -1, 1)).astype(np.int8).view(np.uint8) for plane in hv_targets(instances)]
    weights = np.stack([np.exp(3 * seen((types == k).astype(np.float32))) for k in range(LAYOUT.n_types)])
    near = np_map >= LAYOUT.NP_NEAR
    softmax = np.round(255 * weights / weights.sum(axis=0)).astype(np.uint8) * near
    density = rng.integers(0, 256, (2, *instances.shape)).astype(np.uint8) * near
    return np.concatenate([np_map[None], np.stack(hv), softmax, density])


def random_canvas(seed: int, width: int, height: int) -> Canvas:
    """Blobs that overlap, touch, enclose each other and reach over the edges, as maps of a noisy network.

    Discs, single pixels, rings with and without a blob inside, chains of discs longer than most cores, and four bars
    that close a ring by touching diagonally.
    """
    rng = np.random.default_rng(seed)
    instances = np.zeros((height, width), np.int32)

    def disc(x: float, y: float, radius: float, thickness: int = -1) -> None:
        axes = (max(1, round(radius)), max(1, round(radius * rng.uniform(0.6, 1.4))))
        value = int(instances.max()) + 1
        cv2.ellipse(instances, (round(x), round(y)), axes, rng.uniform(0, 180), 0, 360, value, thickness)

    for _ in range(max(1, width * height // 900)):
        x, y, kind = rng.uniform(-5, width + 5), rng.uniform(-5, height + 5), rng.integers(0, 12)
        if kind == 0:
            instances[int(np.clip(y, 0, height - 1)), int(np.clip(x, 0, width - 1))] = instances.max() + 1
        elif kind == 1:
            radius = rng.uniform(8, 25)
            disc(x, y, radius, int(rng.integers(2, 8)))
            if rng.random() < 0.6:
                disc(x, y, radius / 4)
        elif kind == 2:
            angle = rng.uniform(0, 2 * np.pi)
            for step in range(int(rng.integers(3, 25))):
                disc(x + 9 * step * np.cos(angle), y + 9 * step * np.sin(angle), 6)
        elif kind == 3:
            draw_diagonal_ring(instances, int(x), int(y), int(rng.integers(12, 30)), int(rng.integers(3, 8)))
        else:
            disc(x, y, rng.uniform(1, 14))
    types = rng.integers(1, LAYOUT.n_types, int(instances.max()) + 1).astype(np.uint8)
    types[0] = 0
    return Canvas(maps_of(instances, types[instances], rng, noise=float(rng.choice([0, 0.02, 0.1, 0.3]))))


def draw_diagonal_ring(instances: NDArray[np.int32], x: int, y: int, side: int, thick: int) -> None:
    """Four bars around a square hole that touch at the corners only."""
    for x0, y0, x1, y1 in (
        (thick, 0, side - thick, thick),
        (thick, side - thick, side - thick, side),
        (0, thick, thick, side - thick),
        (side - thick, thick, side, side - thick),
    ):
        if x1 > x0 and y1 > y0:
            value = int(instances.max()) + 1
            cv2.rectangle(instances, (x + x0, y + y0), (x + x1 - 1, y + y1 - 1), value, -1)
