"""Find the pictures and slides of a folder that were annotated in QuPath, each with its GeoJSON file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hover_batch.cohort.record import looks_like_slide
from hover_batch.errors import InputError

SUFFIXES = (".geojson", ".geojson.gz")
"""Endings of QuPath's files, in lower case."""
OTHER_SUFFIXES = (".json", ".json.gz", ".zip")
"""Endings of files that are taken for QuPath's only if a picture has the same name."""
FOLDS = ("train", "val", "test")
"""Names of subfolders, in lower case; files beside these are of the first fold."""


@dataclass(frozen=True)
class Annotated:
    """Picture or slide with its annotations."""

    picture: Path
    """File of the picture or slide, or DICOM folder."""
    annotations: Path
    """GeoJSON file."""
    fold: str
    """One of FOLDS."""

    @property
    def name(self) -> str:
        """Name of the picture without its suffix; .ome.tif and .ome.tiff are removed as a whole."""
        return _names(self.picture)[-1]


def has_annotations(folder: Path) -> bool:
    """True if `folder`, or a subfolder train, val or test, has annotations of QuPath.

    These are .geojson and .geojson.gz files. Files with the suffixes .json, .json.gz and .zip count if a picture in the
    same folder has the same name.

    Raises InputError if a folder cannot be listed.
    """
    for _, part in _parts(folder):
        entries = _entries(part)
        names = {name for path in entries if looks_like_slide(path) for name in _names(path)}
        if any(_key(path, SUFFIXES) or _key(path, OTHER_SUFFIXES) in names for path in entries):
            return True
    return False


def find_annotated(folder: Path) -> tuple[list[Annotated], int]:
    """Return the annotated pictures, and the number of other pictures, in `folder` and its subfolders for folds.

    A GeoJSON file has the name of its picture, with or without the picture's suffix. It ends in .geojson or
    .geojson.gz. Files that end in .json, .json.gz or .zip are also read as GeoJSON files if a picture has their name;
    otherwise they are ignored.

    Raises InputError if a .geojson or .geojson.gz file belongs to no picture, a GeoJSON file belongs to several
    pictures, a picture has several GeoJSON files, another subfolder has .geojson or .geojson.gz files, or a folder
    cannot be listed.
    """
    for path in _entries(folder):
        if path.is_dir() and path.name.lower() not in FOLDS and any(_key(file, SUFFIXES) for file in _entries(path)):
            raise InputError(
                f"{path}: has annotations, but only the subfolders {', '.join(FOLDS)} are read; move its files beside "
                "or into these, or give the folder itself, too"
            )
    found: list[Annotated] = []
    others = 0
    for fold, part in _parts(folder):
        entries = _entries(part)
        pictures = [path for path in entries if looks_like_slide(path)]
        pairs: dict[Path, Path] = {}
        for path in entries:
            name = _key(path, SUFFIXES) or _key(path, OTHER_SUFFIXES)
            fitting = [picture for picture in pictures if name in _names(picture)]
            if not fitting and _key(path, SUFFIXES):
                raise InputError(f"{path}: no picture or slide of this name beside it; give both the same name")
            if len(fitting) > 1:
                listed = ", ".join(picture.name for picture in fitting)
                raise InputError(f"{path}: {listed} have this name; keep the one that was annotated")
            if fitting and (first := pairs.setdefault(fitting[0], path)) != path:
                raise InputError(f"{fitting[0]}: has two annotations, {first.name} and {path.name}; keep one")
        found += [Annotated(picture, annotations, fold) for picture, annotations in pairs.items()]
        others += len(pictures) - len(pairs)
    return found, others


def _parts(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield fold and path of the folder itself, and of its subfolders for folds."""
    yield FOLDS[0], folder
    for path in _entries(folder):
        if path.name.lower() in FOLDS and path.is_dir():
            yield path.name.lower(), path


def _entries(folder: Path) -> list[Path]:
    """Return the files and folders in a folder, sorted, without hidden ones."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; make it readable") from error


def _key(path: Path, suffixes: tuple[str, ...]) -> str | None:
    """Return the name without the one of these suffixes with which it ends, in any case; None if it has none."""
    lowered = path.name.lower()
    return next((path.name[: -len(s)] for s in suffixes if lowered.endswith(s) and len(lowered) > len(s)), None)


def _names(picture: Path) -> list[str]:
    """Return the names that the annotations of a picture may have: its own, and without its suffix (or .ome.tif)."""
    stem = picture.stem
    return [picture.name, stem, *([stem[:-4]] if stem.lower().endswith(".ome") else [])]
