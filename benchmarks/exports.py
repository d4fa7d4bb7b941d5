"""Cost of exporting one million nuclei: seconds, megabytes on disk and peak memory of each format.

    python -m benchmarks.exports [--to FORMAT]… [--json FILE] [--nuclei N]

The table contains CoNSeP's annotated nuclei of ../shared/data, measured like predictions and repeated over a grid. Each
format runs in its own process, which has written a small table before, so that the time and memory of imports are not
counted. The benchmark only reports numbers; it does not check them.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from hover_batch.cohort.layout import Format
from hover_batch.export.read import NucleiTable
from hover_batch.exporting import writer
from hover_batch.geometry import Box, Grid, Mpp, Size
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.measure import measure
from hover_batch.nuclei.table import TableContext, merge_parts, to_arrow, write_part
from hover_batch.taxonomy import CONSEP

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "nuclei"
FIELD = 1000
"""Side of the annotated images in pixels."""
MERGED = np.array([0, 1, 2, 3, 3, 4, 4, 4], np.uint8)
"""Merged class id, indexed by CoNSeP's class code."""


@dataclass(frozen=True)
class Cost:
    """Cost of one export. MB are millions of bytes."""

    nuclei: int
    """Number of exported nuclei."""
    seconds: float
    """Wall-clock time."""
    cpu_seconds: float
    """CPU time of the process, which depends little on other processes on the machine."""
    disk_mb: float
    """Size of the exported files."""
    peak_mb: float
    """Peak of the resident memory, minus the resident memory before the export."""

    @property
    def row(self) -> str:
        """Cells of a Markdown row: CPU seconds, seconds and MB per million nuclei, and peak memory in MB."""
        millions = self.nuclei / 1e6
        per_million = (self.cpu_seconds / millions, self.seconds / millions, self.disk_mb / millions)
        return " | ".join(f"{value:.0f}" for value in (*per_million, self.peak_mb))


