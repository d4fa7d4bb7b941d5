"""Read tissue masks that the cohort gives, GeoJSON polygons or PNG pictures, and fit them to a slide's canvas.

Positions of polygons are relative to the corner of the slide's bounds, as in QuPath. A PNG covers the bounds or the
whole canvas, as its aspect ratio shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import PngImagePlugin

from hover_batch.errors import InputError
from hover_batch.formatting import counted
from hover_batch.geojson import polygons_of, read_features
from hover_batch.geometry import Box, Size, qupath_origin
from hover_batch.slide.formats import MAX_PICTURE_PIXELS, bands, exif_orientation, is_16_bit

MAX_MASK_SIDE = 8192
"""Maximum length in pixels of the sides of a mask: 67 MB, and 3 µm a pixel on a slide 25 mm wide."""

_MAX_OUTSIDE = 0.01
"""Fraction of a mask's area that may lie outside of the slide, since outlines drawn by hand may cross the edge."""
_ALL = 0.999
"""Fraction of the slide from which a mask is said to cover all of it."""
_MIN_EXTENT = 0.001
"""Fraction of the slide's longer side below which polygons are probably in other units."""
_REGION = "Region*"
"""QuPath's class for regions such as tissue: the only one whose name ends with * that is not ignored here."""


def given_mask(path: Path, level0: Size, bounds: Box | None, scale: float) -> NDArray[np.bool_]:
    """Return a tissue mask of the cohort as bool (y, x), True on tissue, that spans the slide's whole canvas.

    In GeoJSON, the polygons are tissue, except those of classes that QuPath ignores (names that end with *, other than
    Region*). Positions are in level-0 pixels from the corner of `bounds`. In a PNG, pixels that are neither black nor
    fully transparent are tissue. It covers `bounds` or the whole canvas, as its aspect ratio shows.

    `path`: file of the mask; if its name ends with .png, it is read as a PNG, otherwise as GeoJSON. `level0`: size of
    the canvas in level-0 pixels. `bounds`: the slide's non-empty region in level-0 pixels; None if it has none.
    `scale`: level-0 pixels per pixel of the result, for polygons only. A PNG keeps its own resolution, but is reduced
    to at most MAX_MASK_SIDE pixels a side.

    InputError if the mask cannot be read or has no tissue on the slide, or if a PNG has an orientation tag that turns
    it, an ambiguous palette, or more than MAX_PICTURE_PIXELS pixels. For a slide with bounds, also InputError if more
    than 1 % of the polygons' area lies outside of them, or a PNG has the aspect ratio of neither the bounds nor the
    canvas, or of both but the size of neither. Without bounds, a PNG of another aspect ratio is stretched.
    """
    if _is_png(path):
        picture = _read_png(path)
        array = _over_canvas(picture, _frame(path, picture, level0, bounds), level0)
    else:
        tissue, _ = _read_geojson(path)
        outline, _ = _on_canvas(path, tissue, level0, bounds)
        array = _rasterise(outline, level0, scale)
    if not array.any():
        raise _no_tissue(path, level0)
    return array


def check_mask(path: Path, level0: Size | None = None, bounds: Box | None = None) -> list[str]:
    """Return warnings about a tissue mask of the cohort, as sentences for the user; an empty list if there are none.

    There is a warning if the mask covers the whole slide, lies outside of it by more than 1 %, holds detections, or
    polygons of classes that QuPath ignores, is so small that its unit is probably wrong, or is a PNG of another aspect
    ratio than the slide.

    `path`: file of the mask, GeoJSON or PNG. `level0`: size of the slide's canvas in level-0 pixels; None to check only
    that the mask can be read. `bounds`: the slide's non-empty region in level-0 pixels; None if it has none.

    InputError if the mask cannot be read or, given `level0`, does not fit the slide or lies outside of it (see
    `given_mask`).
    """
    return _check_png(path, level0, bounds) if _is_png(path) else _check_geojson(path, level0, bounds)


