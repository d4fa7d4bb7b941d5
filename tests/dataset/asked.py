"""A data set of nine slides of seven patients, to be asked questions, and what its runs say themselves."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from dataset_runs import MadeRun
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.dataset.update import add_run
from hover_batch.geometry import Size

SLIDES = {
    "s1": ("001", "a", 120),
    "s2": ("001", "a", 60),
    "s3": ("002", "a", 200),
    "s4": ("007", "a", 150),
    "s5": ("010", "b", 400),
    "s6": ("011", "b", 500),
    "s7": ("012", "b", 450),
    "s8": ("012", "b", 0),
    "s9": ("", "", 100),
}
"""patient_id, group and number of nuclei of each slide. A slide without nuclei has a quality flag."""
PATIENTS = sorted({patient for patient, _, _ in SLIDES.values() if patient})
"""Sorted patient_ids of the slides."""


@dataclass(frozen=True)
class Asked:
    """A data set, and the run that it was made from."""

    root: Path
    run: MadeRun

    def nuclei(self) -> pd.DataFrame:
        """All nuclei of the run, with the patient and the group of their slides."""
        tables = [self.run.table(slide_id).to_pandas() for slide_id in SLIDES]
        nuclei = pd.concat(tables, ignore_index=True)
        slides = pd.DataFrame.from_dict(SLIDES, orient="index", columns=["patient_id", "group", "rows"])
        return nuclei.join(slides, on="slide_id")


def make(folder: Path, nuclei: Any, size: Size, groups: dict[str, str] | None = None, **put: Any) -> Asked:
    """Make the data set. `groups`: what is written for a and b. `put`: for `MadeRun.put`."""
    run = MadeRun(folder / "run", nuclei, size)
    for seed, (slide_id, (_, _, rows)) in enumerate(SLIDES.items()):
        run.put(slide_id, rows, seed=seed, **put)
    with run.layout.slides_csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "slide_id", "patient_id", "group", "row", "status"])
        for row, (slide_id, (patient, group, _)) in enumerate(SLIDES.items(), start=2):
            writer.writerow(
                [f"/slides/{slide_id}.svs", slide_id, patient, (groups or {}).get(group, group), row, "done"]
            )
    root = folder / "dataset"
    add_run(run.layout.root, root, (), lambda line: None)
    return Asked(root, run)


def ask(*words: object, exit_code: int = 0) -> Any:
    """Run a command, which must end with this exit code and without a traceback; returns click's result."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == exit_code, f"{done.output}\n{done.exception}"
    assert "Traceback" not in done.output
    return done