def annotated_parts(folder: Path = DATA) -> list[pa.Table]:
    """Return one table of nuclei for each CoNSeP image in `folder`, with its corner at the origin.

    Nuclei and classes are those annotated; probabilities and stains are random.
    """
    with (folder / "dataset.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "consep"]
    return [_part(folder / row["labels"], folder / row["types"]) for row in rows]


def _part(labels: Path, types: Path) -> pa.Table:
    instances = cv2.imread(str(labels), cv2.IMREAD_UNCHANGED)
    kinds = cv2.imread(str(types), cv2.IMREAD_UNCHANGED)
    assert instances is not None and kinds is not None
    numbers, inverse = np.unique(instances, return_inverse=True)
    assert numbers[0] == 0
    layout = MapLayout(len(CONSEP.classes))
    random = np.random.default_rng(0)
    maps = random.integers(0, 60, (layout.planes, *instances.shape), np.uint8)
    maps[layout.NP] = np.where(instances > 0, 255, 0)
    maps[layout.tp] += np.uint8(190) * (np.arange(layout.n_types)[:, None, None] == MERGED[kinds])
    nuclei = measure(inverse.reshape(instances.shape).astype(np.int32), maps, layout)
    return to_arrow(nuclei, _context(1))


def _context(fields: int) -> TableContext:
    side = Size(fields * FIELD, fields * FIELD)
    mpp = Mpp(0.25, 0.25)
    bounds = Box(FIELD // 2, FIELD // 4, side.width, side.height)
    return TableContext("replicated", CONSEP, Grid(side, 1, 1, mpp, side), mpp, "file", bounds, "none", "0" * 64, "0")


def replicated_table(path: Path, nuclei: int, parts: list[pa.Table]) -> NucleiTable:
    """Write a table of exactly `nuclei` nuclei to `path`, and return it opened.

    The tables `parts`, as from `annotated_parts`, are repeated side by side on a square grid until there are enough
    nuclei; the last one is cut.
    """
    mean = sum(map(len, parts)) / len(parts)
    side = int(np.ceil(np.sqrt(nuclei / mean))) + 1
    part_files = []
    left = nuclei
    for row in range(side):
        shifted = []
        for column in range(side):
            part = parts[(row * side + column) % len(parts)].slice(0, left)
            shifted.append(_shifted(part, column * FIELD, row * FIELD))
            left -= len(part)
        part_file = path.with_name(f"{row}.part.parquet")
        write_part(part_file, pa.concat_tables(shifted))
        part_files.append((row, part_file))
    merged = merge_parts(part_files, path, _context(side))
    assert merged.nuclei == nuclei
    for _, part_file in part_files:
        part_file.unlink()
    return NucleiTable.open(path)


def _shifted(part: pa.Table, x: int, y: int) -> pa.Table:
    box = part["bbox"].combine_chunks()
    moved = {name: np.asarray(box.field(name)) + (x if name[0] == "x" else y) for name in box.type.names}
    polygons = shapely.transform(shapely.from_wkb(part["geometry"].to_numpy()), lambda points: points + [x, y])
    columns: dict[str, NDArray[np.generic] | pa.Array] = {
        "anchor_x": part["anchor_x"].to_numpy() + x,
        "anchor_y": part["anchor_y"].to_numpy() + y,
        "centroid_x": part["centroid_x"].to_numpy() + x,
        "centroid_y": part["centroid_y"].to_numpy() + y,
        "bbox": pa.StructArray.from_arrays(list(moved.values()), fields=list(box.type)),
        "geometry": pa.array(shapely.to_wkb(polygons), pa.binary()),
    }
    for name, values in columns.items():
        index = part.schema.get_field_index(name)
        part = part.set_column(index, part.schema.field(index), pa.array(values))
    return part


def cost_of(format: Format, table: Path, small: Path) -> Cost:
    """Return the cost of exporting `table`, in a new process that has exported the table `small` before.

    The exported files are deleted. `table`, `small`: paths of nuclei.parquet files.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_cost_in_this_process, format, table, small).result()


def _cost_in_this_process(format: Format, table: Path, small: Path) -> Cost:
    write = writer(format)
    with tempfile.TemporaryDirectory(dir=table.parent) as folder:
        write(NucleiTable.open(small), Path(folder) / f"small.{format.suffix}")
        nuclei, path = NucleiTable.open(table), Path(folder) / f"large.{format.suffix}"
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        resident_before, started, cpu_started = resident("VmRSS"), time.perf_counter(), time.process_time()
        write(nuclei, path)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        disk = sum(file.stat().st_size for file in files)
        return Cost(nuclei.rows, seconds, cpu_seconds, disk / 1e6, (resident("VmHWM") - resident_before) / 1e6)


def resident(field: str) -> int:
    """Return the bytes of resident memory of this process: now (`VmRSS`) or at its peak (`VmHWM`). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """Run the benchmark and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exports", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--nuclei", type=int, default=1_000_000, help="number of nuclei to export")
    parser.add_argument("--to", type=Format, action="append", help="measure only this format; repeat it for several")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = annotated_parts()
        small = replicated_table(folder / "small.parquet", 1000, parts).path
        table = replicated_table(folder / "nuclei.parquet", arguments.nuclei, parts).path
        costs = {format: cost_of(format, table, small) for format in arguments.to or Format}
        disk = table.stat().st_size / arguments.nuclei
    print("| --to | CPU seconds per million | seconds | MB per million | peak memory, MB |")
    print("|---|---|---|---|---|")
    for format, cost in costs.items():
        print(f"| {format} | {cost.row} |")
    print(f"\nnuclei.parquet itself: {disk:.0f} MB per million; {arguments.nuclei:,} nuclei were exported.")
    if arguments.json:
        result = {"parquet_mb_per_million": disk, "formats": {format: asdict(cost) for format, cost in costs.items()}}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