def _check_geojson(path: Path, level0: Size | None, bounds: Box | None) -> list[str]:
    outline, warnings = _read_geojson(path)
    if level0 is None:
        return warnings
    moved, fraction_inside = _on_canvas(path, outline, level0, bounds)
    frame = bounds or level0.box
    area_inside = fraction_inside * shapely.area(moved)
    warnings += _warnings_of_cover(path, area_inside / (frame.width * frame.height))
    x0, y0, x1, y1 = shapely.bounds(outline)
    if max(x1 - x0, y1 - y0) < _MIN_EXTENT * max(frame.width, frame.height):
        warnings.append(
            f"{path}: the polygons measure only {x1 - x0:.3g} × {y1 - y0:.3g} pixels; positions must be in level-0 "
            "pixels, not in mm or fractions"
        )
    if fraction_inside < 1 - _MAX_OUTSIDE:
        warnings.append(
            f"{path}: {1 - fraction_inside:.0%} of the mask lies outside of the slide of {level0.width} × "
            f"{level0.height} pixels, and is ignored; check that it was drawn on this slide, in level-0 pixels"
        )
    return warnings


def _check_png(path: Path, level0: Size | None, bounds: Box | None) -> list[str]:
    picture = _read_png(path)
    warnings = _warnings_of_cover(path, float(picture.mean()))
    if level0 is None:
        return warnings
    frame = _frame(path, picture, level0, bounds)
    if not picture.any():
        raise _no_tissue(path, level0)
    if not _has_aspect(picture, frame):
        warnings.append(
            f"{path}: a mask of {picture.shape[1]} × {picture.shape[0]} pixels is stretched over a slide of "
            f"{frame.width} × {frame.height}, which has another aspect ratio"
        )
    return warnings


def _warnings_of_cover(path: Path, covered: float) -> list[str]:
    """Return a warning if the mask covers the whole slide. `covered`: fraction that it covers."""
    if covered < _ALL:
        return []
    return [f"{path}: the mask covers the whole slide, background included; a PNG must be 0 on background"]


def _is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png"


def _no_tissue(path: Path, level0: Size) -> InputError:
    return InputError(
        f"{path}: the mask has no tissue on the slide of {level0.width} × {level0.height} pixels; "
        "polygons are in level-0 pixels, a PNG is nonzero on tissue"
    )


def _on_canvas(
    path: Path, outline: shapely.Geometry, level0: Size, bounds: Box | None
) -> tuple[shapely.Geometry, float]:
    """Move polygons from the corner of the bounds to the canvas. Also return the fraction that lies on the slide.

    InputError if none of them does, or too little lies in the bounds.
    """
    origin = qupath_origin(bounds)
    moved = shapely.transform(outline, lambda points: points + origin)
    frame = bounds or level0.box
    kept = shapely.intersection(moved, shapely.box(frame.x0, frame.y0, frame.x1, frame.y1))
    inside = float(shapely.area(kept) / shapely.area(moved))
    if inside == 0 and bounds is None:
        raise _no_tissue(path, level0)
    if bounds is not None and inside < 1 - _MAX_OUTSIDE:
        raise InputError(
            f"{path}: {1 - inside:.0%} of the mask lies outside of the slide's scanned part of {bounds.width} × "
            f"{bounds.height} pixels; give positions in level-0 pixels from the corner of that part, as QuPath does: "
            f"subtract {origin[0]}, {origin[1]} if they count from the corner of the whole canvas"
        )
    return moved, inside


def _frame(path: Path, picture: NDArray[np.bool_], level0: Size, bounds: Box | None) -> Box:
    """Return the part of the canvas that a PNG covers, in level-0 pixels."""
    if bounds is None:
        return level0.box
    height, width = picture.shape
    frames = [frame for frame in (bounds, level0.box) if _has_aspect(picture, frame)]
    same_size = [frame for frame in frames if (frame.width, frame.height) == (width, height)]
    if len(same_size or frames) == 1 or bounds == level0.box and frames:
        return (same_size or frames)[0]
    scanned = f"the slide's scanned part ({bounds.width} × {bounds.height})"
    canvas = f"its canvas ({level0.width} × {level0.height})"
    fault = f"fits both {scanned} and {canvas}" if frames else f"fits neither {scanned} nor {canvas}"
    raise InputError(f"{path}: a mask of {width} × {height} pixels {fault}; export it again, or give GeoJSON")


