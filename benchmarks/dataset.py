"""Cost of a data set of 200 slides and ten million nuclei: to write it, and to ask it questions.

    python -m benchmarks.dataset RUN [--json FILE] [--slides N] [--keep FOLDER]

RUN is the folder of a finished run of a real slide. Its nuclei are repeated side by side on larger slides of a second
run, of which a few are large, many small, as in a cohort of resections and biopsies. The benchmark only reports numbers;
it does not check them.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from benchmarks.exports import resident
from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.run_folder import slide_layouts
from hover_batch.dataset.layout import DatasetLayout
from hover_batch.dataset.slides import SlideEntry, read_entries
from hover_batch.dataset.update import add_run
from hover_batch.export.read import NucleiTable
from hover_batch.export.summary import slide_summary
from hover_batch.files import sha256_file, to_json
from hover_batch.geometry import Grid, Size
from hover_batch.nuclei.table import TableContext, merge_parts, part_schema, write_part
from hover_batch.cohort.record import SlideRecord
from hover_batch.slide.survey import read_info, read_tissue, write_survey

SIZES = (300_000,) * 10 + (75_000,) * 60 + (19_230,) * 130
"""Nuclei of each slide: 3.0, 4.5 and 2.5 million in large, middle and small slides."""
SLIDES_PER_PATIENT = 4
WINDOW = 4096
"""Side of the window that is asked for, in level-0 pixels."""


class RealTile:
    """Nuclei of a finished slide, which can be written again anywhere on larger slides.

    `run`: folder of the run; its first slide is taken.
    """

    def __init__(self, run: Path) -> None:
        self.slide = next(iter(slide_layouts(RunLayout(run)).values()))
        self.table = NucleiTable.open(self.slide.nuclei_parquet)
        self.rows = pq.ParquetFile(self.slide.nuclei_parquet).read()
        self._polygons = shapely.from_wkb(self.rows["geometry"].to_numpy())
        self._coordinates = shapely.get_coordinates(self._polygons)
        self._ring_of = np.repeat(np.arange(len(self._polygons)), shapely.get_num_coordinates(self._polygons))

    def part(self, slide_id: str, column: int, row: int, most: int) -> pa.Table:
        """Return at most `most` nuclei of the tile at a place of the grid of tiles, as a part of a slide's table."""
        dx, dy = column * self.table.level0.width, row * self.table.level0.height
        count = min(most, len(self.rows))
        here = self._ring_of < self._ring_of.dtype.type(count)
        rings = shapely.linearrings(self._coordinates[here] + [dx, dy], indices=self._ring_of[here])
        box = self.rows["bbox"].combine_chunks().slice(0, count)
        moved = [np.asarray(box.field(i)) + (dx, dy)[i % 2] for i in range(4)]
        columns: dict[str, Any] = {name: self.rows[name].slice(0, count) for name in self.rows.column_names}
        columns |= {
            # In raster order by row of pixels, and unique.
            "anchor_y": np.floor(moved[1]).astype(np.int64),
            "anchor_x": np.floor(moved[0]).astype(np.int64) << 20 | np.arange(count),
            "slide_id": pa.repeat(slide_id, count),
            "centroid_x": self.rows["centroid_x"].to_numpy()[:count] + dx,
            "centroid_y": self.rows["centroid_y"].to_numpy()[:count] + dy,
            "bbox": pa.StructArray.from_arrays(moved, fields=list(box.type)),
            "geometry": pa.array(shapely.to_wkb(shapely.polygons(rings), byte_order=1), pa.binary()),
        }
        schema = part_schema(self.table.taxonomy)
        return pa.table([columns[name] for name in schema.names], schema=schema)

    def write_slide(self, layout: RunLayout, slide_id: str, nuclei: int, number: int) -> None:
        """Write a finished slide of `nuclei` nuclei to a run; `number` makes its fingerprint."""
        slide, tile = layout.slide(slide_id), self.table.level0
        slide.folder.mkdir(parents=True)
        side = int(np.ceil(np.sqrt(nuclei / len(self.rows))))
        size = Size(side * tile.width, side * tile.height)
        mpp = self.table.mpp
        grid = Grid(size, 1.0, 1.0, mpp, size)
        context = TableContext(
            slide_id, self.table.taxonomy, grid, mpp, "file", None, "starter", "0" * 64, self.table.software
        )
        parts, left = [], nuclei
        for row in range(side):
            tables = []
            for column in range(side):
                if left:
                    tables.append(self.part(slide_id, column, row, left))
                    left -= len(tables[-1])
            if tables:
                path = slide.folder / f"{row}.part.parquet"
                write_part(path, pa.concat_tables(tables))
                parts.append((row, path))
        merged = merge_parts(parts, slide.nuclei_parquet, context)
        for _, path in parts:
            path.unlink()
        info = replace(read_info(self.slide.survey_json), level0=size, bounds=None, fingerprint=f"{number:064x}")
        write_survey(slide.survey_json, info, read_tissue(self.slide.survey_json))
        summary = slide_summary(
            SlideRecord(slide_id, slide.folder, number),
            self.table.taxonomy,
            status="done",
            nuclei=slide.nuclei_parquet,
            tissue_mm2=size.width * size.height * mpp.x * mpp.y / 1e6,
            seconds={"infer": 1.0},
        )
        done = {"nuclei": merged.nuclei, "nuclei_sha256": sha256_file(slide.nuclei_parquet), "slide_id": slide_id}
        slide.slide_json.write_bytes(to_json(done | {"summary": summary}))


def write_run(out: Path, tile: RealTile, sizes: tuple[int, ...]) -> RunLayout:
    """Write the folder of a run whose slides have `sizes` nuclei; SLIDES_PER_PATIENT each are of one patient."""
    layout = RunLayout(out)
    out.mkdir(parents=True)
    run = json.loads(RunLayout(tile.slide.root).run_json.read_bytes())
    layout.run_json.write_bytes(to_json(run))
    with layout.slides_csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "slide_id", "patient_id", "group", "row", "status"))
        for number, _ in enumerate(sizes):
            patient = f"P{number // SLIDES_PER_PATIENT:03d}"
            writer.writerow((f"{number}.svs", f"slide-{number:03d}", patient, "ab"[number % 2], number + 2, "done"))
    with ProcessPoolExecutor(2) as pool:
        ids = [f"slide-{number:03d}" for number in range(len(sizes))]
        list(pool.map(tile.write_slide, [layout] * len(sizes), ids, sizes, range(len(sizes))))
    return layout
