"""Read pictures and slides that were annotated in QuPath: `x.geojson` beside `x.png` or `x.svs`.

Subfolders train, val and test are the folds; files that are in none of them are of the fold train. Each region (see
`qupath_objects`) becomes one image, read at MPP. Without a region, a small picture is one image as a whole; a slide
needs regions, because nuclei that nobody outlined would be taken for background.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import InputError, SlideError
from hover_batch.formatting import listed
from hover_batch.geometry import Box, Grid, Mpp, qupath_origin
from hover_batch.slide.headers import SlideInfo, kind_of, peek, read_header
from hover_batch.slide.reader import open_slide
from hover_batch.taxonomy import Taxonomy
from kd.data.classes import TAXONOMIES
from kd.data.layouts.qupath_files import Annotated, find_annotated, has_annotations
from kd.data.layouts.qupath_objects import IGNORE, NONE, REGION, meaning, read_objects
from kd.data.rasterise import SMALLEST, rasterise
from kd.data.samples import MPP, Sample, renumbered

FIELD_SIDE = 2048
"""Largest side in pixels (0.5 mm) of a picture that is one image without a region."""
REGION_SIDES = (64, 4096)
"""Smallest and largest side in pixels of a region, 16 µm to 1 mm; images are held in memory as a whole."""
LARGEST_UM2, LONGEST_UM = 2500.0, 200.0
"""Area and extent above which an outline is no nucleus, but a region or several nuclei."""
USUAL_UM2 = (8.0, 400.0)
"""Median area of nuclei outside of which positions are probably in another unit."""
_DRAW = (
    "in QuPath, draw a rectangle round each part in which every nucleus is outlined, give it the class Region* "
    "(right-click, Set class), and export all objects again"
)


@dataclass(frozen=True)
class _Field:
    """One image, to be cut from a picture or slide."""

    id: str
    """Id of the sample."""
    box: Box
    """Its place, in pixels of the grid."""
    nuclei: NDArray[np.object_]
    """Outlines (n,) of its nuclei, in pixels of the grid."""
    names: list[str]
    """Class of each nucleus as in the file."""


@dataclass(frozen=True)
class _Picture:
    """Annotated picture or slide."""

    record: SlideRecord
    fold: str
    grid: Grid
    fields: list[_Field]


class Qupath:
    """Images that were annotated in QuPath, in `folder`; `len` gives their number.

    `class_map`: meaning of each class in QuPath, by its name in lower case. A meaning is a class of the taxonomy,
    `region`, `ignore` or `none` (see `qupath_objects.meaning`).

    Raises InputError if a file cannot be read; if the pixel size of a slide is unknown; if a GeoJSON file does not
    belong to exactly one picture, or a picture has several; if an outline lies outside of its picture or is too large
    for a nucleus; if a picture with a side above FIELD_SIDE (2048) pixels has no region; if a region is not an
    upright rectangle with sides within REGION_SIDES (64 to 4096 pixels); or if two different ones have one corner.
    """

    def __init__(self, folder: Path, class_map: Mapping[str, str]) -> None:
        self._folder, self._class_map = folder, class_map
        self._counts: Counter[str] = Counter()
        self._warnings: list[str] = []
        annotated, others = find_annotated(folder)
        self._counts["pictures have no GeoJSON file; skipped"] = others
        self._pictures = [self._open(files) for files in annotated]

    @staticmethod
    def recognises(folder: Path) -> bool:
        """True if `folder`, or a subfolder train, val or test, has annotations (see `qupath_files.has_annotations`).

        Raises InputError if a folder cannot be listed.
        """
        return has_annotations(folder)

    def __len__(self) -> int:
        return sum(len(picture.fields) for picture in self._pictures)

    @property
    def classes(self) -> str:
        """Name in `kd.data.classes.TAXONOMIES` of the taxonomy to which more of the nuclei's class names can be mapped.

        It is consep if the numbers are equal.
        """
        names = self.class_names

        def fitting(key: str) -> int:
            classes = _names_in(TAXONOMIES[key])
            return sum(meaning(name, self._class_map, classes) in classes for name in names)

        return max(TAXONOMIES, key=fitting)

    @property
    def class_names(self) -> list[str]:
        """Names of the nuclei's classes in QuPath, sorted, each once. Nuclei without a class are left out."""
        fields = chain.from_iterable(picture.fields for picture in self._pictures)
        return sorted({name for field in fields for name in field.names if name})

    @property
    def notes(self) -> list[str]:
        """Sentences for the user about what was skipped; complete once all images are read."""
        counted = [f"{self._folder}: {n:,} {what}" for what, n in self._counts.items() if n]
        return [*self._warnings, *counted]

    def samples(self, taxonomy: Taxonomy) -> Iterator[Sample]:
        """Yield the images, with types mapped to `taxonomy`, one of TAXONOMIES.

        Nuclei without a class have type 0. If no nucleus in the folder has a class of `taxonomy`, `types` is None.

        The call itself raises InputError if the meaning of a class is not known (see `qupath_objects.meaning`), or if
        the class map contains an unknown meaning. The iteration raises InputError if a picture or slide cannot be read.
        """
        classes = _names_in(taxonomy)
        if odd := sorted(set(self._class_map.values()) - {*classes, REGION, IGNORE, NONE}):
            raise InputError(
                f"--map …={odd[0]}: not a class; give one of {', '.join(classes)}, or {NONE}, {IGNORE}, {REGION}, "
                "or other --classes"
            )
        names = self.class_names
        meanings = {name: meaning(name, self._class_map, classes) for name in names}
        if unknown := [name for name, found in meanings.items() if found is None]:
            as_they_are = [name for name in names if name not in unknown]
            raise InputError(
                f"{self._folder}: {listed(unknown)}: not among the classes {', '.join(classes)}; map each with --map, "
                f"such as --map '{unknown[0]}={classes[0]}' (or ={NONE} for nuclei without a class, ={IGNORE} to skip "
                f"the objects, ={REGION} for regions)"
                + (f"; {listed(as_they_are)} are used as they are" if as_they_are else "")
            )
        id_of = {"": 0} | {
            name: classes.index(found) + 1 if found in classes else 0 for name, found in meanings.items()
        }
        return self._read(id_of)

    def _read(self, id_of: Mapping[str, int]) -> Iterator[Sample]:
        typed = any(id_of.values())
        for picture in self._pictures:
            try:
                with open_slide(picture.record) as reader:
                    for field in picture.fields:
                        image = reader.read(field.box, picture.grid)
                        yield self._sample(picture, field, image, id_of if typed else None)
            except SlideError as error:
                raise InputError(str(error)) from error

    def _sample(
        self, picture: _Picture, field: _Field, image: NDArray[np.uint8], id_of: Mapping[str, int] | None
    ) -> Sample:
        corner = (field.box.x0, field.box.y0)
        raster = rasterise(shapely.transform(field.nuclei, lambda points: points - corner), field.box.shape)
        self._counts[f"outlines have fewer than {SMALLEST} pixels; skipped"] += raster.small
        self._counts["nuclei overlap a smaller one, which keeps the pixels"] += raster.overlapping
        self._counts["nuclei are covered by others entirely; skipped"] += raster.covered
        types = None
        if id_of is not None:
            types = np.array([0, *(id_of[name] for name in field.names)], np.uint8)[raster.instances]
        return Sample(
            id=field.id,
            source="qupath",
            group=picture.record.slide_id,
            image=image,
            instances=renumbered(raster.instances),
            types=types,
            fold=picture.fold,
        )

    def _open(self, files: Annotated) -> _Picture:
        objects = read_objects(files.annotations, self._class_map)
        self._counts.update({f"{what}; skipped": n for what, n in objects.skipped.items()})
        record, info = _header(files)
        self._warnings += [f"{files.picture}: {warning}" for warning in info.warnings]
        grid = Grid.over(info.level0, info.mpp, MPP)
        frame = info.bounds or info.level0.box
        whole = shapely.box(
            frame.x0 / grid.scale_x, frame.y0 / grid.scale_y, frame.x1 / grid.scale_x, frame.y1 / grid.scale_y
        )
        origin, scale = qupath_origin(info.bounds), (grid.scale_x, grid.scale_y)
        regions, nuclei = (
            shapely.transform(shapes, lambda points: (points + origin) / scale)
            for shapes in (objects.regions, objects.nuclei)
        )
        self._check(files, nuclei, objects.names, whole, grid)
        name = f"qupath_{record.slide_id}"
        if len(regions):
            boxes = list(dict.fromkeys(_box(files.annotations, region, grid) for region in regions))
            self._counts["regions equal another one; skipped"] += len(regions) - len(boxes)
            ids = [f"{name}_{box.x0}_{box.y0}" for box in boxes]
            if twins := [box for box, n in zip(boxes, map(ids.count, ids), strict=True) if n > 1]:
                x, y = twins[0].x0 * grid.scale_x, twins[0].y0 * grid.scale_y
                raise InputError(
                    f"{files.annotations}: two regions of different size begin at {x:.0f}, {y:.0f}; delete one of them"
                )
        elif max(grid.size.width, grid.size.height) > FIELD_SIDE:
            raise InputError(
                f"{files.annotations}: has no region, but {files.picture.name} has {grid.size.width} × "
                f"{grid.size.height} pixels of {MPP} µm, and nuclei that are not outlined would be taken for "
                f"background; {_DRAW}"
            )
        else:
            boxes, ids = [grid.size.box], [name]
        tree = shapely.STRtree(nuclei)
        used: set[int] = set()
        fields = []
        for box, id in zip(boxes, ids, strict=True):
            inside = np.sort(tree.query(shapely.box(box.x0, box.y0, box.x1, box.y1), "intersects"))
            used.update(inside.tolist())
            fields.append(_Field(id, box, nuclei[inside], [objects.names[i] for i in inside]))
        self._counts["nuclei are outside of all regions; skipped"] += len(nuclei) - len(used)
        return _Picture(record, files.fold, grid, fields)

    def _check(
        self, files: Annotated, nuclei: NDArray[np.object_], names: Sequence[str], whole: shapely.Geometry, grid: Grid
    ) -> None:
        """Raise InputError if outlines cannot be nuclei of this picture; add a warning if in doubt.

        `nuclei`, `whole`: outlines and the extent of the picture, in pixels of the grid.
        """
        outside = np.flatnonzero(~shapely.intersects(nuclei, whole))
        if len(outside):
            x, y = shapely.bounds(nuclei[outside[0]])[:2]
            raise InputError(
                f"{files.annotations}: {len(outside):,} of {len(nuclei):,} outlines lie outside of "
                f"{files.picture.name}, the first at {x * grid.scale_x:.0f}, {y * grid.scale_y:.0f}; give positions in "
                "its pixels of full resolution, as QuPath exports them"
            )
        areas = shapely.area(nuclei) * MPP**2
        x0, y0, x1, y1 = shapely.bounds(nuclei).T
        extents = np.maximum(x1 - x0, y1 - y0) * MPP
        for k in np.flatnonzero((areas > LARGEST_UM2) | (extents > LONGEST_UM))[:1]:
            of, remedy = "without a class", "give it the class Region*, or Ignore* to skip it"
            if name := names[k]:
                of, remedy = f"of the class {name}", f"give it another class, or --map '{name}={IGNORE}' (or ={REGION})"
            raise InputError(
                f"{files.annotations}: an outline {of} covers {areas[k]:,.0f} µm² and is {extents[k]:,.0f} µm long, "
                f"which is no nucleus; {remedy}"
            )
        if len(areas) and not USUAL_UM2[0] <= (median := float(np.median(areas))) <= USUAL_UM2[1]:
            self._warnings.append(
                f"{files.annotations}: the median nucleus covers {median:.3g} µm²; check that positions are in pixels "
                f"of the full resolution, and that those of {files.picture.name} have "
                f"{grid.mpp.x / grid.scale_x:.4g} µm"
            )


