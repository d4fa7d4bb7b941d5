"""Cost of questions about a data set, asked as `hover_batch.open_cohort` and `hover-batch cohort` ask them.

    python -m benchmarks.questions DATASET [--json FILE]

`python -m benchmarks.dataset` makes a data set of ten million nuclei and asks these questions at its end. The benchmark
only reports numbers; it does not check them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.exports import resident
from hover_batch.dataset.near import NearQuestion
from hover_batch.dataset.opened import Dataset
from hover_batch.dataset.questions import Subject, counts_sql

WINDOW = 4096
"""Side of the window that is asked for, in level-0 pixels."""
WITHIN = 20.0
"""Distance of neighbours in µm."""
_REPEATS = 5


def questions(dataset: Path) -> dict[str, Any]:
    """Return the cost of each question, as JSON values by name; seconds are medians, except for neighbours."""
    with Dataset(dataset) as opened:
        subject = Subject.of(opened, None, without_flagged=False)
        entry = max(opened.entries, key=lambda entry: entry.nuclei_rows)
        x, y = entry.level0_width / 2, entry.level0_height / 2
        box = (x, y, x + WINDOW, y + WINDOW)
        by_patient = counts_sql(subject, "patient_id")
        by_type = (
            "SELECT patient_id, type, count(*) FROM nuclei JOIN slides USING (slide_id, model) "
            "WHERE type_prob > 0.5 GROUP BY ALL"
        )
        return {
            "slides": len(opened.entries),
            "nuclei": sum(entry.nuclei_rows for entry in opened.entries),
            "open": _cost(lambda: _opened(dataset)),
            "counts_by_patient": _cost(lambda: opened.sql(by_patient)),
            "nuclei_by_patient_and_type": _cost(lambda: opened.sql(by_type)),
            "window": {**_cost(lambda: opened.window(entry.slide_id, box)), "nuclei_of_slide": entry.nuclei_rows},
            "neighbours": _neighbours(subject),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        }


def _opened(dataset: Path) -> list[str]:
    with Dataset(dataset) as opened:
        return opened.notes


def _cost(ask: Callable[[], Any]) -> dict[str, float]:
    """Return the median seconds and CPU seconds of a question, without the first time, and the number of rows."""
    rows = len(ask())
    seconds, cpu_seconds = [], []
    for _ in range(_REPEATS):
        started, cpu_started = time.perf_counter(), time.process_time()
        ask()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    return {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu_seconds), "rows": rows}


def _neighbours(subject: Subject) -> dict[str, float]:
    """Return the cost of `cohort near` by patient, for the two most frequent classes."""
    [(of, n_of), (to, n_to)] = subject.dataset.select(
        "SELECT type, count(*) AS n FROM nuclei GROUP BY type ORDER BY n DESC LIMIT 2"
    ).fetchall()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    resident_before, started, cpu_started = resident("VmRSS"), time.perf_counter(), time.process_time()
    rows = NearQuestion(subject, of, to, WITHIN, "patient_id").answer(list).fetchall()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "peak_mb": (resident("VmHWM") - resident_before) / 1e6,
        "nuclei_of": n_of,
        "nuclei_to": n_to,
        "near": sum(row[3] for row in rows),
        "rows": len(rows),
    }


def main() -> None:
    """Run the benchmark and print its results as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.questions", description=__doc__)
    parser.add_argument("dataset", type=Path, help="folder of a data set")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    text = json.dumps(questions(arguments.dataset), indent=2) + "\n"
    print(text, end="")
    if arguments.json:
        arguments.json.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
