"""Read GeoJSON: its features, and their polygons as valid shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import shapely.geometry
from numpy.typing import NDArray

from hover_batch.files import load_json

_MAX_COORDINATE = 1e9
"""Largest position in pixels that a slide may have."""


def read_features(path: Path) -> list[dict[str, Any]]:
    """Return the features of the GeoJSON file `path`, dictionaries with `geometry` and `properties`.

    The file may be gzipped, zipped or plain. It holds a FeatureCollection, Feature or geometry, or a list of these,
    which QuPath's scripts write. A bare geometry becomes a feature without properties. Geometries are not checked (see
    `polygons_of`).

    ValueError with a one-line reason if the file is not GeoJSON, OSError if it cannot be read.
    """
    with _reasons():
        return list(_features(load_json(path)))


def polygons_of(geometries: Sequence[Any]) -> NDArray[np.object_]:
    """Return the areas of n geometries as an object array (n,) of valid shapely polygons or multipolygons.

    Coordinates are not changed. Points, lines and null have no area, so they give an empty polygon. An area that two
    loops of an outline cover counts as covered, not as a hole.

    `geometries`: n parsed GeoJSON geometries.

    ValueError with a one-line reason if a geometry is invalid, or a coordinate is not finite or not between -1e9 and
    1e9.
    """
    with _reasons():
        parts = [list(_polygons(geometry)) for geometry in geometries]
        with np.errstate(invalid="ignore"):  # shapely warns of NaN, which is refused below
            shapes = np.array([shapely.geometry.shape(part) for listed in parts for part in listed], np.object_)
        positions = shapely.get_coordinates(shapes)
        if far := [f"{value:g}" for value in positions[~(abs(positions) < _MAX_COORDINATE)]]:
            raise ValueError(f"a coordinate of {far[0]}")
        # The default method would take areas that two polygons or loops of one outline cover for holes.
        valid = shapely.make_valid(shapes, method="structure", keep_collapsed=False)
        areas = np.full(len(parts), shapely.MultiPolygon(), np.object_)
        start = 0
        for i, listed in enumerate(parts):
            if listed:
                areas[i] = valid[start] if len(listed) == 1 else shapely.union_all(valid[start : start + len(listed)])
            start += len(listed)
        return areas


def _features(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, list):
        for item in data:
            yield from _features(item)
    elif not isinstance(data, dict) or "type" not in data:
        raise ValueError(f"{data!r:.60} is no object with a type")
    elif data["type"] == "FeatureCollection":
        if not isinstance(data.get("features"), list):
            raise ValueError("a FeatureCollection without a list of features")
        yield from _features(data["features"])
    elif data["type"] == "Feature":
        yield data | {"geometry": data["geometry"], "properties": data.get("properties") or {}}
    else:
        yield {"geometry": data, "properties": {}}


def _polygons(geometry: Any) -> Iterator[dict[str, Any]]:
    """Yield the polygons and multipolygons in a geometry or GeometryCollection."""
    if geometry is None:
        return
    kind = geometry["type"]
    if kind == "GeometryCollection":
        for part in list(geometry["geometries"]):
            yield from _polygons(part)
    elif kind in ("Polygon", "MultiPolygon"):
        yield geometry
    elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        raise ValueError(f"type {kind} is not known")


@contextmanager
def _reasons() -> Iterator[None]:
    """Convert the exceptions of json and shapely, which are of many kinds for broken files, to ValueError."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
        RecursionError,
        shapely.errors.ShapelyError,
    ) as error:
        lacking = "lacks " if isinstance(error, KeyError) else ""
        raise ValueError(lacking + " ".join(str(error).split())) from error
