"""Speed of our post-processing and of tiatoolbox's HoVerNet post-processing on the same maps, with one thread each.

    python -m benchmarks.postprocess [--json FILE] [--repeats N]

Both compute instances with types, contours, centroids and bounding boxes; the other columns of our tables are timed
separately. Ours scales the Sobel maps by the extremes of the window, as the reference does; `fixed` is the default of a
run. Times are medians of CPU seconds from alternating runs; kernels are compiled before. The benchmark only reports
times; it does not check them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from benchmarks.exports import resident
from benchmarks.maps import SLIDE, real_maps, synthetic_maps
from hover_batch.model.heads import MapLayout
from hover_batch.model.package import find_package
from hover_batch.nuclei import measure as measuring
from hover_batch.nuclei.components import Components
from hover_batch.nuclei.outlines import outlines
from hover_batch.nuclei.watershed import SobelConstants, instance_map

Maps = NDArray[np.uint8]
"""Stored maps (plane, y, x) uint8."""


def ours(maps: Maps, layout: MapLayout, constants: SobelConstants | None) -> tuple[NDArray[np.int32], tuple[Any, ...]]:
    """Return the instances (y, x) int32 and their properties as from `placed`, as much as the reference computes.

    `constants`: Sobel constants; None: the extremes of the maps, as in the reference.
    """
    instances = instance_map(maps[layout.NP], maps[layout.H], maps[layout.V], constants)
    return instances, placed(instances, maps, layout)


def placed(instances: NDArray[np.int32], maps: Maps, layout: MapLayout) -> tuple[Any, ...]:
    """Return anchors (n, 2), bounds (n, 4), centroids (n, 2), types (n,) and contours of the n instances.

    Rows are ordered by instance id. Centroids are x, y in pixels, with pixel centres at +0. The type is the class of
    most pixels, without those of the background; 0 if there are no others.
    """
    anchor, bounds, first_moments, area, votes = measuring._places(instances, maps[layout.tp], int(instances.max()))
    class_votes = votes[:, 1:]
    types = np.where(class_votes.max(axis=1) > 0, class_votes.argmax(axis=1) + 1, 0)
    contours = outlines(instances, bounds, anchor[:, 0], area, (0, 0))
    return anchor, bounds, anchor + first_moments / area[:, None], types, contours


def extras(instances: NDArray[np.int32], maps: Maps, layout: MapLayout) -> None:
    """Compute the other columns of a table: shapes, class probabilities, scores and stains."""
    anchor, bounds, first_moments, area, _ = measuring._places(instances, maps[layout.tp], int(instances.max()))
    sums(instances, maps, layout, anchor, bounds)
    shapes(instances, bounds)


def sums(
    instances: NDArray[np.int32],
    maps: Maps,
    layout: MapLayout,
    anchor: NDArray[np.int64],
    bounds: NDArray[np.int64],
) -> None:
    """Compute the sums over pixels of probabilities, stains and moments.

    `anchor` (n, 2), `bounds` (n, 4): as from `placed`.
    """
    measuring._sums(
        instances, maps, anchor, bounds, layout.n_types, layout.NP, layout.tp.start, layout.hematoxylin, layout.eosin
    )


def shapes(instances: NDArray[np.int32], bounds: NDArray[np.int64]) -> None:
    """Compute perimeters and convex hulls. `bounds`: (n, 4), as from `placed`."""
    measuring._perimeter_pixels(instances, bounds)
    measuring._hull_pixels(instances, bounds)


class Reference:
    """tiatoolbox's HoVerNet post-processing, on maps in the form of tiatoolbox's own inference."""

    def __init__(self, maps: Maps, layout: MapLayout) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from tiatoolbox.models.architecture.hovernet import HoVerNet
        self._hovernet = HoVerNet
        self._np = maps[layout.NP, ..., None] / np.float32(256)
        self._hv = np.stack([maps[layout.H], maps[layout.V]], -1).view(np.int8).astype(np.float32) / 127
        self._types = maps[layout.tp].argmax(axis=0).astype(np.uint8)

    def instances(self) -> NDArray[np.int32]:
        """Return the instances (y, x) int32."""
        return np.asarray(self._hovernet._proc_np_hv(self._np, self._hv), np.int32)

    def nuclei(self, instances: NDArray[np.int32]) -> dict[int, dict[str, Any]]:
        """Return the type, contour, centroid and bounding box by instance id; tiny instances are left out."""
        by_id: dict[int, dict[str, Any]] = self._hovernet.get_instance_info(instances, self._types, verbose=False)
        return by_id

    def all(self) -> dict[int, dict[str, Any]]:
        """Return the result of both steps, the complete post-processing."""
        return self.nuclei(self.instances())


@dataclass(frozen=True)
class Agreement:
    """Agreement of our post-processing in window mode with the reference."""

    nuclei: int
    """Number of our nuclei."""
    differing_instances: int
    """Number of instances of either side that the other one does not have, pixel by pixel."""
    differing_types: int
    """Number of pairs with different types."""
    differing_places: int
    """Number of pairs with different bounding boxes, or centroids more than 1e-9 pixels apart."""
    differing_contours: int
    """Number of pairs with different contours, where the reference's contour is a valid polygon."""
    invalid_contours: int
    """Number of pairs where the reference has no contour or one that is not a valid polygon; ours always is valid."""

    @property
    def identical(self) -> bool:
        """Whether all differences are explained by invalid contours of the reference."""
        differing = self.differing_instances + self.differing_types + self.differing_places + self.differing_contours
        return differing == 0


