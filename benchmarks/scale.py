"""Scaling of cohorts on Ray: a thousand slides with one driver, and one to eight networks.

    scripts/loopback uv run python -m benchmarks.scale {cohort,killed,headers,networks} --json FILE [--slides N]

Networks are simulated: they occupy their device by sleeping, like a GPU that works while the cores are free. Nodes are
logical nodes of a Ray cluster on this machine, started by tests/executor/several_nodes.py. The benchmark only reports
numbers; it does not check them.

`cohort`: slides of one unit that takes a second, with two networks.
`killed`: slides of one quick unit, uninterrupted; then with the driver killed (kill -9) halfway, and resumed.
`headers`: CPU time and memory of the driver for planning each slide, without Ray.
`networks`: 1, 2, 4 and 8 nodes with one GPU each. Units take several seconds, so that the CPU work for them (reported
with the result) is negligible although all nodes share the few cores of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hover_batch.cohort.events import stream_events
from hover_batch.cohort.manifest import read_cohort
from hover_batch.model.package import find_package
from hover_batch.plan import plan_cohort
from hover_batch.slide.example import write_example

ROOT = Path(__file__).resolve().parents[1]
NODES = ROOT / "tests" / "executor"
UNIT = 256
"""Side of a unit in pixels: one tile, and therefore one batch."""
UNITS_EACH = 16
"""Number of units per network in `networks`."""
WORKERS_SEE_S = 10.0
"""Seconds for workers to notice that their driver has died; then the rest of the cluster is killed."""


def write_cohort(folder: Path, slides: int, side: int) -> Path:
    """Write `slides` images of side × side pixels with dark discs to `folder`; return the path of their cohort.csv."""
    random = np.random.default_rng(0)
    for number in range(slides):
        picture = np.full((side, side, 3), 230, np.uint8)
        for x, y, radius in random.integers((0, 0, 6), (side, side, 14), (side * side // 7000, 3)):
            cv2.circle(picture, (int(x), int(y)), int(radius), (140, 60, 90), -1)
        cv2.imwrite(str(folder / f"s{number:04d}.png"), picture)
    rows = "".join(f"s{number:04d}.png,0.25\n" for number in range(slides))
    (folder / "cohort.csv").write_text("path,mpp\n" + rows)
    return folder / "cohort.csv"


def start(cohort: Path, out: Path, **settings: Any) -> subprocess.Popen[str]:
    """Start a run of the cohort on a new cluster, and return its process, which leads a process group of its own.

    `out`: output folder of the run; a plan file is written next to it. `settings`: further entries of the plan, as
    several_nodes.py reads it.
    """
    plan = out.with_suffix(".plan.json")
    plan.write_text(json.dumps({"cohort": str(cohort), "out": str(out), "unit": UNIT, "events": [], **settings}))
    return subprocess.Popen(
        [sys.executable, NODES / "several_nodes.py", plan],
        env={"PATH": os.defpath, "PYTHONPATH": f"{NODES}:{ROOT}", "HOME": str(out.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
        start_new_session=True,
    )


def wait_for(run: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for the run, and return the measurements that it prints. Raises SystemExit if it has failed."""
    printed, _ = run.communicate()
    if run.returncode:
        raise SystemExit(f"the run ended with {run.returncode}: {printed}")
    measurements: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return measurements


def events(out: Path, name: str) -> list[dict[str, Any]]:
    """Return the events called `name`, in order, from the log of the run in the folder `out`."""
    return [event for event in stream_events(out / "logs" / "events.jsonl") if event["event"] == name]


def predicted_units(out: Path) -> list[dict[str, Any]]:
    """Return the `unit_done` events of the units that a network predicted, in order."""
    return [event for event in events(out, "unit_done") if "infer" in event["spans"]]


def tables(out: Path) -> dict[str, bytes]:
    """Return the bytes of each nuclei.parquet by slide id."""
    return {path.parent.name: path.read_bytes() for path in out.glob("slides/*/nuclei.parquet")}