def _has_aspect(picture: NDArray[np.bool_], frame: Box) -> bool:
    """Whether the picture has the frame's aspect ratio, up to the rounding of its sides to whole pixels."""
    height, width = picture.shape
    return bool(abs(width * frame.height - height * frame.width) <= frame.width + frame.height)


def _over_canvas(picture: NDArray[np.bool_], frame: Box, level0: Size) -> NDArray[np.bool_]:
    """Lay a picture of `frame` over the canvas: each mask pixel takes the picture's pixel at its centre."""
    if frame == level0.box:
        return picture
    scale = max(frame.width / picture.shape[1], max(level0.width, level0.height) / MAX_MASK_SIDE)
    columns = _sources(level0.width, scale, frame.x0, frame.width, picture.shape[1])
    rows = _sources(level0.height, scale, frame.y0, frame.height, picture.shape[0])
    padded = np.pad(picture, 1)
    array: NDArray[np.bool_] = padded[np.ix_(rows + 1, columns + 1)]
    return array


def _sources(extent: int, scale: float, start: int, covered: int, count: int) -> NDArray[np.int64]:
    """Return, for each mask pixel along one axis, the index of the picture's pixel there; −1 and `count` outside."""
    pixels = max(1, round(extent / scale))
    centres = (np.arange(pixels) + 0.5) * (extent / pixels) - start
    found: NDArray[np.int64] = np.clip(np.floor(centres * (count / covered)), -1, count).astype(np.int64)
    return found


def _rasterise(outline: shapely.Geometry, level0: Size, scale: float) -> NDArray[np.bool_]:
    width, height = max(1, round(level0.width / scale)), max(1, round(level0.height / scale))
    array = np.zeros((height, width), np.uint8)
    # fillPoly takes whole numbers: level-0 positions with `bits` fractional ones, pixel centres at .0.
    bits = 6
    to_mask = np.array([width / level0.width, height / level0.height])
    on_slide = shapely.intersection(outline, shapely.box(0, 0, level0.width, level0.height))
    rings = [
        np.rint((shapely.get_coordinates(ring) * to_mask - 0.5) * (1 << bits)).astype(np.int32)
        for polygon in shapely.get_parts(on_slide)
        if isinstance(polygon, shapely.Polygon) and not polygon.is_empty
        for ring in (polygon.exterior, *polygon.interiors)
    ]
    if rings:
        # All rings at once: a ring inside a ring is a hole, one inside that an island.
        cv2.fillPoly(array, rings, (1,), shift=bits)
    return array.astype(bool)


def _read_geojson(path: Path) -> tuple[shapely.Geometry, list[str]]:
    """Return the union of all polygons of the file, in its own coordinates, and warnings for the user.

    Polygons of a class that QuPath ignores are subtracted from it, and those of detections, such as nuclei, are left
    out, both with a warning.
    """
    remedy = "give polygons as GeoJSON in level-0 pixels, or a PNG"
    try:
        features = read_features(path)
        areas = polygons_of([feature["geometry"] for feature in features])
    except OSError as error:
        raise InputError(f"{path}: the mask cannot be read: {error.strerror}; check mask_path") from error
    except ValueError as error:
        raise InputError(f"{path}: the mask is not valid GeoJSON ({error}); {remedy}") from error
    classes = np.array([_class_of(feature["properties"]) for feature in features], np.object_)
    detected = np.array([_is_detection(feature) for feature in features], bool) & ~shapely.is_empty(areas)
    ignored = np.array([name.endswith("*") and name != _REGION for name in classes], bool) & ~shapely.is_empty(areas)
    ignored &= ~detected
    outline = shapely.difference(shapely.union_all(areas[~ignored & ~detected]), shapely.union_all(areas[ignored]))
    names, warnings = ", ".join(sorted(set(classes[ignored]))), []
    if names:
        warnings.append(
            f"{path}: {counted(int(ignored.sum()), 'polygon')} of the class {names} left out of the tissue, since "
            "QuPath ignores classes whose names end with *; rename the class if this is tissue"
        )
    if detected.any():
        warnings.append(
            f"{path}: {counted(int(detected.sum()), 'detection')} of QuPath, such as nuclei, left out of the tissue; "
            "export the annotations alone"
        )
    if outline.is_empty:
        others = [f"those of {names}, which QuPath ignores"] if names else []
        others += ["detections, such as nuclei"] if detected.any() else []
        besides = f" besides {' and '.join(others)}" if others else ""
        raise InputError(f"{path}: the mask holds no polygon{besides}; {remedy}")
    return outline, warnings


