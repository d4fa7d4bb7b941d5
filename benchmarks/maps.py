"""Stored maps for benchmarks and slow tests: predictions on a real slide, and crowded synthetic nuclei."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hover_batch.config import InferSettings
from hover_batch.geometry import Box, Grid
from hover_batch.model.heads import MapLayout
from kd.training.targets import hv_targets

SLIDE = Path(__file__).resolve().parents[2] / "shared" / "data" / "slides" / "TCGA-V5-A7RE_40x_colsW.tif"
"""40× TCGA slide; not part of the repository."""
DENSE_FIELD = Box(5120, 4352, 7168, 6400)
"""Field of 2048 × 2048 inference pixels with the most nuclei of SLIDE."""
SYNTHETIC_CLASSES = 5
"""Number of classes of the synthetic nuclei, with the background."""


def real_maps(slide: Path = SLIDE, field: Box = DENSE_FIELD) -> tuple[NDArray[np.uint8], MapLayout]:
    """Return the starter's stored maps (plane, y, x) uint8 of a field of a slide, and their layout.

    `field`: in inference pixels; its sides must be multiples of the starter's output tile. Takes about a minute on a
    CPU.
    """
    from hover_batch.cohort.record import SlideRecord
    from hover_batch.model.package import find_package, load_network
    from hover_batch.model.predict import Predictor
    from hover_batch.slide.reader import open_slide

    package = find_package("starter")
    card = package.card
    predictor = Predictor(load_network(package), card, InferSettings(batch=4))
    maps = np.empty((card.layout.planes, *field.shape), np.uint8)
    with open_slide(SlideRecord("benchmark", slide, row=1)) as reader:
        grid = Grid.over(reader.info.level0, reader.info.mpp, card.mpp)
        around = field.expand(card.margin)
        image = reader.read(around, grid)
    side = card.tile_out
    tiles = [
        Box(x, y, x + side, y + side) for y in range(field.y0, field.y1, side) for x in range(field.x0, field.x1, side)
    ]
    for first in range(0, len(tiles), predictor.batch):
        batch = tiles[first : first + predictor.batch]
        pixels = np.stack([image[tile.expand(card.margin).slices_in(around)] for tile in batch])
        for tile, planes in zip(batch, predictor.predict(pixels), strict=True):
            maps[:, *tile.slices_in(field)] = planes
    return maps, card.layout


def synthetic_maps(side: int = 2048, seed: int = 0) -> tuple[NDArray[np.uint8], MapLayout]:
    """Return stored maps (plane, side, side) uint8 of crowded elliptical nuclei, and their layout.

    Nuclei are on a jittered grid with a spacing of 24 pixels, so most of them touch another one. The maps of np, hv and
    tp are the true targets with blur and noise, like the predictions of a mediocre network; stains are random.
    """
    rng = np.random.default_rng(seed)
    layout = MapLayout(SYNTHETIC_CLASSES)
    instances = np.zeros((side, side), np.int32)
    centres = np.stack(np.meshgrid(np.arange(12, side, 24), np.arange(12, side, 24)), -1).reshape(-1, 2)
    for i, (x, y) in enumerate(centres + rng.integers(-8, 9, centres.shape), start=1):
        radii: list[int] = rng.integers(6, 14, 2).tolist()
        cv2.ellipse(instances, (int(x), int(y)), radii, float(rng.uniform(0, 180)), 0, 360, (i,), -1)
    types = rng.integers(1, layout.n_types, len(centres) + 1).astype(np.uint8)
    types[0] = 0

    def degraded(plane: NDArray[np.float32]) -> NDArray[np.float32]:
        noise = cv2.GaussianBlur(rng.normal(0, 1, plane.shape).astype(np.float32), (5, 5), 0)
        return cv2.GaussianBlur(plane, (5, 5), 0) + np.float32(0.2) * noise

    maps = np.zeros((layout.planes, side, side), np.uint8)
    maps[layout.NP] = np.clip(np.floor(256 * degraded((instances > 0).astype(np.float32))), 0, 255)
    for plane, target in zip((layout.H, layout.V), hv_targets(instances), strict=True):
        maps[plane] = np.round(127 * np.clip(degraded(target), -1, 1)).astype(np.int8).view(np.uint8)
    near = maps[layout.NP] >= layout.NP_NEAR
    logits = [3 * degraded((types[instances] == k).astype(np.float32)) for k in range(layout.n_types)]
    weights = np.exp(np.stack(logits))
    maps[layout.tp] = np.round(255 * weights / weights.sum(axis=0)) * near
    maps[layout.hematoxylin :] = rng.integers(0, 256, (2, side, side)) * near
    return maps, layout
