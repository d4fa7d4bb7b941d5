"""Write label images as OME-Zarr (NGFF 0.5, zarr v3): whose nucleus a pixel belongs to, and of which class it is.

The folder is a `labels` group with two image-label pyramids on the inference grid: `nuclei` (nucleus_id, uint32) and
`types` (type_id, uint8, with the names and colours of the classes); 0 is background. A pixel belongs to a nucleus if
its centre lies in or on the nucleus's outline, which runs through the centres of its border pixels. Where outlines
overlap, it belongs to the last nucleus of the table, since a nucleus in a hole of another one comes after it.

The coordinate transformations give positions in µm from the centre of the slide's first level-0 pixel, as in an
OME-Zarr of the slide itself. Each level keeps every second pixel of the one below, so that ids are never mixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import shapely
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore

from hover_batch.export.read import NucleiTable, unreadable
from hover_batch.files import replacing_folder
from hover_batch.geometry import Box, Size, cell_box

SHARD, CHUNK = 2048, 512
"""Sides in pixels of a shard, which is one file, and of a chunk."""
_SMALLEST = 512
"""Largest side in pixels of the last level."""
_LABELS = {"nuclei": "uint32", "types": "uint8"}
"""Label images and their dtypes."""
_DECIMALS = 6
"""Decimals to which positions in inference pixels are rounded: they were integers or halves before their scaling."""


@dataclass(frozen=True)
class Outlines:
    """Nuclei to draw, in the order of the table. Positions are inference pixels in which integers are pixel centres."""

    ids: NDArray[np.uint32]
    """nucleus_id (n,)."""
    types: NDArray[np.uint8]
    """type_id (n,)."""
    shapes: NDArray[Any]
    """Outlines (n,): int32 (k, 2) x, y if all steps of the ring are horizontal, vertical or diagonal; else polygons."""
    boxes: NDArray[np.int64]
    """First and last pixels in the outlines (n, 4): x0, y0, x1, y1, inclusive."""

    def where(self, mask: NDArray[np.bool_]) -> Outlines:
        """Return the nuclei for which `mask`, a bool array (n,), is True, in the same order."""
        return Outlines(self.ids[mask], self.types[mask], self.shapes[mask], self.boxes[mask])

    def joined(self, other: Outlines) -> Outlines:
        """Return these nuclei followed by the nuclei of `other`."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("ids", "types", "shapes", "boxes"))
        return Outlines(*map(np.concatenate, pairs))