def _is_detection(feature: Mapping[str, Any]) -> bool:
    """Return whether a feature is a detection of QuPath; older versions wrote the kind of object as the id."""
    properties = feature["properties"]
    kind = properties.get("objectType") if isinstance(properties, dict) else None
    return (kind or feature.get("id")) in ("detection", "cell", "PathDetectionObject", "PathCellObject")


def _class_of(properties: Any) -> str:
    """Return the name of a feature's class in QuPath, the last of the `names` of a derived class; "" without one.

    A class may also be a plain text.
    """
    classification = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(classification, str):
        return classification
    if not isinstance(classification, dict):
        return ""
    names = classification.get("names")
    return str(names[-1] if isinstance(names, list) and names else classification.get("name", ""))


def _read_png(path: Path) -> NDArray[np.bool_]:
    """Return the nonzero pixels as bool (y, x), reduced to MAX_MASK_SIDE."""
    try:
        with PngImagePlugin.PngImageFile(path) as picture:
            if picture.width * picture.height > MAX_PICTURE_PIXELS:
                raise InputError(f"{path}: a mask of {picture.width} × {picture.height} pixels; reduce it")
            if (turn := exif_orientation(picture)) != 1:
                raise InputError(
                    f"{path}: the tag Orientation is {turn}, so that programs turn or flip the mask; save it as it "
                    "lies on the slide, without this tag"
                )
            if is_16_bit(picture) and (picture.mode != "I;16" or "transparency" in picture.info):
                raise InputError(
                    f"{path}: a mask in colour or with transparency and 16 bits per channel, whose low bytes would be "
                    "lost; save it as a grey PNG"
                )
            is_palette = picture.mode == "P"
            has_key = "transparency" in picture.info  # a transparent colour, or, in a palette, the alpha of each one
            has_alpha = picture.mode in ("LA", "RGBA") or is_palette or has_key
            mask = np.empty((picture.height, picture.width), bool)
            for rows, values in bands(picture, "RGBA" if is_palette or has_key else None):
                colours = values if values.ndim == 2 else values[..., : values.shape[2] - has_alpha].any(axis=2)
                mask[rows] = (colours != 0) & (values[..., -1] != 0) if has_alpha else colours != 0
            if is_palette and any((mask[rows] != (indices != 0)).any() for rows, indices in bands(picture)):
                raise InputError(
                    f"{path}: a palette picture in which the colour of number 0 is not black, or another one is: what "
                    "is tissue is ambiguous; save it as a grey PNG, nonzero on tissue"
                )
    except OSError as error:
        raise InputError(f"{path}: the mask cannot be read: {error.strerror or error}; check mask_path") from error
    except (SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for a file of another format
        raise InputError(f"{path}: the mask is not a valid PNG ({error}); give a PNG, nonzero on tissue") from error
    if max(mask.shape) > MAX_MASK_SIDE:
        shrink = MAX_MASK_SIDE / max(mask.shape)
        size = max(1, round(mask.shape[1] * shrink)), max(1, round(mask.shape[0] * shrink))
        mask = np.asarray(cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_AREA) >= 128, bool)
    return mask
