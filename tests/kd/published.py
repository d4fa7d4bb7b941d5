"""Data sets in their published layouts, made from real tiles, or from discs if there are none."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.io import savemat

NUCLEI = Path(__file__).resolve().parents[3] / "shared" / "data" / "nuclei"
Tile = tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint8]]
"""RGB (y, x, 3), instance ids (y, x), CoNSeP's class codes (y, x)."""

CHANNEL = {4: 0, 2: 1, 5: 2, 6: 2, 7: 2, 1: 3, 3: 4}
"""CoNSeP's code → PanNuke's channel. `other` stands in for dead, of which the tiles have none."""


def tiles(n: int, side: int) -> list[Tile]:
    """n tiles of `side` pixels, all different."""
    if not NUCLEI.is_dir():
        return [_discs(seed, side) for seed in range(n)]
    with (NUCLEI / "dataset.csv").open(newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["source"] == "consep"]
    found: list[Tile] = []
    for row in rows:
        image = cv2.imread(str(NUCLEI / row["image"]))[..., ::-1]
        instances, types = (cv2.imread(str(NUCLEI / row[k]), cv2.IMREAD_UNCHANGED) for k in ("labels", "types"))
        for y in range(0, 1001 - side, max(side, 250)):
            part = slice(y, y + side), slice(y, y + side)
            found.append((image[part], instances[part], types[part]))
        if len(found) >= n:
            break
    return found[:n]


def _discs(seed: int, side: int) -> Tile:
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), (230, 180, 200), np.uint8)
    instances, types = np.zeros((side, side), np.uint16), np.zeros((side, side), np.uint8)
    for n in range(1, 2 + side * side // 500):
        centre, code = tuple(int(c) for c in rng.integers(0, side, 2)), int(rng.integers(1, 8))
        for array, value in ((image, (80, 30, 90 + 10 * code)), (instances, n), (types, code)):
            cv2.circle(array, centre, 7, value, -1)
    return image, instances, types


def write_pannuke(folder: Path, folds: Mapping[str, Sequence[Tile]], name: str = "Fold *") -> Path:
    """As float64, ids counted anew in every channel."""
    for fold, listed in folds.items():
        images, masks = (
            folder / name.replace("*", fold) / f"images/fold{fold}",
            folder / name.replace("*", fold) / f"masks/fold{fold}",
        )
        for path in (images, masks):
            path.mkdir(parents=True)
        np.save(images / "images.npy", np.stack([image for image, _, _ in listed]).astype(np.float64))
        np.save(images / "types.npy", np.array(["Breast", "Bile-duct"] * len(listed))[: len(listed)])
        np.save(masks / "masks.npy", np.stack([pannuke_mask(i, t) for _, i, t in listed]).astype(np.float64))
    return folder


def pannuke_mask(instances: NDArray[np.integer], types: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(y, x, 6): the last channel is 1 on the background."""
    mask = np.zeros((*instances.shape, 6), np.int32)
    for code, channel in CHANNEL.items():
        for instance in np.unique(instances[types == code]):
            mask[..., channel][(instances == instance) & (types == code)] = mask[..., channel].max() + 1
    mask[..., 5] = instances == 0
    return mask


def write_consep(folder: Path, train: Sequence[Tile], test: Sequence[Tile]) -> Path:
    for part, listed in (("Train", train), ("Test", test)):
        for kind in ("Images", "Labels"):
            (folder / part / kind).mkdir(parents=True)
        for n, (image, instances, types) in enumerate(listed, start=1):
            name = f"{part.lower()}_{n}"
            cv2.imwrite(str(folder / part / "Images" / f"{name}.png"), image[..., ::-1])
            ids = np.unique(instances[instances > 0])
            centres = [np.argwhere(instances == i).mean(axis=0)[::-1] for i in ids]
            content = {
                "inst_map": instances.astype(np.float64),
                "type_map": types.astype(np.float64),
                "inst_type": np.array([types[instances == i].max() for i in ids], np.float64).reshape(-1, 1),
                "inst_centroid": np.array(centres).reshape(-1, 2),
            }
            savemat(folder / part / "Labels" / f"{name}.mat", content)
    return folder


def write_folder(folder: Path, images: Mapping[str, Tile], source: str = "consep", fold: str = "train") -> Path:
    """An instance folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (image, instances, types) in images.items():
        for kind, array in (("image", image[..., ::-1]), ("labels", instances), ("types", types)):
            cv2.imwrite(str(folder / f"{name}_{kind}.png"), array)
        rows.append((name, *(f"{name}_{kind}.png" for kind in ("image", "labels", "types")), source, fold))
    with (folder / "dataset.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("sample_id", "image", "labels", "types", "source", "split"), *rows])
    return folder
