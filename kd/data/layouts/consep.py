"""CoNSeP as its authors publish it: `Train|Test/Images/*.png` and `Train|Test/Labels/*.mat`, 1000 × 1000 px at 40×.

A .mat holds inst_map (y, x) of instance ids and type_map (y, x) of class codes, both 0 on the background; what else
is in it (inst_type, inst_centroid) follows from these. Train and Test are the folds train and test.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hover_batch.errors import InputError
from hover_batch.taxonomy import Taxonomy
from kd.data.classes import class_ids
from kd.data.layouts.pictures import read_image, refuse_semantic
from kd.data.samples import Sample, renumbered

PARTS = {"train": "Train", "test": "Test"}


class Consep:
    """The tiles in `folder`, of which the last `val` of Train, by their numbers, are the fold val.

    Raises InputError where an image has no labels, labels have no image, or `val` leaves none to train on.
    """

    classes = "consep"

    def __init__(self, folder: Path, val: int = 0) -> None:
        self._tiles: list[tuple[str, Path, Path]] = []
        for fold, part in PARTS.items():
            images = {p.stem: p for p in (folder / part / "Images").glob("*.png")}
            labels = {p.stem: p for p in (folder / part / "Labels").glob("*.mat")}
            for name in sorted(images.keys() ^ labels.keys(), key=_by_number):
                raise InputError(
                    f"{images[name]}: no labels of it in {folder / part / 'Labels'}"
                    if name in images
                    else f"{labels[name]}: no image of it in {folder / part / 'Images'}"
                )
            names = sorted(images, key=_by_number)
            if val and fold == "train" and val >= len(names):
                raise InputError(f"--val {val}: {folder / part} has {len(names)} tiles, of which some are to train on")
            kept = len(names) - val if fold == "train" else len(names)
            self._tiles += [(fold if i < kept else "val", images[n], labels[n]) for i, n in enumerate(names)]

    @staticmethod
    def recognises(folder: Path) -> bool:
        return any((folder / part / kind).is_dir() for part in PARTS.values() for kind in ("Images", "Labels"))

    def __len__(self) -> int:
        return len(self._tiles)

    def samples(self, taxonomy: Taxonomy) -> Iterator[Sample]:
        for fold, image, labels in self._tiles:
            yield _read(fold, image, labels, taxonomy)


def _by_number(name: str) -> list[tuple[int, str]]:
    """train_2 before train_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read(fold: str, picture: Path, labels: Path, taxonomy: Taxonomy) -> Sample:
    image = read_image(picture)
    instances, codes = _read_mat(labels)
    for name, array in (("inst_map", instances), ("type_map", codes)):
        if array.shape != image.shape[:2]:
            raise InputError(f"{labels}: {name} has shape {array.shape}, but its image has {image.shape[:2]}")
    refuse_semantic(instances, f"{labels}: inst_map")
    return Sample(
        id=f"consep_{picture.stem}",
        source="consep",
        group="",
        image=image,
        instances=renumbered(instances),
        types=class_ids(codes, "consep", taxonomy, str(labels)),
        tissue="Colon",
        fold=fold,
    )


def _read_mat(path: Path) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """inst_map and type_map (y, x); they are published as floats."""
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["inst_map", "type_map"])
    except Exception as error:  # whatever a damaged file makes of the parser
        raise InputError(f"{path} cannot be read as a .mat file ({error})") from error
    maps = []
    for name in ("inst_map", "type_map"):
        if name not in content:
            raise InputError(f"{path}: no {name} in it")
        values = content[name]
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "uif":
            raise InputError(f"{path}: {name} holds no numbers")
        with np.errstate(invalid="ignore"):
            whole = values.astype(np.int32)
        if not np.array_equal(whole, values) or whole.min(initial=0) < 0:
            raise InputError(f"{path}: {name} holds values that are no ids")
        maps.append(whole)
    return maps[0], maps[1]
