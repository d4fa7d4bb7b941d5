"""Table of a slide's nuclei: columns, parts per region, and their merge into nuclei.parquet (GeoParquet 1.1).

Each region writes its nuclei as a part, without ids. The merge sorts all nuclei by anchor (first pixel in raster
order), numbers them and writes row groups of a fixed length, so the bytes of nuclei.parquet depend only on the nuclei,
not on the division into regions.

Positions are level-0 pixels on OpenSlide's full canvas, x to the right and y down, a pixel (i, j) covering
[i, i+1) × [j, j+1). Sizes are µm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from hover_batch.errors import SlideError
from hover_batch.files import replacing
from hover_batch.geometry import Box, Grid, Mpp
from hover_batch.nuclei.geoparquet import BBOX, DICTIONARY, geoparquet_writer
from hover_batch.taxonomy import Taxonomy
from hover_batch.uncertainty import BetaScaling, calibrated_column

if TYPE_CHECKING:
    from hover_batch.nuclei.measure import Nuclei

SCHEMA_VERSION = 1
"""Version of the columns and the file metadata; part of the run key."""

ROW_GROUP = 100_000
"""Rows per row group, about 40 MB in memory; readers of one field of a slide skip the other groups."""

Selection = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]
"""Function from the centroids' x and y, each (n,) in level-0 pixels, to a mask (n,): True for nuclei of the table."""


@dataclass(frozen=True)
class TableContext:
    """Slide and model of a table. It has no time, host or path, so that equal runs give equal bytes."""

    slide_id: str
    """Name of the slide."""
    taxonomy: Taxonomy
    """Classes of the nuclei."""
    grid: Grid
    """Inference grid of the slide."""
    slide_mpp: Mpp
    """Pixel size of level 0."""
    mpp_source: str
    """Origin of `slide_mpp`: the file, the cohort CSV, …"""
    bounds: Box | None
    """OpenSlide's bounds in level-0 pixels, the scanned part of the canvas; None if the file has none."""
    model_id: str
    """Name of the model."""
    model_sha256: str
    """Hash of the model's package."""
    software: str
    """Version of hover-batch."""
    scalings: Mapping[str, BetaScaling] = field(default_factory=dict)
    """Calibration of a column in `hover_batch.uncertainty.CALIBRATED`; its result is a column beside it."""
    estimate: Mapping[str, Any] | None = None
    """Estimate of which these are the counted nuclei (JSON); None for the table of a whole slide."""

    def to_json(self) -> dict[str, Any]:
        """Return the entry `hover_batch` of the file's metadata, as JSON values by name.

        The keys are `schema_version`, `software`, `slide_id`, `mpp` and `inference_mpp` (each with `x` and `y` in µm),
        `mpp_source`, `level0` (`width`, `height`), `bounds` (`x0`, `y0`, `x1`, `y1`, or None), `inference_scale` (`x`,
        `y`: level-0 pixels per inference pixel), `taxonomy`, `model` (`id`, `sha256`) and, unless the table is of a
        whole slide, `estimate`. `scalings` are not included.
        """
        grid = self.grid
        return {
            "schema_version": SCHEMA_VERSION,
            "software": self.software,
            "slide_id": self.slide_id,
            "mpp": asdict(self.slide_mpp),
            "mpp_source": self.mpp_source,
            "level0": asdict(grid.level0),
            "bounds": None if self.bounds is None else asdict(self.bounds),
            "inference_mpp": asdict(grid.mpp),
            "inference_scale": {"x": grid.scale_x, "y": grid.scale_y},
            "taxonomy": self.taxonomy.to_json(),
            "model": {"id": self.model_id, "sha256": self.model_sha256},
            **({} if self.estimate is None else {"estimate": self.estimate}),
        }


@dataclass(frozen=True)
class MergeResult:
    """Counts of a merge."""

    nuclei: int
    """Number of nuclei in the merged table."""
    seam_uncertain: int
    """Number of nuclei flagged as `seam_uncertain`."""


