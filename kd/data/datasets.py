"""Read annotated images for training and evaluation, from a cache of `kd prepare` or from an instance folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from hover_batch.errors import InputError
from hover_batch.taxonomy import CONSEP, Taxonomy
from kd.data.cache import Cache, is_cache, open_cache
from kd.data.layouts.folder import TABLE, InstanceFolder
from kd.data.samples import MPP, Data, Sample

__all__ = ["MPP", "Data", "Sample", "contents_sha256", "folds_of", "read_data", "taxonomy_of"]

MAY_BE_EMPTY = ("train", "val", "test")
"""Folds that may be requested even if the data does not contain them."""


def read_data(path: Path, folds: Iterable[str], sources: Iterable[str] | None = None) -> Data:
    """Return annotated images, fold by fold in the order of the data, all in memory.

    The types of an instance folder are mapped to CoNSeP's merged classes.

    `path`: a cache (.zarr or .npz), or an instance folder (with dataset.csv), whose splits are the folds. `folds`:
    folds to read; train, val and test may be empty or absent. `sources`: sources to read; None for all.

    Raises InputError if a fold other than train, val and test, or a source, does not exist, or if a file is missing,
    unreadable, corrupted or inconsistent with others.
    """
    wanted_folds = list(dict.fromkeys(folds))
    wanted_sources = None if sources is None else set(sources)
    data = _open(path)
    if unknown := [fold for fold in wanted_folds if fold not in data.folds and fold not in MAY_BE_EMPTY]:
        raise InputError(f"{path} has no fold {', '.join(unknown)}; its folds are {', '.join(data.folds)}")
    if unknown := sorted((wanted_sources or set()) - set(data.sources)):
        raise InputError(f"{path} has no source {', '.join(unknown)}; its sources are {', '.join(data.sources)}")
    if isinstance(data, Cache):
        return Data(data.taxonomy, [s for fold in wanted_folds for s in data.samples(fold, wanted_sources)])
    return Data(CONSEP, [s for fold in wanted_folds for s in data.samples(CONSEP, fold, wanted_sources)])


def contents_sha256(path: Path) -> str:
    """Return the hex SHA-256 of all images, annotations and metadata of the data at `path` (as for `read_data`).

    For a cache, only the header is read, because it has a hash of each image. For a folder, all files are read. A cache
    and the folder that it was made from have different hashes.

    Raises InputError if the data cannot be read.
    """
    data = _open(path)
    described = [str(entry) for entry in data.entries] if isinstance(data, Cache) else data.fingerprints()
    return hashlib.sha256("\n".join(described).encode()).hexdigest()


def folds_of(path: Path) -> list[str]:
    """Return the names of the folds of the data at `path` (see `read_data`), in the order in which they appear.

    Raises InputError if the data cannot be read.
    """
    return _open(path).folds


def taxonomy_of(path: Path) -> Taxonomy:
    """Return the classes of the data at `path` (see `read_data`); for an instance folder, CoNSeP's merged classes.

    Raises InputError if the data cannot be read.
    """
    data = _open(path)
    return data.taxonomy if isinstance(data, Cache) else CONSEP


def _open(path: Path) -> Cache | InstanceFolder:
    if is_cache(path):
        return open_cache(path)
    if not InstanceFolder.recognises(path):
        raise InputError(
            f"{path / TABLE} is missing; give a folder with dataset.csv, images and labels, or a .zarr or .npz that "
            "`hover-batch kd prepare` has written"
        )
    return InstanceFolder(path)
