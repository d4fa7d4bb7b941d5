"""Read CoNSeP as published: `Train|Test/Images/*.png` and `Train|Test/Labels/*.mat`, 1000 × 1000 px at 40×.

A .mat file has inst_map (y, x) with instance ids and type_map (y, x) with class codes, both 0 on the background; its
other arrays (inst_type, inst_centroid) are redundant. Train and Test are the folds train and test.
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
from kd.data.layouts.pictures import check_instance_ids, read_image
from kd.data.samples import Sample, renumbered

PARTS = {"train": "Train", "test": "Test"}
"""Fold → its folder."""


class Consep:
    """Tiles of CoNSeP in `folder`; `len` gives their number.

    `val`: number of the last tiles of Train that are the fold val.

    Raises InputError if an image has no labels, labels have no image, or `val` is not 0 and leaves no tile to train on.
    """

    classes = "consep"
    notes = ()

    def __init__(self, folder: Path, val: int = 0) -> None:
        self._tiles: list[tuple[str, Path, Path]] = []
        for fold, part in PARTS.items():
            images = {p.stem: p for p in (folder / part / "Images").glob("*.png")}
            labels = {p.stem: p for p in (folder / part / "Labels").glob("*.mat")}
            if unpaired := images.keys() ^ labels.keys():
                name = min(unpaired, key=_by_number)
                raise InputError(
                    f"{images[name]}: no labels of this name in {folder / part / 'Labels'}; add them"
                    if name in images
                    else f"{labels[name]}: no image of this name in {folder / part / 'Images'}; add it"
                )
            names = sorted(images, key=_by_number)
            if val and fold == "train" and val >= len(names):
                raise InputError(
                    f"--val {val}: {folder / part} has {len(names)} tiles, and some must remain to train on; give fewer"
                )
            first_val = len(names) - val if fold == "train" else len(names)
            self._tiles += [
                (fold if i < first_val else "val", images[name], labels[name]) for i, name in enumerate(names)
            ]

    @staticmethod
    def recognises(folder: Path) -> bool:
        """True if `folder` has one of CoNSeP's subfolders, such as Train/Images. Its files are not checked."""
        return any((folder / part / kind).is_dir() for part in PARTS.values() for kind in ("Images", "Labels"))

    def __len__(self) -> int:
        return len(self._tiles)

    def samples(self, taxonomy: Taxonomy) -> Iterator[Sample]:
        """Yield the tiles, Train before Test, with types mapped to `taxonomy`, one of TAXONOMIES.

        Raises InputError if a tile's image or labels cannot be read or are invalid.
        """
        for fold, image, labels in self._tiles:
            yield _read(fold, image, labels, taxonomy)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sort key by which train_2 comes before train_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read(fold: str, picture: Path, labels: Path, taxonomy: Taxonomy) -> Sample:
    image = read_image(picture)
    instances, codes = _read_mat(labels)
    for name, array in (("inst_map", instances), ("type_map", codes)):
        if array.shape != image.shape[:2]:
            raise InputError(f"{labels}: {name} has shape {array.shape}, but its image has {image.shape[:2]}")
    check_instance_ids(instances, f"{labels}: inst_map")
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
    """Return inst_map and type_map (y, x) int32, which are published as floats."""
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["inst_map", "type_map"])
    except Exception as error:  # the parser raises many kinds for corrupted files
        raise InputError(f"{path} cannot be read as a .mat file ({error}); download it again") from error
    maps = []
    for name in ("inst_map", "type_map"):
        if name not in content:
            raise InputError(f"{path}: has no {name}; save instance ids as inst_map and class codes as type_map")
        values = content[name]
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "uif":
            raise InputError(f"{path}: {name} is not an array of numbers; save ids (y, x)")
        with np.errstate(invalid="ignore"):
            whole = values.astype(np.int32)
        if not np.array_equal(whole, values) or whole.min(initial=0) < 0:
            raise InputError(f"{path}: {name} holds values that are not ids; save whole numbers from 0 on")
        maps.append(whole)
    return maps[0], maps[1]