def table_schema(taxonomy: Taxonomy, calibrated: Collection[str] = ()) -> pa.Schema:
    """Return the columns of nuclei.parquet, in order. No column is nullable.

    `taxonomy`: classes of the nuclei; each has a column `prob_<class>`. `calibrated`: names of the columns that are
    followed by a column with their calibrated values.
    """
    columns: list[tuple[str, pa.DataType]] = [
        ("slide_id", pa.string()),
        ("nucleus_id", pa.uint32()),
        ("centroid_x", pa.float64()),
        ("centroid_y", pa.float64()),
        ("bbox", BBOX),
        ("type_id", pa.uint8()),
        ("type", pa.string()),
        ("type_prob", pa.float32()),
        *((f"prob_{c.name}", pa.float32()) for c in taxonomy.nuclei),
        ("seg_score", pa.float32()),
        ("area_um2", pa.float32()),
        ("perimeter_um", pa.float32()),
        ("major_axis_um", pa.float32()),
        ("minor_axis_um", pa.float32()),
        ("eccentricity", pa.float32()),
        ("solidity", pa.float32()),
        ("h_od_mean", pa.float32()),
        ("e_od_mean", pa.float32()),
        ("touches_border", pa.bool_()),
        ("seam_uncertain", pa.bool_()),
        ("geometry", pa.binary()),
    ]
    with_calibrated = (
        entry
        for name, kind in columns
        for entry in ((name, kind), *([(calibrated_column(name), kind)] if name in calibrated else []))
    )
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in with_calibrated])


def part_schema(taxonomy: Taxonomy, calibrated: Collection[str] = ()) -> pa.Schema:
    """Return the columns of a part. They are the columns of nuclei.parquet, with the anchor instead of nucleus_id.

    The columns anchor_y and anchor_x, in inference pixels, come first; the merge sorts by them. No column is nullable.

    `taxonomy`: classes of the nuclei. `calibrated`: names of the columns that are followed by a column with their
    calibrated values.
    """
    anchors = [pa.field(name, pa.int64(), nullable=False) for name in ("anchor_y", "anchor_x")]
    return pa.schema(anchors + [field for field in table_schema(taxonomy, calibrated) if field.name != "nucleus_id"])


def to_arrow(nuclei: Nuclei, context: TableContext) -> pa.Table:
    """Convert nuclei in inference pixels to rows of `part_schema`, in level-0 pixels and µm, in the same order.

    Lengths in pixels are multiplied by the geometric mean of a pixel's sides in µm, and areas by its area in µm².

    `nuclei`: nuclei in absolute pixels of the slide's inference grid. `context`: slide and model.
    """
    grid, taxonomy = context.grid, context.taxonomy
    scale = np.array([grid.scale_x, grid.scale_y], np.float64)
    side_um = np.sqrt(grid.mpp.x * grid.mpp.y)
    boxes = np.asarray(nuclei.bbox, np.int64).reshape(-1, 4)
    # The extent of the pixels reaches half a pixel beyond the contour and so covers the polygon.
    level0_boxes = boxes * np.tile(scale, 2)
    canvas = np.array([grid.size.width, grid.size.height])
    class_names = pa.array([c.name for c in taxonomy.classes])
    columns: dict[str, Any] = {
        "anchor_y": nuclei.anchor_y,
        "anchor_x": nuclei.anchor_x,
        "slide_id": pa.repeat(context.slide_id, len(boxes)),
        "centroid_x": nuclei.centroid_x * grid.scale_x,
        "centroid_y": nuclei.centroid_y * grid.scale_y,
        "bbox": pa.StructArray.from_arrays([level0_boxes[:, i] for i in range(4)], fields=list(BBOX)),
        "type_id": nuclei.type_id,
        "type": class_names.take(pa.array(nuclei.type_id)),
        "type_prob": nuclei.type_prob,
        **{f"prob_{c.name}": nuclei.class_probs[:, c.id - 1] for c in taxonomy.nuclei},
        "seg_score": nuclei.seg_score,
        "area_um2": nuclei.area_px * (grid.mpp.x * grid.mpp.y),
        "perimeter_um": nuclei.perimeter_px * side_um,
        "major_axis_um": nuclei.major_axis_px * side_um,
        "minor_axis_um": nuclei.minor_axis_px * side_um,
        "eccentricity": nuclei.eccentricity,
        "solidity": nuclei.solidity,
        "h_od_mean": nuclei.h_od,
        "e_od_mean": nuclei.e_od,
        "touches_border": ((boxes[:, :2] <= 0) | (boxes[:, 2:] >= canvas)).any(axis=1),
        "seam_uncertain": nuclei.seam_uncertain,
        "geometry": _wkb(nuclei.contours, scale),
    }
    for name, scaling in context.scalings.items():
        columns[calibrated_column(name)] = scaling.apply(columns[name])
    schema = part_schema(taxonomy, context.scalings)
    return pa.table([_column(columns[field.name], field.type) for field in schema], schema=schema)


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, np.ndarray):
        values = pa.array(np.ascontiguousarray(values))
    return values.cast(kind, safe=False) if values.type != kind else values  # unsafe: float64 → float32 rounds