def steady_state(units: list[dict[str, Any]], networks: int) -> dict[str, float]:
    """Return units per second, busy fraction of the networks, and overhead, over the middle half of the units.

    In that time all networks are running, and none has run out of work. `units`: events as from `predicted_units`. The
    overhead is the idle time of the networks divided by their busy time.
    """
    ends = sorted(event["spans"]["infer"][1] for event in units)
    first, last = len(ends) // 4, 3 * len(ends) // 4
    rate = (last - first) / (ends[last] - ends[first])
    busy = rate * statistics.mean(event["seconds"]["infer"] for event in units) / networks
    return {"units_per_second": rate, "busy": busy, "overhead": 1 / busy - 1}


def whole_cohort(cohort: Path, folder: Path, seconds: float, networks: int) -> dict[str, Any]:
    """Run a cohort of slides of one unit, and return throughput, memory and CPU time of the driver, and output sizes.

    `folder`: the output is written to `folder`/out. `seconds`: duration of a unit in a network. `networks`: number of
    networks. Memory is compared between the second and the last quarter of the run.
    """
    out = folder / "out"
    measurements = wait_for(start(cohort, out, gpus=networks, cpus=2, nodes=1, seconds=seconds))
    units, samples = predicted_units(out), measurements["samples"]
    finished = [event["slide_id"] for event in events(out, "slide_done")]
    quarter = len(samples) // 4
    quarters = {"second": samples[quarter : 2 * quarter], "last": samples[-quarter:]}
    files = [path for path in out.glob("slides/**/*") if path.is_file()]
    first, last = samples[quarter], samples[-1]
    units_between = sum(first["time"] < event["spans"]["infer"][1] <= last["time"] for event in units)
    return {
        "slides": len(finished),
        "networks": networks,
        "unit_seconds": seconds,
        "wall_seconds": measurements["seconds"],
        "busy_start_and_end_included": measurements["busy"],
        **steady_state(units, networks),
        "driver_mb": {name: statistics.median(s["rss"] for s in part) / 1e6 for name, part in quarters.items()},
        "object_store_mb": {name: max(s["store"] for s in part) / 1e6 for name, part in quarters.items()},
        "driver_cpu_ms_per_slide": 1e3 * (last["cpu"] - first["cpu"]) / units_between,
        "finished_before_an_earlier_slide": sum(slide < max(finished[:i]) for i, slide in enumerate(finished) if i),
        "files_per_slide": len(files) / len(finished),
        "event_bytes_per_slide": (out / "logs" / "events.jsonl").stat().st_size / len(finished),
        "cores_seconds_per_unit": core_seconds_per_unit(out),
    }


def core_seconds_per_unit(out: Path) -> float:
    """Return the seconds of all stages but the network's, as recorded in the events, divided by the predicted units."""
    recorded = [*events(out, "unit_done"), *events(out, "region_done")]
    seconds: float = sum(value for event in recorded for stage, value in event["seconds"].items() if stage != "infer")
    return seconds / len(predicted_units(out))


def killed_and_resumed(cohort: Path, folder: Path, seconds: float, networks: int) -> dict[str, Any]:
    """Kill the driver (kill -9) when half of the slides are done, run again, and compare with an uninterrupted run.

    Arguments as for `whole_cohort`. The outputs are written to `folder`/whole and `folder`/killed.
    """
    settings = {"gpus": networks, "cpus": 2, "nodes": 1, "seconds": seconds}
    wait_for(start(cohort, folder / "whole", **settings))
    reference, out = tables(folder / "whole"), folder / "killed"
    slides = len(reference)
    run = start(cohort, out, **settings)
    while len(events(out, "slide_done")) < slides // 2:
        if run.poll() is not None:
            raise SystemExit(f"the run ended before it could be killed: {run.communicate()[0]}")
        time.sleep(0.5)
    run.kill()
    run.wait()
    time.sleep(WORKERS_SEE_S)
    os.killpg(run.pid, signal.SIGKILL)
    if run.stdout:
        run.stdout.close()
    before, markers = predicted_units(out), len(list(out.glob("slides/*/markers/*.json")))
    finished = len(events(out, "slide_done"))
    resumed_at = time.time()
    wait_for(start(cohort, out, **settings))
    after = predicted_units(out)[len(before) :]
    predictions = Counter((event["slide_id"], event["column"], event["row"]) for event in before + after)
    return {
        "slides": slides,
        "finished_when_killed": finished,
        "units_told_of_when_killed": len(before),
        "markers_when_killed": markers,
        "units_predicted_after": len(after),
        "most_units_in_flight": 3 * networks,
        "units_predicted_twice": sum(n - 1 for n in predictions.values()),
        "units_with_a_marker_predicted_again": len(after) - (slides - markers),
        "seconds_to_the_next_unit": min(event["spans"]["infer"][1] for event in after) - resumed_at,
        "tables_as_of_the_whole_run": tables(out) == reference,
    }


