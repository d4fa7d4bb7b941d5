"""The cohort of real slides of two scanners, two tiles and a broken file."""

from __future__ import annotations

import csv
from pathlib import Path

TCGA, CMU = "TCGA-V5-A7RE_40x_colsW", "CMU-1-Small-Region"
TILES = ("consep_train_03", "consep_train_09")
COMPLETE = (CMU, TCGA, *TILES)
"""The slide_ids of all but broken.svs, which is the sixth row."""


def write_real_cohort(data: Path, folder: Path) -> Path:
    """A CSV in `folder` of the files in `data`, ../shared/data."""
    rows = [(data / "slides" / f"{CMU}.svs", ""), (data / "slides" / f"{TCGA}.tif", "")]
    rows += [(data / "nuclei" / "images" / f"{tile}.png", "0.25") for tile in TILES]
    rows += [(data / "slides" / "broken.svs", "0.25")]
    cohort = folder / "cohort.csv"
    with cohort.open("w", newline="") as f:
        csv.writer(f).writerows([("path", "mpp"), *rows])
    return cohort
