"""Cost of viewing one million nuclei: start, memory, and tiles.

    python -m benchmarks.view [--json FILE] [--nuclei N]

The table is that of benchmarks.exports. Every tile is made once as in the server, in one thread; the time for HTTP and
for the browser is not included. The benchmark only reports numbers; it does not check them.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.exports import annotated_parts, replicated_table, resident
from hover_batch.export.read import NucleiTable
from hover_batch.view.nuclei import CELLS, NucleiTiles


def measured(tiles: Iterable[Callable[[], bytes | None]]) -> dict[str, float]:
    """Make the tiles, and return their number (`tiles`), and their median and largest time (ms) and size (KB).

    `tiles`: functions that return a tile's bytes, or None for an empty tile; at least one.
    """
    ms, kb = [], []
    for make in tiles:
        started = time.perf_counter()
        content = make()
        ms.append(1000 * (time.perf_counter() - started))
        kb.append(len(content or b"") / 1000)
    return {
        "tiles": len(ms),
        "ms": float(np.median(ms)),
        "most_ms": max(ms),
        "kb": float(np.median(kb)),
        "most_kb": max(kb),
    }


def costs(path: Path) -> dict[str, Any]:
    """Return the costs of viewing the table at `path`, as JSON values: of the start, then of each kind of request.

    The slide of the table must be square. To be called in a new process: memory that was freed after making the table
    would hide the memory of the view.
    """
    table = NucleiTable.open(path)
    resident_before, started, cpu_started = resident("VmRSS"), time.perf_counter(), time.process_time()
    view = NucleiTiles(table)
    result: dict[str, Any] = {
        "nuclei": table.rows,
        "start_s": time.perf_counter() - started,
        "start_cpu_s": time.process_time() - cpu_started,
        "held_mb": (resident("VmRSS") - resident_before) / 1e6,
        "peak_mb": (resident("VmHWM") - resident_before) / 1e6,
    }
    places = [(column, row) for row in range(view.rows) for column in range(view.columns)]
    result["contours"] = measured(partial(view.contours, *place) for place in places)
    level_of_one_tile = max(0, math.ceil(math.log2(table.level0.width / CELLS)))
    for level in range(5, level_of_one_tile + 1):
        side = -(-table.level0.width // (CELLS << level))  # in tiles
        places = [(column, row) for row in range(side) for column in range(side)]
        result[f"density, cells of {1 << level} px"] = measured(
            partial(view.density, level, *place) for place in places
        )
    ids = np.random.default_rng(0).integers(1, table.rows, 200)
    result["a row"] = measured(partial(_row, view, int(i)) for i in ids)
    return result


def _row(view: NucleiTiles, nucleus_id: int) -> bytes:
    return json.dumps(view.row(nucleus_id)).encode()


def main() -> None:
    """Run the benchmark and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.view", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--nuclei", type=int, default=1_000_000, help="number of nuclei in the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = replicated_table(Path(folder) / "nuclei.parquet", arguments.nuclei, annotated_parts())
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(costs, table.path).result()
    print(
        f"{result['nuclei']:,} nuclei: read in {result['start_s']:.1f} s ({result['start_cpu_s']:.1f} s of CPU time);",
        end=" ",
    )
    print(f"{result['held_mb']:.0f} MB of memory, {result['peak_mb']:.0f} MB at the peak.\n")
    print("| request | tiles | ms, median | ms, largest | KB, median | KB, largest |\n|---|---|---|---|---|---|")
    for name, cost in result.items():
        if isinstance(cost, dict):
            values = (cost["ms"], cost["most_ms"], cost["kb"], cost["most_kb"])
            print(f"| {name} | {cost['tiles']} | " + " | ".join(f"{value:.3g}" for value in values) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
