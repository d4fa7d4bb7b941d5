"""Cost of a data set of 200 slides and ten million nuclei: to write it, and to ask it questions.

    python -m benchmarks.dataset RUN [--json FILE] [--folder FOLDER]

RUN is the folder of a finished run of a real slide. Its nuclei are repeated side by side on the slides of a second run,
of which few are large and many small, as in a cohort of resections and biopsies. Each measurement of the writer has its
own process, which has written a small data set before, so that imports are not counted. The benchmark only reports
numbers; it does not check them.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence, Sized
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
from benchmarks.questions import questions
from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.cohort.run_folder import slide_layouts
from hover_batch.dataset.layout import DatasetLayout
from hover_batch.dataset.slides import read_entries
from hover_batch.dataset.update import add_run
from hover_batch.export.read import NucleiTable
from hover_batch.export.summary import slide_summary
from hover_batch.files import sha256_file, to_json
from hover_batch.geometry import Grid, Size
from hover_batch.nuclei.geoparquet import geoparquet_writer
from hover_batch.nuclei.table import TableContext, merge_parts, part_schema, write_part
from hover_batch.slide.survey import read_info, read_tissue, write_survey

SIZES = (300_000,) * 10 + (75_000,) * 60 + (19_230,) * 130
"""Nuclei of each slide: 3.0, 4.5 and 2.5 million in large, middle and small slides."""
LARGE = 1_000_000
"""Nuclei of a slide that is added by itself, to measure what its length costs."""
SLIDES_PER_PATIENT = 4
WINDOW = 4096
"""Side of a window of one slide, in level-0 pixels."""
REPEATS = 15
"""Number of times that each question is asked; the median counts."""


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


def copy_slide(layout: RunLayout, made: str, slide_id: str, number: int) -> None:
    """Write the finished slide `made` of a run once more under another name; `number` makes its fingerprint."""
    source, slide = layout.slide(made), layout.slide(slide_id)
    slide.folder.mkdir(parents=True)
    with pq.ParquetFile(source.nuclei_parquet) as table:
        metadata = json.loads(table.metadata.metadata[b"hover_batch"]) | {"slide_id": slide_id}
        schema = table.schema_arrow.remove_metadata()
        with geoparquet_writer(slide.nuclei_parquet, schema, metadata) as write:
            for group in range(table.num_row_groups):
                rows = table.read_row_group(group)
                write(rows.set_column(0, schema.field(0), pa.repeat(slide_id, len(rows))).cast(schema).combine_chunks())
    info = replace(read_info(source.survey_json), fingerprint=f"{number:064x}")
    write_survey(slide.survey_json, info, read_tissue(source.survey_json))
    done = json.loads(source.slide_json.read_bytes())
    done |= {"slide_id": slide_id, "nuclei_sha256": sha256_file(slide.nuclei_parquet)}
    slide.slide_json.write_bytes(to_json(done))


def write_run(out: Path, tile: RealTile, sizes: Sequence[int]) -> None:
    """Write the folder of a run whose slides have `sizes` nuclei; SLIDES_PER_PATIENT each are of one patient.

    Slides of equal size have the same nuclei.
    """
    layout = RunLayout(out)
    out.mkdir(parents=True)
    layout.run_json.write_bytes(RunLayout(tile.slide.root).run_json.read_bytes())
    ids = [f"slide-{number:03d}" for number in range(len(sizes))]
    with layout.slides_csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "slide_id", "patient_id", "group", "row", "status"))
        for number, slide_id in enumerate(ids):
            patient = f"P{number // SLIDES_PER_PATIENT:03d}"
            writer.writerow((f"{slide_id}.svs", slide_id, patient, "ab"[number % 2], number + 2, "done"))
    made: dict[int, str] = {}
    for number, (slide_id, size) in enumerate(zip(ids, sizes, strict=True)):
        if size in made:
            copy_slide(layout, made[size], slide_id, number)
        else:
            tile.write_slide(layout, slide_id, size, number)
            made[size] = slide_id


@dataclass(frozen=True)
class Cost:
    """Cost of one update of a data set."""

    slides: int
    """Number of slides that were added."""
    nuclei: int
    """Number of their nuclei."""
    seconds: float
    """Wall-clock time."""
    cpu_seconds: float
    """CPU time of the process, which depends little on other processes on the machine."""
    peak_mb: float
    """Peak of the resident memory in millions of bytes, minus the resident memory before the update."""


def cost_of(run: Path, dataset: Path, slide_ids: Sequence[str], small: Path) -> Cost:
    """Return the cost of adding slides of a run to a data set, in a new process.

    `slide_ids`: the slides; empty for all. `small`: a run that the process adds to another data set first.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_cost_in_this_process, run, dataset, slide_ids, small).result()