def write_ome_zarr(nuclei: NucleiTable, path: Path) -> None:
    """Write label images of the table `nuclei` to the folder `path` (.ome.zarr). An existing folder is replaced.

    The images are `nuclei` (nucleus_id of each pixel, uint32) and `types` (type_id, uint8), on the inference grid. Only
    the nuclei of one row of shards are held in memory.

    OSError if the folder cannot be written, SlideError if the table is corrupted or its nuclei are not in the order of
    their first rows of pixels.
    """
    canvas = nuclei.grid.size.box
    with replacing_folder(path) as temporary:
        levels = _create(nuclei, temporary)
        for row, band in bands(nuclei):
            for column in range(-(-canvas.width // SHARD)):
                box = cell_box(column, row, SHARD).intersect(canvas)
                inside = band.where((band.boxes[:, 0] < box.x1) & (band.boxes[:, 2] >= box.x0))
                drawing = draw(inside, box)
                if drawing.any():
                    for name, values in (("nuclei", inside.ids), ("types", inside.types)):
                        levels[name][0][box.slices_in(canvas)] = np.insert(values, 0, 0)[drawing]
        for arrays in levels.values():
            for below, array in zip(arrays, arrays[1:], strict=False):
                _halve(below, array)


def bands(nuclei: NucleiTable) -> Iterator[tuple[int, Outlines]]:
    """Yield (number, nuclei) for each row of shards: its number, from 0, and the nuclei that reach into it.

    Rows above the last nucleus are yielded even if no nucleus reaches into them.

    The nuclei are in the order of the table. SlideError if the table is corrupted, or not in the order of the nuclei's
    first rows of pixels.
    """
    row, first_row, waiting = 0, 0.0, None
    for batch in nuclei.batches(["nucleus_id", "type_id", "bbox", "geometry"]):
        first_rows = batch["bbox"].field("ymin").to_numpy() / nuclei.grid.scale_y
        if (np.diff(first_rows, prepend=first_row) < -0.5).any():
            raise unreadable(nuclei.path, ValueError("its nuclei are not in their order"))
        first_row = float(first_rows[-1])
        outlines = _outlines(nuclei, batch)
        waiting = outlines if waiting is None else waiting.joined(outlines)
        while first_row >= (row + 1) * SHARD:  # all nuclei that reach into this row have been read
            yield row, waiting.where(waiting.boxes[:, 1] < (row + 1) * SHARD)
            row += 1
            waiting = waiting.where(waiting.boxes[:, 3] >= row * SHARD)
    while waiting is not None and len(waiting.ids):
        yield row, waiting.where(waiting.boxes[:, 1] < (row + 1) * SHARD)
        row += 1
        waiting = waiting.where(waiting.boxes[:, 3] >= row * SHARD)


def _outlines(nuclei: NucleiTable, batch: pa.RecordBatch) -> Outlines:
    scale = nuclei.grid.scale_x, nuclei.grid.scale_y
    polygons = shapely.transform(nuclei.polygons(batch), lambda points: np.round(points / scale - 0.5, _DECIMALS))
    points, ring_of_point = shapely.get_coordinates(shapely.get_exterior_ring(polygons), return_index=True)
    whole = points.astype(np.int32)
    dx, dy = np.abs(np.diff(whole, axis=0, append=whole[-1:])).T
    last = np.diff(ring_of_point, append=-1) != 0
    plain = (whole == points).all(axis=1) & ((dx == 0) | (dy == 0) | (dx == dy) | last)
    shapes = np.empty(len(polygons), object)
    shapes[:] = np.split(whole, np.flatnonzero(last)[:-1] + 1)
    others = np.unique(ring_of_point[~plain])
    shapes[others] = polygons[others]
    x0, y0, x1, y1 = shapely.bounds(polygons).T
    boxes = np.stack([np.ceil(x0), np.ceil(y0), np.floor(x1), np.floor(y1)], axis=1).astype(np.int64)
    return Outlines(batch["nucleus_id"].to_numpy(), batch["type_id"].to_numpy(), shapes, boxes)


def draw(outlines: Outlines, box: Box) -> NDArray[np.int32]:
    """Return a map (y, x) int32 of `box`. Each pixel has the number 1 … n of its nucleus; 0 is the background.

    `outlines`: n nuclei; later ones cover earlier ones. `box`: box in inference pixels.
    """
    drawing = np.zeros(box.shape, np.int32)
    for number, (shape, (x0, y0, x1, y1)) in enumerate(
        zip(outlines.shapes, outlines.boxes.tolist(), strict=True), start=1
    ):
        whole = Box(x0, y0, x1 + 1, y1 + 1)
        plain = isinstance(shape, np.ndarray)
        if plain and box.contains_box(whole):
            cv2.fillPoly(drawing, [shape], (number,), offset=(-box.x0, -box.y0))
        elif not (part := whole.intersect(box)).empty:
            drawing[part.slices_in(box)][_mask(shape, whole)[part.slices_in(whole)]] = number
    return drawing


def _mask(shape: Any, box: Box) -> NDArray[np.bool_]:
    """Return the pixels of `box` (y, x) in or on an outline that lies inside of it."""
    if isinstance(shape, np.ndarray):
        mask = np.zeros(box.shape, np.uint8)  # since OpenCV draws outlines that it must clip one pixel too wide
        cv2.fillPoly(mask, [shape], (1,), offset=(-box.x0, -box.y0))
        return mask.view(bool)
    y, x = np.mgrid[box.y0 : box.y1, box.x0 : box.x1]
    return np.asarray(shapely.intersects_xy(shape, x, y), bool)


def _create(nuclei: NucleiTable, path: Path) -> dict[str, list[zarr.Array[Any]]]:
    """Create the groups and empty arrays; return the levels of each label image, largest first."""
    store = LocalStore(path)
    sizes = [nuclei.grid.size]
    while max(sizes[-1].width, sizes[-1].height) > _SMALLEST:
        sizes.append(Size(-(-sizes[-1].width // 2), -(-sizes[-1].height // 2)))
    _group(store, "", {"labels": list(_LABELS)})
    levels = {}
    for name, dtype in _LABELS.items():
        label: dict[str, Any] = {"version": "0.5", "colors": []}
        if name == "types":
            classes = nuclei.taxonomy.nuclei
            label["colors"] = [{"label-value": c.id, "rgba": [*c.color, 255]} for c in classes]
            label["properties"] = [{"label-value": c.id, "name": c.name} for c in classes]
        _group(store, name, {"multiscales": [_multiscale(nuclei, name, len(sizes))], "image-label": label})
        levels[name] = [
            zarr.create_array(
                store,
                name=f"{name}/{level}",
                shape=(size.height, size.width),
                shards=(SHARD, SHARD),
                chunks=(CHUNK, CHUNK),
                dtype=dtype,
                fill_value=0,
                compressors=ZstdCodec(level=1),
                zarr_format=3,
                dimension_names=("y", "x"),
            )
            for level, size in enumerate(sizes)
        ]
    return levels


def _group(store: LocalStore, path: str, ome: dict[str, Any]) -> None:
    zarr.create_group(store, path=path, zarr_format=3, attributes={"ome": {"version": "0.5", **ome}})


def _multiscale(nuclei: NucleiTable, name: str, levels: int) -> dict[str, Any]:
    """Return the entry of `multiscales`: axes, and the scale and translation of each level in µm."""
    mpp = np.array([nuclei.grid.mpp.y, nuclei.grid.mpp.x])
    # From the centre of the first level-0 pixel to that of the first inference pixel, which all levels keep.
    shift = (mpp - (nuclei.mpp.y, nuclei.mpp.x)) / 2
    return {
        "name": name,
        "axes": [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"],
        "datasets": [
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": (mpp * 2**level).tolist()},
                    {"type": "translation", "translation": shift.tolist()},
                ],
            }
            for level in range(levels)
        ],
    }


def _halve(below: zarr.Array[Any], array: zarr.Array[Any]) -> None:
    """Fill a level with every second pixel of the one below, shard by shard."""
    canvas, half = Size(array.shape[1], array.shape[0]).box, SHARD // 2
    for column, row in canvas.cells(SHARD):
        box = cell_box(column, row, SHARD).intersect(canvas)
        values = np.zeros(box.shape, array.dtype)
        for part_column, part_row in box.cells(half):  # one shard of the level below at a time
            part = cell_box(part_column, part_row, half).intersect(box)
            source = below[2 * part.y0 : 2 * part.y1, 2 * part.x0 : 2 * part.x1]
            values[part.slices_in(box)] = np.asarray(source)[::2, ::2]
        if values.any():
            array[box.slices_in(canvas)] = values
