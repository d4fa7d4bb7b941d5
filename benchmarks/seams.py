"""Count nuclei that are lost, doubled or merged at the edges of tiles: each image is predicted with two grids of tiles.

    uv run python -m benchmarks.seams model.safetensors --data ../shared/data/nuclei --fold test

The second grid is shifted by half a tile along both axes, so that the edges of one grid run through the middles of the
other's tiles. A nucleus that no edge of its own grid cuts is looked up in the other grid: it is `cut` there, or
`whole`. It is found if a nucleus there has an IoU above 0.5 with it, doubled if most of the pixels of two or more
nuclei lie in it, and merged if most of its pixels lie in a nucleus that holds most of another one, too. The row
`whole` shows how much the grids differ away from edges, because the network sees other surroundings.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hover_batch.config import InferSettings
from hover_batch.model.images import batch_of, predict_image
from hover_batch.model.package import find_package
from hover_batch.model.predict import load_predictor
from hover_batch.nuclei.components import without_debris
from hover_batch.nuclei.image import nuclei_of
from hover_batch.nuclei.systems import splitter_of
from kd.data.datasets import read_data

Instances = NDArray[np.int32]
"""Instances (y, x), 0 = background."""


def cut_by(grid: NDArray[np.int64], instances: Instances) -> NDArray[np.bool_]:
    """Return which instances lie in more than one tile: (n + 1,) bool, by id. `grid` (y, x): number of each tile."""
    low, high = np.full(instances.max() + 1, grid.max()), np.zeros(instances.max() + 1, np.int64)
    np.minimum.at(low, instances, grid)
    np.maximum.at(high, instances, grid)
    return np.asarray(low < high, np.bool_)


def looked_up(these: Instances, those: Instances) -> list[set[str]]:
    """Return, for each instance of `these` by id, what has become of it in `those`: found, doubled, merged."""
    n = those.max() + 1
    common = np.bincount(these.ravel().astype(np.int64) * n + those.ravel(), minlength=(these.max() + 1) * n)
    common = common.reshape(-1, n)[:, 1:]
    of_these, of_those = np.bincount(these.ravel())[:, None], np.bincount(those.ravel())[None, 1:]
    found = (common / (of_these + of_those - common) > 0.5).any(axis=1)
    doubled = (common > 0.5 * of_those).sum(axis=1) > 1
    inside = common > 0.5 * of_these
    merged = (inside & (inside[1:].sum(axis=0) > 1)).any(axis=1)
    names = {"found": found, "doubled": doubled, "merged": merged}
    return [{name for name, flags in names.items() if flags[i]} for i in range(len(common))]


def counted(pairs: Iterable[tuple[Instances, Instances]], side: int) -> dict[str, dict[str, int]]:
    """Return counts by place, `cut` or `whole`. `pairs`: instances by both grids. `side`: side of a tile in pixels."""
    counts = {"cut": Counter[str](), "whole": Counter[str]()}
    for pair in pairs:
        y, x = np.indices(pair[0].shape)
        grids = [np.asarray((y + s) // side * 10_000 + (x + s) // side, np.int64) for s in (0, side // 2)]
        for own, other in ((0, 1), (1, 0)):
            fates = looked_up(pair[own], pair[other])
            cut_here, cut_there = cut_by(grids[own], pair[own]), cut_by(grids[other], pair[own])
            for number in np.flatnonzero(~cut_here[1:]) + 1:
                counts["cut" if cut_there[number] else "whole"].update({"nuclei", *fates[number]})
    return {place: {n: c[n] for n in ("nuclei", "found", "doubled", "merged")} for place, c in counts.items()}


def main() -> None:
    """Print the counts as JSON."""
    parser = argparse.ArgumentParser(description="Count nuclei that the edges of tiles lose, double or merge.")
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fold", default="test")
    parser.add_argument("--source", default="consep")
    arguments = parser.parse_args()
    package = find_package(arguments.model)
    samples = read_data(arguments.data, [arguments.fold], [arguments.source]).samples
    predictor = load_predictor(package, InferSettings(threads=1, batch=batch_of(package.card)))
    splitter, half = splitter_of(package.card), package.card.tile_out // 2

    def instances(image: NDArray[np.uint8]) -> Instances:
        return nuclei_of(predict_image(predictor, image), splitter, package.card.layout)[0]

    def by_both_grids(image: NDArray[np.uint8]) -> tuple[Instances, Instances]:
        shifted = np.pad(image, ((half, 0), (half, 0), (0, 0)), mode="reflect")
        # Nuclei of the mirrored pixels are left out.
        return instances(image), without_debris(instances(shifted)[half:, half:], 1)

    rows = counted((by_both_grids(sample.image) for sample in samples), package.card.tile_out)
    print(json.dumps({"model": package.card.name, "images": len(samples), **rows}, indent=2))


if __name__ == "__main__":
    main()
