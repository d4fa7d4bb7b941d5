"""How a cohort scales on Ray: a thousand slides through one driver, and one network to eight.

    scripts/loopback uv run python -m benchmarks.scale {cohort,killed,headers,networks} --json FILE [--slides N]

A network is simulated: it holds its device by sleeping, as a GPU would while the cores are free. Machines are logical
nodes of a Ray cluster on this one, started by tests/executor/several_nodes.py. Nothing here judges the numbers.

`cohort`: slides of one unit of a second, on two networks.
`killed`: slides of one quick unit. Once whole; then with the driver killed (kill -9) in the middle, and resumed.
`headers`: what planning takes of the driver for each slide; without Ray.
`networks`: 1, 2, 4 and 8 nodes with a GPU each, units of some seconds: so long that what the cores do for them (it is
told beside the result) is little on a machine whose few cores stand for those of eight.
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

from hover_batch.cohort.events import read_events
from hover_batch.cohort.manifest import read_cohort
from hover_batch.model.package import find_package
from hover_batch.plan import plan_cohort
from hover_batch.slide.example import write_example

ROOT = Path(__file__).resolve().parents[1]
NODES = ROOT / "tests" / "executor"
UNIT = 256
"""Side of a unit in pixels: one tile, hence one batch."""
UNITS_EACH = 16
"""Units for each network in `networks`."""
WORKERS_SEE_S = 10.0
"""After a driver's death, for its workers to see it; then what is left of the cluster is ended, too."""