def compare(maps: Maps, layout: MapLayout) -> Agreement:
    """Run both post-processings on the same maps, and count the differences.

    Instances with exactly the same pixels are a pair; types, places and contours are compared in pairs only.
    """
    reference = Reference(maps, layout)
    expected = reference.instances()
    expected_nuclei = reference.nuclei(expected)
    found, (_, bounds, centroids, types, contours) = ours(maps, layout, None)
    n_expected_ids = int(expected.max()) + 1
    overlaps, area = np.unique(found.astype(np.int64) * n_expected_ids + expected, return_counts=True)
    found_id, expected_id = overlaps // n_expected_ids, overlaps % n_expected_ids
    found_area, expected_area = np.bincount(found.ravel())[found_id], np.bincount(expected.ravel())[expected_id]
    same = (found_id > 0) & (expected_id > 0) & (area == found_area) & (area == expected_area)
    n_same = int(same.sum())
    differing_types = differing_places = differing_contours = invalid = 0
    for row, reference_id in zip((found_id[same] - 1).tolist(), expected_id[same].tolist(), strict=True):
        nucleus = expected_nuclei.get(reference_id)
        if nucleus is None:  # the reference drops nuclei with fewer than three contour points
            invalid += 1
            continue
        differing_types += int(nucleus["type"] != types[row])
        close = np.abs(nucleus["centroid"] - centroids[row]).max() <= 1e-9
        differing_places += int(not close or (nucleus["box"] != bounds[row]).any())
        contour = nucleus["contours"] + 0.5
        if shapely.Polygon(contour).is_valid:
            differing_contours += int(not np.array_equal(contours[row], [*contour, contour[0]]))
        else:
            invalid += 1
    return Agreement(
        nuclei=int(found.max()),
        differing_instances=(int(found.max()) - n_same) + (len(np.unique(expected)) - 1 - n_same),
        differing_types=differing_types,
        differing_places=differing_places,
        differing_contours=differing_contours,
        invalid_contours=invalid,
    )