def headers(folder: Path, slides: int) -> dict[str, Any]:
    """Return the CPU milliseconds for planning one slide, and the bytes of memory that its plan occupies.

    The slides are `slides` links to a pyramidal TIFF of 1000² pixels; all are written to `folder`.
    """
    slide, card = write_example(folder).parent / "he_0.25.tif", find_package("starter").card
    for number in range(slides):
        (folder / f"s{number:06d}.tif").hardlink_to(slide)
    cohort = str(folder / "many.csv")
    (folder / "many.csv").write_text("path\n" + "".join(f"s{number:06d}.tif\n" for number in range(slides)))
    plan_cohort(read_cohort(cohort), card)  # fills caches and imports modules
    started = time.process_time()
    planned = plan_cohort(read_cohort(cohort), card)
    spent = time.process_time() - started
    del planned
    tracemalloc.start()
    planned = plan_cohort(read_cohort(cohort), card)
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(planned.slides) == slides
    return {"slides": slides, "core_ms_per_slide": 1000 * spent / slides, "bytes_per_slide": kept_bytes / slides}


def networks(folder: Path, seconds: float, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Run a cohort with each number of networks, and return their throughputs, also relative to the first one.

    Each result is also printed. `folder`: for the cohorts and outputs. `seconds`: duration of a unit in a network.
    `counts`: numbers of networks, each on a node of its own.
    """
    rows: list[dict[str, Any]] = []
    for count in counts:
        (folder / f"n{count}").mkdir()
        cohort = write_cohort(folder / f"n{count}", count, UNIT * round(UNITS_EACH**0.5))
        out = folder / f"n{count}" / "out"
        measurements = wait_for(start(cohort, out, gpus=1, cpus=2, nodes=count, seconds=seconds))
        units = predicted_units(out)
        steady = steady_state(units, count)
        rate_per_network = steady["units_per_second"] / count
        rows.append(
            {
                "networks": count,
                "units": len(units),
                "unit_seconds": seconds,
                **steady,
                "of_linear": rate_per_network * rows[0]["networks"] / rows[0]["units_per_second"] if rows else 1.0,
                "busy_start_and_end_included": measurements["busy"],
                "cores_seconds_per_unit": core_seconds_per_unit(out),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Run one of the benchmarks and print its result as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["cohort", "killed", "networks", "headers"])
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--slides", type=int, default=1000, help="number of slides (not for `networks`)")
    parser.add_argument(
        "--seconds", type=float, help="duration of a unit in a network; default: 4 for `networks`, else 1"
    )
    parser.add_argument(
        "--networks",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="numbers of networks; `cohort` and `killed` use the second one",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, seconds = Path(name), arguments.seconds
        if arguments.what == "networks":
            result: dict[str, Any] = {"networks": networks(folder, seconds or 4.0, arguments.networks)}
        elif arguments.what == "headers":
            result = {"headers": headers(folder, arguments.slides)}
        else:
            cohort = write_cohort(folder, arguments.slides, UNIT)
            measure = whole_cohort if arguments.what == "cohort" else killed_and_resumed
            result = {arguments.what: measure(cohort, folder, seconds or 1.0, arguments.networks[1])}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