def _wkb(contours: Sequence[NDArray[np.float64]], scale: NDArray[np.float64]) -> pa.Array:
    """Convert closed rings (k, 2) of x, y in inference pixels to WKB polygons in level-0 pixels."""
    if not contours:
        return pa.array([], pa.binary())
    points = np.concatenate(contours) * scale
    ring_of_point = np.repeat(np.arange(len(contours)), [len(ring) for ring in contours])
    polygons = shapely.polygons(shapely.linearrings(points, indices=ring_of_point))
    return pa.array(shapely.to_wkb(polygons, output_dimension=2, byte_order=1), pa.binary())


def write_part(path: Path, part: pa.Table) -> None:
    """Write the nuclei of one region to the Parquet file `path`, atomically; an existing file is replaced.

    `part`: rows of `part_schema`. OSError if the file cannot be written.
    """
    with replacing(path) as temporary:
        pq.write_table(part, temporary, compression="zstd", compression_level=1, use_dictionary=DICTIONARY)


def merge_parts(
    parts: Iterable[tuple[int, Path]], out: Path, context: TableContext, select: Selection | None = None
) -> MergeResult:
    """Sort and number all nuclei of a slide, and write them to `out`. Return their counts.

    `out` is replaced atomically. The anchors of one row of regions all lie above those of the next, so memory holds one
    row of regions and one row group, independent of the slide's height.

    `parts`: for each region, its row in the grid of regions and the path of its file. `context`: slide and model, for
    the file's metadata and the column slide_id. `select`: chooses the nuclei of the table by their centroids, before
    they are numbered; None for all.

    SlideError if two regions hold the same nucleus, OSError if a file cannot be read or written, pyarrow.ArrowInvalid
    if a part is corrupted.
    """
    schema = table_schema(context.taxonomy, context.scalings)
    rows_of_regions = _rows(parts, part_schema(context.taxonomy, context.scalings), select)
    numbered = uncertain = 0
    with replacing(out) as temporary, geoparquet_writer(temporary, schema, context.to_json()) as write_group:
        for group in _cut(rows_of_regions, ROW_GROUP):
            ids = np.arange(numbered + 1, numbered + 1 + len(group), dtype=np.uint32)
            numbered += len(group)
            uncertain += int(np.count_nonzero(group["seam_uncertain"].to_numpy()))
            # The folder of the parts may have been renamed, together with the slide in the cohort.
            named = group.set_column(0, schema.field("slide_id"), pa.repeat(context.slide_id, len(group)))
            write_group(named.add_column(1, schema.field("nucleus_id"), pa.array(ids)).cast(schema))
    return MergeResult(numbered, uncertain)


def _rows(parts: Iterable[tuple[int, Path]], schema: pa.Schema, select: Selection | None) -> Iterator[pa.Table]:
    """Yield the nuclei of each row of regions in turn, sorted by anchor."""
    files: dict[int, list[Path]] = {}
    for row, path in parts:
        files.setdefault(row, []).append(path)
    last = (-1, -1)
    for row in sorted(files):
        table = pa.concat_tables([_read_part(path, schema) for path in sorted(files[row])])
        y, x = table["anchor_y"].to_numpy(), table["anchor_x"].to_numpy()
        order = np.lexsort((x, y))
        y, x = y[order], x[order]
        again = (np.diff(y) == 0) & (np.diff(x) == 0)
        if len(y) and ((int(y[0]), int(x[0])) <= last or again.any()):
            raise SlideError(
                f"two regions hold the same nucleus, in row {row} of the regions or across its upper edge: the parts "
                f"in {files[row][0].parent} are from different runs; remove that folder and run again"
            )
        if len(y):
            last = (int(y[-1]), int(x[-1]))
        if select is not None:
            chosen = select(table["centroid_x"].to_numpy(), table["centroid_y"].to_numpy())
            order = order[chosen[order]]
        yield table.take(pa.array(order)).drop_columns(["anchor_y", "anchor_x"])


def _read_part(path: Path, schema: pa.Schema) -> pa.Table:
    # read_table would take key=value in a folder's name for a column.
    with pq.ParquetFile(path) as part:
        return part.read().cast(schema)


def _cut(tables: Iterable[pa.Table], length: int) -> Iterator[pa.Table]:
    """Yield the rows in tables of exactly `length` rows (the last may be shorter), with one chunk per column."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += len(table)
        if count >= length:
            joined = pa.concat_tables(waiting)
            for start in range(0, count - length + 1, length):
                yield joined.slice(start, length).combine_chunks()
            count %= length
            waiting = [joined.slice(len(joined) - count)]
    if count:
        yield pa.concat_tables(waiting).combine_chunks()