def medians(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median CPU seconds of each function over `repeats` rounds, in which they run one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def steps(maps: Maps, layout: MapLayout) -> dict[str, Callable[[], Any]]:
    """Return the steps of our post-processing in window mode by name, as functions.

    Each uses results of the previous steps, which are computed here, so that it runs alone.
    """
    np_map, h, v = maps[layout.NP], maps[layout.H], maps[layout.V]
    components = Components.of(np_map)
    constants = SobelConstants.of_window(h, v)
    instances = constants.split(np.stack([h, v]), components, components.large)
    n = int(instances.max())
    anchor, bounds, _, area, _ = measuring._places(instances, maps[layout.tp], n)
    return {
        "components": lambda: Components.of(np_map),
        "extremes of the Sobel maps": lambda: SobelConstants.of_window(h, v),
        "energy, markers, flooding": lambda: constants.split(np.stack([h, v]), components, components.large),
        "area, centroid, box, type": lambda: measuring._places(instances, maps[layout.tp], n),
        "contours": lambda: outlines(instances, bounds, anchor[:, 0], area, (0, 0)),
        "extra: probabilities, stain, moments": lambda: sums(instances, maps, layout, anchor, bounds),
        "extra: perimeter, convex hull": lambda: shapes(instances, bounds),
    }


def measure_field(maps: Maps, layout: MapLayout, repeats: int) -> dict[str, Any]:
    """Return all results for one field, as JSON values.

    Times are CPU seconds per million pixels; ratios are the reference's time divided by ours.
    """
    mpx = maps[0].size / 1e6
    fixed = SobelConstants(**find_package("starter").card.sobel)
    reference = Reference(maps, layout)
    instances = reference.instances()
    for constants in (None, fixed):  # compile the kernels
        extras(ours(maps, layout, constants)[0], maps, layout)
    seconds = medians(
        {
            "ours": lambda: ours(maps, layout, None),
            "ours_fixed": lambda: ours(maps, layout, fixed),
            "ours_whole_table": lambda: _whole_table(maps, layout),
            "tiatoolbox_instances": reference.instances,
            "tiatoolbox_nuclei": lambda: reference.nuclei(instances),
        },
        repeats,
    )
    seconds["tiatoolbox"] = seconds["tiatoolbox_instances"] + seconds["tiatoolbox_nuclei"]
    per_mpx = {name: value / mpx for name, value in seconds.items()}
    agreement = compare(maps, layout)
    return {
        "pixels": maps[0].size,
        "identical": agreement.identical,
        "agreement": asdict(agreement),
        "ratio_tiatoolbox": per_mpx["tiatoolbox"] / per_mpx["ours"],
        "ratio_tiatoolbox_fixed": per_mpx["tiatoolbox"] / per_mpx["ours_fixed"],
        "seconds_per_mpx": per_mpx,
        "steps_seconds_per_mpx": {name: value / mpx for name, value in medians(steps(maps, layout), repeats).items()},
        "throughput_mpx_per_second": throughput(maps, layout),
        "peak_bytes_per_pixel": {
            program: peak_bytes(maps, layout, program) / maps[0].size
            for program in ("ours", "ours_whole_table", "tiatoolbox")
        },
    }


_start: Any = None
"""In a worker process: the barrier at which all workers start together."""


def throughput(maps: Maps, layout: MapLayout, rounds: int = 4) -> dict[str, float]:
    """Return the throughput of complete tables in Mpx per second, with one process (`1`) and with two (`2`).

    `threads` is the CPU time of one process divided by its wall-clock time: 1 if it uses a single thread. `rounds`:
    tables per process.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "maps.npy"
        np.save(file, maps)
        results: dict[str, float] = {}
        for workers in (1, 2):
            context = multiprocessing.get_context("spawn")
            start = context.Barrier(workers)
            with ProcessPoolExecutor(workers, context, _share_barrier, (start,)) as pool:
                jobs = [pool.submit(_tables_in_this_process, file, layout, rounds) for _ in range(workers)]
                times = [job.result() for job in jobs]
            wall, cpu = (max(seconds) for seconds in zip(*times, strict=True))
            results[f"{workers}"] = workers * rounds * maps[0].size / 1e6 / wall
            if workers == 1:
                results["threads"] = cpu / wall
    return results


def _share_barrier(barrier: Any) -> None:
    global _start
    _start = barrier


def _tables_in_this_process(file: Path, layout: MapLayout, rounds: int) -> tuple[float, float]:
    """Return the wall-clock and CPU seconds of `rounds` tables, started when all processes are ready."""
    cv2.setNumThreads(1)  # as tasks do; OpenMP follows OMP_NUM_THREADS, and no kernel here uses it
    maps: Maps = np.load(file)
    _whole_table(np.ascontiguousarray(maps[:, :256, :256]), layout)
    _start.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        _whole_table(maps, layout)
    return time.perf_counter() - wall, time.process_time() - cpu


def _whole_table(maps: Maps, layout: MapLayout) -> None:
    fixed = SobelConstants(**find_package("starter").card.sobel)
    measuring.measure(instance_map(maps[layout.NP], maps[layout.H], maps[layout.V], fixed), maps, layout)


def peak_bytes(maps: Maps, layout: MapLayout, program: str) -> int:
    """Return the peak of the resident memory, minus that before, in a new process that has loaded the maps.

    `program`: `ours`, `ours_whole_table` or `tiatoolbox`; it has processed a small field before.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "maps.npy"
        np.save(file, maps)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_peak_in_this_process, file, layout, program).result()