def _cost_in_this_process(run: Path, dataset: Path, slide_ids: Sequence[str], small: Path) -> Cost:
    with tempfile.TemporaryDirectory(dir=dataset.parent) as folder:
        add_run(small, Path(folder) / "small", (), _ignore)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    resident_before, started, cpu_started = resident("VmRSS"), time.perf_counter(), time.process_time()
    added = add_run(run, dataset, slide_ids, _ignore).added
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = (resident("VmHWM") - resident_before) / 1e6
    rows = {entry.slide_id: entry.nuclei_rows for entry in read_entries(dataset)}
    return Cost(len(added), sum(rows[slide_id] for slide_id in added), seconds, cpu_seconds, peak)


def _ignore(line: str) -> None:
    """Drop a line about progress."""


def counts_by_patient(dataset: Path) -> dict[str, float]:
    """Return the cost of counting the nuclei of each class and patient in DuckDB."""
    files = sorted({str(dataset / name) for e in read_entries(dataset) for name in e.nuclei_files})
    query = (
        "SELECT patient_id, type, count(*) FROM read_parquet($files) JOIN read_parquet($slides) "
        "USING (slide_id, model) GROUP BY ALL"
    )
    slides = str(DatasetLayout(dataset).slides_parquet)
    return _asked(lambda db: db.execute(query, {"files": files, "slides": slides}).fetchall())


def window_of_a_slide(dataset: Path) -> dict[str, float]:
    """Return the cost of reading all columns of a window in the middle of the largest slide in DuckDB."""
    entry = max(read_entries(dataset), key=lambda entry: entry.nuclei_rows)
    x, y = (side / 2 for side in (entry.level0_width, entry.level0_height))
    query = (
        "SELECT * FROM read_parquet($files) WHERE slide_id = $slide AND bbox.xmax >= $x AND bbox.xmin <= $x + $side "
        "AND bbox.ymax >= $y AND bbox.ymin <= $y + $side"
    )
    files = [str(dataset / name) for name in entry.nuclei_files]
    values = {"files": files, "slide": entry.slide_id, "x": x, "y": y, "side": WINDOW}
    return _asked(lambda db: db.execute(query, values).fetchall()) | {"nuclei_of_slide": entry.nuclei_rows}


def _asked(ask: Callable[[duckdb.DuckDBPyConnection], Sized]) -> dict[str, float]:
    """Ask a question REPEATS times, each time on a new connection.

    Return the median seconds and CPU seconds, and the number of rows of the answer.
    """
    seconds, cpu_seconds = [], []
    for _ in range(REPEATS):
        with duckdb.connect() as db:
            started, cpu_started = time.perf_counter(), time.process_time()
            rows = len(ask(db))
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    return {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu_seconds), "rows": rows}


def measured(run: Path, folder: Path) -> dict[str, Any]:
    """Write the cohort and its data set to `folder`, and return all results as JSON values by name."""
    tile = RealTile(run)
    cohort, large, dataset = folder / "cohort", folder / "large", folder / "dataset"
    if not cohort.exists():
        write_run(cohort, tile, SIZES)
        write_run(large, tile, (LARGE,))
    ids = list(slide_layouts(RunLayout(cohort)))
    # A tenth of the large, middle and small slides each.
    tenth = [slide_id for slide_id, size in zip(ids, SIZES, strict=True) if ids.index(slide_id) % 10 == 0 and size]
    part = cost_of(cohort, folder / "tenth", tenth, run)
    whole = cost_of(cohort, dataset, (), run)
    again = cost_of(cohort, dataset, (), run)
    size = sum(path.stat().st_size for path in dataset.rglob("*.parquet"))
    return {
        "nuclei": whole.nuclei,
        "slides": whole.slides,
        "files": sum(1 for _ in dataset.rglob("nuclei/*/*.parquet")),
        "mb_per_million": size / whole.nuclei,
        "seconds_per_million": whole.seconds / whole.nuclei * 1e6,
        "cpu_seconds_per_million": whole.cpu_seconds / whole.nuclei * 1e6,
        "write_all": asdict(whole),
        "write_a_tenth": asdict(part),
        "same_command_again": asdict(again),
        "write_one_slide_of_a_million": asdict(cost_of(large, folder / "of_large", (), run)),
        "counts_by_patient": counts_by_patient(dataset),
        "window": window_of_a_slide(dataset),
        "questions": questions(dataset),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Run the benchmark and print its results as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dataset", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--folder", type=Path, help="keep the cohort and its data set in this folder; 4 GB")
    arguments = parser.parse_args()
    folder = arguments.folder
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as name:
        text = json.dumps(measured(arguments.run, Path(name)), indent=2) + "\n"
    print(text, end="")
    if arguments.json:
        arguments.json.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