def _header(files: Annotated) -> tuple[SlideRecord, SlideInfo]:
    """Return the record by which a picture or slide is opened, and its properties.

    Plain pictures without a pixel size have MPP. Raises InputError if it cannot be read, or its pixel size is unknown.
    """
    picture = files.picture
    try:
        header = read_header(picture, kind_of(picture))
        if header.size.mpp is None and header.vendor != "picture":
            raise InputError(
                f"{picture}: {header.size.unusable or 'the file gives no pixel size'}; save it as an OME-TIFF with its "
                "pixel size"
            )
        record = SlideRecord(files.name, picture, 1, Mpp(MPP, MPP) if header.size.mpp is None else None)
        return record, peek(record)
    except SlideError as error:
        raise InputError(str(error)) from error


def _box(annotations: Path, region: shapely.Geometry, grid: Grid) -> Box:
    """Return the pixels of the grid whose centres lie in a region. Raises InputError if it is no suitable rectangle."""
    x0, y0, x1, y1 = shapely.bounds(region)
    where = f"{annotations}: the region at {x0 * grid.scale_x:.0f}, {y0 * grid.scale_y:.0f}"
    if shapely.area(region) < 0.98 * (x1 - x0) * (y1 - y0):
        raise InputError(f"{where} is not a rectangle; draw it with QuPath's rectangle tool, without a rotation")
    box = Box(*(int(np.ceil(edge - 0.5)) for edge in (x0, y0, x1, y1))).intersect(grid.size.box)
    smallest, largest = REGION_SIDES
    if min(box.shape) < smallest or max(box.shape) > largest:
        raise InputError(
            f"{where} has {box.width} × {box.height} pixels of {MPP} µm on the picture; draw rectangles with sides of "
            f"{smallest} to {largest} pixels ({smallest * MPP:.0f} to {largest * MPP:.0f} µm)"
        )
    return box


def _names_in(taxonomy: Taxonomy) -> list[str]:
    return [c.name for c in taxonomy.nuclei]