def write_cohort(folder: Path, slides: int, side: int) -> Path:
    """Pictures of side² pixels, dark discs on pale ground, and their cohort.csv."""
    random = np.random.default_rng(0)
    for number in range(slides):
        picture = np.full((side, side, 3), 230, np.uint8)
        for x, y, radius in random.integers((0, 0, 6), (side, side, 14), (side * side // 7000, 3)):
            cv2.circle(picture, (int(x), int(y)), int(radius), (140, 60, 90), -1)
        cv2.imwrite(str(folder / f"s{number:04d}.png"), picture)
    rows = "".join(f"s{number:04d}.png,0.25\n" for number in range(slides))
    (folder / "cohort.csv").write_text("path,mpp\n" + rows)
    return folder / "cohort.csv"


def start(cohort: Path, out: Path, **plan: Any) -> subprocess.Popen[str]:
    """The cohort on a cluster of its own: see several_nodes.py for the plan."""
    path = out.with_suffix(".plan.json")
    path.write_text(json.dumps({"cohort": str(cohort), "out": str(out), "unit": UNIT, "events": [], **plan}))
    return subprocess.Popen(
        [sys.executable, NODES / "several_nodes.py", path],
        env={"PATH": os.defpath, "PYTHONPATH": f"{NODES}:{ROOT}", "HOME": str(out.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
        start_new_session=True,
    )


def ended(run: subprocess.Popen[str]) -> dict[str, Any]:
    printed, _ = run.communicate()
    if run.returncode:
        raise SystemExit(f"the run ended with {run.returncode}: {printed}")
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def events(out: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(out / "logs" / "events.jsonl") if event["event"] == name]


def predicted(out: Path) -> list[dict[str, Any]]:
    """The units that a network predicted, as they were told of."""
    return [event for event in events(out, "unit_done") if "infer" in event["spans"]]


def tables(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in out.glob("slides/*/nuclei.parquet")}


def steady(units: list[dict[str, Any]], networks: int) -> dict[str, float]:
    """Over the middle half of the units, when all networks are up and none has run out of work."""
    ends = sorted(event["spans"]["infer"][1] for event in units)
    first, last = len(ends) // 4, 3 * len(ends) // 4
    rate = (last - first) / (ends[last] - ends[first])
    busy = rate * statistics.mean(event["seconds"]["infer"] for event in units) / networks
    return {"units_per_second": rate, "busy": busy, "overhead": 1 / busy - 1}


def whole_cohort(cohort: Path, folder: Path, seconds: float, networks: int) -> dict[str, Any]:
    """The driver's memory and time, what Ray costs beside the networks' own time, and what is written."""
    out = folder / "out"
    found = ended(start(cohort, out, gpus=networks, cpus=2, nodes=1, seconds=seconds))
    units, samples = predicted(out), found["samples"]
    done = [event["slide_id"] for event in events(out, "slide_done")]
    quarter = len(samples) // 4
    parts = {"second": samples[quarter : 2 * quarter], "last": samples[-quarter:]}
    files = [path for path in out.glob("slides/**/*") if path.is_file()]
    begun, over = samples[quarter], samples[-1]
    between = sum(begun["time"] < event["spans"]["infer"][1] <= over["time"] for event in units)
    return {
        "slides": len(done),
        "networks": networks,
        "unit_seconds": seconds,
        "wall_seconds": found["seconds"],
        "busy_start_and_end_included": found["busy"],
        **steady(units, networks),
        "driver_mb": {name: statistics.median(s["rss"] for s in part) / 1e6 for name, part in parts.items()},
        "object_store_mb": {name: max(s["store"] for s in part) / 1e6 for name, part in parts.items()},
        "driver_cpu_ms_per_slide": 1e3 * (over["cpu"] - begun["cpu"]) / between,
        "finished_before_an_earlier_slide": sum(b < max(done[:i]) for i, b in enumerate(done) if i),
        "files_per_slide": len(files) / len(done),
        "event_bytes_per_slide": (out / "logs" / "events.jsonl").stat().st_size / len(done),
        "cores_seconds_per_unit": cores_of(out),
    }


def cores_of(out: Path) -> float:
    """Seconds of all stages but the network's, told by the events, over the units."""
    told = [*events(out, "unit_done"), *events(out, "region_done")]
    busy: float = sum(value for event in told for stage, value in event["seconds"].items() if stage != "infer")
    return busy / len(predicted(out))


def killed_and_resumed(cohort: Path, folder: Path, seconds: float, networks: int) -> dict[str, Any]:
    """kill -9 of the driver when half of the slides are done, and the same run again."""
    plan = {"gpus": networks, "cpus": 2, "nodes": 1, "seconds": seconds}
    ended(start(cohort, folder / "whole", **plan))
    reference, out = tables(folder / "whole"), folder / "killed"
    slides = len(reference)
    run = start(cohort, out, **plan)
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
    before, markers = predicted(out), len(list(out.glob("slides/*/markers/*.json")))
    finished = len(events(out, "slide_done"))
    struck = time.time()
    ended(start(cohort, out, **plan))
    after = predicted(out)[len(before) :]
    twice = Counter((event["slide_id"], event["column"], event["row"]) for event in before + after)
    return {
        "slides": slides,
        "finished_when_killed": finished,
        "units_told_of_when_killed": len(before),
        "markers_when_killed": markers,
        "units_predicted_after": len(after),
        "most_units_in_flight": 3 * networks,
        "units_predicted_twice": sum(n - 1 for n in twice.values()),
        "units_with_a_marker_predicted_again": len(after) - (slides - markers),
        "seconds_to_the_next_unit": min(event["spans"]["infer"][1] for event in after) - struck,
        "tables_as_of_the_whole_run": tables(out) == reference,
    }


def headers(folder: Path, slides: int) -> dict[str, Any]:
    """CPU milliseconds for each slide, a pyramidal TIFF of 1000² pixels, before anything runs, and bytes kept of it."""
    slide, card = write_example(folder).parent / "he_0.25.tif", find_package("starter").card
    for number in range(slides):
        (folder / f"s{number:06d}.tif").hardlink_to(slide)
    cohort = str(folder / "many.csv")
    (folder / "many.csv").write_text("path\n" + "".join(f"s{number:06d}.tif\n" for number in range(slides)))
    plan_cohort(read_cohort(cohort), card)  # what is imported and cached
    started = time.process_time()
    planned = plan_cohort(read_cohort(cohort), card)
    spent = time.process_time() - started
    del planned
    tracemalloc.start()
    planned = plan_cohort(read_cohort(cohort), card)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(planned.slides) == slides
    return {"slides": slides, "core_ms_per_slide": 1000 * spent / slides, "bytes_per_slide": held / slides}


def networks(folder: Path, seconds: float, counts: Sequence[int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for count in counts:
        (folder / f"n{count}").mkdir()
        cohort = write_cohort(folder / f"n{count}", count, UNIT * round(UNITS_EACH**0.5))
        out = folder / f"n{count}" / "out"
        found = ended(start(cohort, out, gpus=1, cpus=2, nodes=count, seconds=seconds))
        units = predicted(out)
        found_steady = steady(units, count)
        rate = found_steady["units_per_second"] / count
        rows.append(
            {
                "networks": count,
                "units": len(units),
                "unit_seconds": seconds,
                **found_steady,
                "of_linear": rate * rows[0]["networks"] / rows[0]["units_per_second"] if rows else 1.0,
                "busy_start_and_end_included": found["busy"],
                "cores_seconds_per_unit": cores_of(out),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["cohort", "killed", "networks", "headers"])
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--slides", type=int, default=1000, help="of all but `networks`")
    parser.add_argument(
        "--seconds", type=float, help="of a unit in a network; default: 1 for `cohort`, 4 for `networks`"
    )
    parser.add_argument(
        "--networks", type=int, nargs="+", default=[1, 2, 4, 8], help="counts; `cohort` uses the second"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, seconds = Path(name), arguments.seconds
        if arguments.what == "networks":
            result: dict[str, Any] = {"networks": networks(folder, seconds or 4.0, arguments.networks)}
        elif arguments.what == "headers":
            result = {"headers": headers(folder, arguments.slides)}
        else:
            cohort, measure = write_cohort(folder, arguments.slides, UNIT), killed_and_resumed
            if arguments.what == "cohort":
                measure = whole_cohort
            result = {arguments.what: measure(cohort, folder, seconds or 1.0, arguments.networks[1])}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
