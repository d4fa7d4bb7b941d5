"""Read PanNuke as published: three folds of 256 × 256 px patches at 40×, with three arrays per fold.

The files of fold 1 are `Fold 1/images/fold1/images.npy` (n, y, x, 3) RGB, `Fold 1/images/fold1/types.npy` (n,) names of
tissues, and `Fold 1/masks/fold1/masks.npy` (n, y, x, 6) with instance ids in one channel per class; the last channel is
the background. Files have up to 8 GB of float64 values, so they are memory-mapped and read one patch at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.errors import InputError
from hover_batch.taxonomy import Taxonomy
from kd.data.classes import CODES, class_ids
from kd.data.layouts.pictures import check_instance_ids
from kd.data.samples import Sample

CHANNELS = len(CODES["pannuke"]) + 1
"""Number of channels of a mask: one per class, and the background."""


class PanNuke:
    """Patches of the folds "1", "2" and "3" of PanNuke in `folder`, which may also be a single fold; `len` counts them.

    Raises InputError if a file of a fold is missing or unreadable, if a fold occurs twice, or if the shapes of the
    files of a fold do not match.
    """

    classes = "pannuke"
    notes = ()

    def __init__(self, folder: Path) -> None:
        self._folds = [_Fold(fold, root) for fold, root in _folds(folder).items()]

    @staticmethod
    def recognises(folder: Path) -> bool:
        """True if `folder` contains a fold of this layout, or is one. Raises InputError if a fold occurs twice."""
        return bool(_folds(folder))

    def __len__(self) -> int:
        return sum(map(len, self._folds))

    def samples(self, taxonomy: Taxonomy) -> Iterator[Sample]:
        """Yield the patches, fold by fold, with types mapped to `taxonomy`, one of TAXONOMIES.

        Raises InputError if a file can no longer be read, a patch has a value that is not a whole number in its range,
        or its masks are not instance ids (see `check_instance_ids`).
        """
        for fold in self._folds:
            for i in range(len(fold)):
                yield fold.read(i, taxonomy)


def _folds(folder: Path) -> dict[str, Path]:
    """Return by fold number the folder with `images` and `masks`, at most three levels deep.

    InputError if a fold occurs twice, or has a name that would not be read.
    """
    found: dict[str, Path] = {}
    for depth in ("", "*/", "*/*/"):
        for path in sorted(folder.glob(f"{depth}*/[Ff]old*")):
            if path.parent.name in ("images", "masks") and path.is_dir():
                if not re.fullmatch("fold[0-9]", path.name):
                    raise InputError(f"{path}: is not a fold, which are fold0 to fold9; rename or move the folder")
                fold, root = path.name.removeprefix("fold"), path.parent.parent
                if found.setdefault(fold, root) != root:
                    raise InputError(f"{folder}: fold {fold} occurs twice, in {found[fold]} and in {root}; keep one")
    return dict(sorted(found.items()))


class _Fold:
    """Patches of one fold.

    Files are memory-mapped again for each patch, because pages stay in memory as long as their mapping.
    """

    def __init__(self, fold: str, root: Path) -> None:
        self.fold = fold
        images, masks = root / "images" / f"fold{fold}", root / "masks" / f"fold{fold}"
        self.images_file, self.masks_file = images / "images.npy", masks / "masks.npy"
        shape, masks_shape = _map(self.images_file, 3).shape, _map(self.masks_file, CHANNELS).shape
        self.tissues = _load(images / "types.npy")
        for name, n in (("masks.npy", masks_shape[0]), ("types.npy", len(self.tissues))):
            if n != shape[0]:
                raise InputError(
                    f"{root}: {name} has {n} entries, but images.npy {shape[0]}; they are from different "
                    "folds, or a download is incomplete; download them again"
                )
        if shape[1:3] != masks_shape[1:3]:
            raise InputError(f"{root}: images are {shape[1:3]}, but masks {masks_shape[1:3]}; download them again")

    def __len__(self) -> int:
        return len(self.tissues)

    def read(self, i: int, taxonomy: Taxonomy) -> Sample:
        """Return patch `i`, with types mapped to `taxonomy`. Raises InputError if a value is invalid."""
        image = _whole(_map(self.images_file, 3)[i], f"{self.images_file}: image {i}", 255)
        mask = _whole(_map(self.masks_file, CHANNELS)[i], f"{self.masks_file}: mask {i}", np.iinfo(np.int32).max)
        instances, codes = merge_channels(mask)
        check_instance_ids(instances, f"{self.masks_file}: mask {i}")
        return Sample(
            id=f"pannuke_{self.fold}_{i:04d}",
            source="pannuke",
            group="",
            image=image.astype(np.uint8),
            instances=instances,
            types=class_ids(codes, "pannuke", taxonomy, str(self.masks_file)),
            tissue=str(self.tissues[i]),
            fold=self.fold,
        )


def merge_channels(mask: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Return the instances (y, x) int32 and class codes (y, x) uint8 of a PanNuke mask.

    Instances are numbered from 1 on. The same id in two channels denotes two nuclei. Where two channels overlap, pixels
    belong to the later one, as in the authors' metrics (Gamper et al. 2020). The class code is the number of the
    channel, from 1 on.

    `mask`: (y, x, 6) int32 instance ids in one channel per class, and the background in the last channel, which is
    ignored.
    """
    instances = np.zeros(mask.shape[:2], np.int32)
    codes = np.zeros(mask.shape[:2], np.uint8)
    nuclei = 0
    for channel in range(CHANNELS - 1):
        inside = mask[..., channel] > 0
        ids, rank = np.unique(mask[..., channel][inside], return_inverse=True)
        instances[inside] = nuclei + 1 + rank
        codes[inside] = channel + 1
        nuclei += len(ids)
    return instances, codes


def _map(path: Path, channels: int) -> NDArray[Any]:
    array = _load(path)
    if array.ndim != 4 or array.shape[3] != channels or array.dtype.kind not in "uif":
        raise InputError(f"{path}: {array.dtype} of shape {array.shape}, but should be numbers (n, y, x, {channels})")
    return array


def _load(path: Path) -> NDArray[Any]:
    if not path.is_file():
        raise InputError(
            f"{path} is missing; a PanNuke fold has images.npy and types.npy in images, masks.npy in masks"
        )
    try:
        return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a .npy array; download it again ({error})") from error


def _whole(values: NDArray[Any], where: str, highest: int) -> NDArray[np.int32]:
    """Return the values of a file, stored as float64, as int32.

    Raises InputError, naming `where`, if one is not a whole number from 0 to `highest`.
    """
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int64)
    if not np.array_equal(whole, values) or whole.min(initial=0) < 0 or whole.max(initial=0) > highest:
        raise InputError(f"{where} holds values other than whole numbers from 0 to {highest}; download it again")
    return whole.astype(np.int32)
