"""Real annotated tiles and their maps."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.io import imread
from synthetic_maps import maps_of

from hover_batch.nuclei.watershed import SobelConstants

MERGED = np.array([0, 1, 2, 3, 3, 4, 4, 4], np.uint8)
"""CoNSeP's seven types to HoVerNet's four classes, by the order of `taxonomy.CONSEP`."""


@dataclass(frozen=True)
class Tile:
    """One annotated tile and its maps."""

    name: str
    instances: NDArray[np.int32]
    types: NDArray[np.uint8]
    maps: NDArray[np.uint8]


@pytest.fixture(scope="session")
def constants() -> SobelConstants:
    """The windows' median extremes on real predictions, scaled by 0.15."""
    return SobelConstants(*(0.15 * x for x in (-1.19e11, 8.87e10, -1.12e11, 8.75e10)))


def _tiles(data: Path, noise: float) -> list[Tile]:
    folder = data / "nuclei"
    tiles = []
    with (folder / "dataset.csv").open() as file:
        for row in csv.DictReader(file):
            if row["source"] == "consep" and row["split"] == "test":
                instances = imread(folder / row["labels"]).astype(np.int32)
                types = MERGED[imread(folder / row["types"])]
                maps = maps_of(instances, types, np.random.default_rng(len(tiles)), noise)
                tiles.append(Tile(row["sample_id"], instances, types, maps))
    return tiles


@pytest.fixture(scope="session")
def noisy_tiles(data: Path) -> list[Tile]:
    """CoNSeP's test tiles as a fair network would see them."""
    return _tiles(data, 0.1)


@pytest.fixture(scope="session")
def perfect_tiles(data: Path) -> list[Tile]:
    """CoNSeP's test tiles, their targets quantised and nothing else."""
    return _tiles(data, 0)
