"""Read the objects of a QuPath GeoJSON file: outlined nuclei with their classes, and regions.

The members of a feature are those that QuPath 0.2 to 0.6 writes: the type of an object is `properties.objectType`, or
`id` (0.2); a cell's nucleus is `nucleusGeometry`; a class is `properties.classification`, with `name`, or with `names`
if it is derived (Tumor: Positive); objects inside an object may be in `properties.childObjects`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.errors import InputError
from hover_batch.geojson import polygons_of, read_features
from hover_batch.taxonomy import NUCLEI

REGION, IGNORE, NONE = "region", "ignore", "none"
"""Meanings of a class other than a class of nuclei: a region in which every nucleus is outlined; objects to skip;
nuclei without a class."""
_MEANINGS = {
    "region*": REGION,
    "region": REGION,
    "training": REGION,
    "ignore*": IGNORE,
    **{c.name: NONE for c in NUCLEI.nuclei},
}
"""Class in lower case → its meaning, unless the user gives another. Region* and Ignore* are in QuPath's own list;
models without types call every object a nucleus."""
_CELLS = ("cell", "pathcellobject")
_NOT_NUCLEI = ("tile", "pathtileobject", "tmacore", "tmacoreobject", "root", "pathrootobject")
"""Types of objects that outline something else, in lower case."""


@dataclass(frozen=True)
class Objects:
    """Objects of one file. Positions are pixels of the full resolution, from QuPath's origin."""

    regions: NDArray[np.object_]
    """Polygons (n,) in which every nucleus is outlined."""
    nuclei: NDArray[np.object_]
    """Polygons or multipolygons (n,) of nuclei, valid and not empty."""
    names: list[str]
    """Class of each nucleus as in the file, such as `Tumor: Positive`; empty without a class."""
    skipped: Counter[str]
    """Number of skipped objects, by their description."""


def read_objects(path: Path, class_map: Mapping[str, str]) -> Objects:
    """Read the objects in a GeoJSON file of QuPath, also those inside other objects.

    A locked annotation without a class counts as a region. Of a cell, the outline of its nucleus is read.

    `path`: file, gzipped, zipped or plain. `class_map`: meaning of each class (see `meaning`), by its name in lower
    case.

    Raises InputError if the file cannot be read, is not GeoJSON, has no objects, or has a cell without a nucleus.
    """
    try:
        features = list(_with_children(read_features(path)))
        kinds = [_kind(feature) for feature in features]
        outlined = [
            feature.get("nucleusGeometry" if kind in _CELLS else "geometry")
            for feature, kind in zip(features, kinds, strict=True)
        ]
        if without := sum(kind in _CELLS and outline is None for kind, outline in zip(kinds, outlined, strict=True)):
            raise InputError(f"{path}: {without} cells have no outline of their nucleus; delete them, or draw it")
        polygons = polygons_of(outlined)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; make the file readable") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid GeoJSON ({error}); export the objects from QuPath again") from error
    if not features:
        raise InputError(
            f"{path}: holds no objects; export all objects from QuPath, or draw a Region* in it if it has no nuclei"
        )
    skipped: Counter[str] = Counter()
    regions, nuclei, names = [], [], []
    for feature, kind, polygon in zip(features, kinds, polygons, strict=True):
        name = _class_name(feature)
        locked = name == "" and _properties(feature).get("isLocked") is True and "annotation" in kind
        role = REGION if locked else meaning(name, class_map)
        if polygon.is_empty:
            skipped["points and lines"] += 1
        elif kind in _NOT_NUCLEI:
            skipped["tiles and TMA cores"] += 1
        elif role == IGNORE:
            skipped["objects of ignored classes"] += 1
        elif role == REGION:
            regions.append(polygon)
        else:
            nuclei.append(polygon)
            names.append(name)
    return Objects(np.array(regions, np.object_), np.array(nuclei, np.object_), names, skipped)


def meaning(name: str, class_map: Mapping[str, str], classes: Iterable[str] = ()) -> str | None:
    """Return the meaning of a class: REGION, IGNORE, NONE, a name in `classes` or a value of `class_map`.

    None if the meaning is not known. An empty name means NONE. The case of `name` is ignored. If a derived class
    (`Tumor: Positive`) is not known, its first part is looked up.

    `name`: class in QuPath. `class_map`: meanings by class in lower case; they take precedence over `classes` and
    QuPath's own names. `classes`: names of a taxonomy, in lower case.
    """
    if not name:
        return NONE
    known = {c: c for c in classes} | _MEANINGS | dict(class_map)
    lowered = name.lower()
    return known.get(lowered, known.get(lowered.partition(":")[0].strip()))


def _with_children(features: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for feature in features:
        if not isinstance(feature, dict):
            raise ValueError(f"an object is {feature!r:.40}")
        yield feature
        children = _properties(feature).get("childObjects")
        yield from _with_children(children if isinstance(children, list) else [])


def _properties(feature: dict[str, Any]) -> dict[str, Any]:
    properties = feature.get("properties")
    return properties if isinstance(properties, dict) else {}


def _kind(feature: dict[str, Any]) -> str:
    """Return the type of an object in lower case; QuPath takes features without one for annotations."""
    properties = _properties(feature)
    old = feature.get("id") if str(feature.get("id")).endswith("Object") else None
    return str(properties.get("objectType") or properties.get("object_type") or old or "annotation").lower()


def _class_name(feature: dict[str, Any]) -> str:
    classification = _properties(feature).get("classification")
    if isinstance(classification, dict):
        names = classification.get("names")
        classification = ": ".join(map(str, names)) if isinstance(names, list) else classification.get("name")
    return " ".join(classification.split()) if isinstance(classification, str) else ""