def _peak_in_this_process(file: Path, layout: MapLayout, program: str) -> int:
    cv2.setNumThreads(1)
    maps: Maps = np.load(file)
    small = np.ascontiguousarray(maps[:, :256, :256])

    def work_on(field: Maps) -> Callable[[], Any]:
        if program == "tiatoolbox":
            return Reference(field, layout).all
        if program == "ours":
            return lambda: ours(field, layout, None)
        return lambda: _whole_table(field, layout)

    work_on(small)()
    work = work_on(maps)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    kept = work()
    peak = resident("VmHWM")
    del kept
    return peak - before


def table(fields: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table with one column per field.

    `fields`: title of a field → its results, as from `measure_field`.
    """

    def row(title: str, value: Callable[[dict[str, Any]], str]) -> str:
        return f"| {title} | " + " | ".join(value(field) for field in fields.values()) + " |"

    def ms(kind: str, name: str) -> Callable[[dict[str, Any]], str]:
        return lambda field: f"{1000 * field[kind][name]:.1f}"

    first = next(iter(fields.values()))
    return "\n".join(
        [
            f"| | {' | '.join(fields)} |",
            "|---|" + "---|" * len(fields),
            row("nuclei", lambda field: str(field["agreement"]["nuclei"])),
            row("identical to tiatoolbox's", lambda field: "yes" if field["identical"] else "**no**"),
            row("tiatoolbox, ms/Mpx", ms("seconds_per_mpx", "tiatoolbox")),
            row("– instances", ms("seconds_per_mpx", "tiatoolbox_instances")),
            row("– type, contour, centroid, box", ms("seconds_per_mpx", "tiatoolbox_nuclei")),
            row("ours, equal outputs, ms/Mpx", ms("seconds_per_mpx", "ours")),
            row("**times faster**", lambda field: f"**{field['ratio_tiatoolbox']:.1f}**"),
            *(row(f"– {name}", ms("steps_seconds_per_mpx", name)) for name in first["steps_seconds_per_mpx"]),
            row("ours with `fixed` constants, ms/Mpx", ms("seconds_per_mpx", "ours_fixed")),
            row("the same and all columns of the table, ms/Mpx", ms("seconds_per_mpx", "ours_whole_table")),
            row("Mpx per second, one process", lambda field: f"{field['throughput_mpx_per_second']['1']:.1f}"),
            row("Mpx per second, two processes", lambda field: f"{field['throughput_mpx_per_second']['2']:.1f}"),
            row(
                "CPU seconds per second, one process",
                lambda field: f"{field['throughput_mpx_per_second']['threads']:.2f}",
            ),
            row("peak memory, ours, bytes per pixel", lambda field: f"{field['peak_bytes_per_pixel']['ours']:.0f}"),
            row(
                "peak memory, `fixed` and all columns, bytes per pixel",
                lambda field: f"{field['peak_bytes_per_pixel']['ours_whole_table']:.0f}",
            ),
            row(
                "peak memory, tiatoolbox, bytes per pixel",
                lambda field: f"{field['peak_bytes_per_pixel']['tiatoolbox']:.0f}",
            ),
        ]
    )


def main() -> None:
    """Run the benchmark and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.postprocess", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--repeats", type=int, default=5, help="number of rounds; medians are reported")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    fields: dict[str, dict[str, Any]] = {}
    if SLIDE.is_file():
        fields["TCGA, 2048², starter's maps"] = measure_field(*real_maps(), arguments.repeats)
    else:
        print(f"{SLIDE.name} is not in ../shared/data: using only the synthetic field", file=sys.stderr)
    fields["synthetic, 2048², crowded"] = measure_field(*synthetic_maps(), arguments.repeats)
    print(table(fields))
    if arguments.json:
        result = {
            "identical": all(field["identical"] for field in fields.values()),
            "ratio_tiatoolbox": min(field["ratio_tiatoolbox"] for field in fields.values()),
            "fields": fields,
        }
        arguments.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
