"""Write a small set in the form of the paper's data, to train all its systems on: see benchmarks/results/systems.

    uv run python -m benchmarks.systems ../shared/data/nuclei small/

CoNSeP's training tiles, cut to patches of PanNuke's size and named `pannuke`, are the folds 1 (12 tiles) and 3 (the
other 6), its validation tiles are fold 2, and its test tiles, uncut, are the source `consep` of Table 3. CoNSeP's class
`other` stands in for PanNuke's dead nuclei in the patches.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import cv2
import numpy as np

SIDE = 256
"""Side in pixels of a patch."""
CODES = np.array([0, 4, 2, 5, 1, 3, 3, 3], np.uint8)
"""PanNuke's code of each code of CoNSeP."""
FIRST_FOLD = 12
"""Number of training tiles in fold 1."""


def write_small(nuclei: Path, out: Path) -> None:
    """Write the set to the folder `out`. `nuclei`: instance folder (dataset.csv) that contains CoNSeP."""
    out.mkdir(parents=True)
    rows = []
    with (nuclei / "dataset.csv").open(newline="") as file:
        tiles = [row for row in csv.DictReader(file) if row["source"] == "consep"]
    trained = [row["sample_id"] for row in tiles if row["split"] == "train"]
    for tile in tiles:
        planes = {name: cv2.imread(str(nuclei / tile[name]), cv2.IMREAD_UNCHANGED) for name in ("image", "labels")}
        planes["types"] = cv2.imread(str(nuclei / tile["types"]), cv2.IMREAD_UNCHANGED)
        if tile["split"] == "test":
            rows.append(_written(out, tile["sample_id"], "consep", "test", planes))
            continue
        planes["types"] = CODES[planes["types"]]
        fold = "2" if tile["split"] == "val" else "1" if tile["sample_id"] in trained[:FIRST_FOLD] else "3"
        for i, (y, x) in enumerate(((0, 0), (0, 500), (500, 0), (500, 500))):
            part = {name: plane[y : y + SIDE, x : x + SIDE] for name, plane in planes.items()}
            rows.append(_written(out, f"{tile['sample_id']}_{i}", "pannuke", fold, part))
    with (out / "dataset.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _written(out: Path, name: str, source: str, fold: str, planes: dict[str, np.ndarray]) -> dict[str, str]:
    """Write the pictures of one image, and return its row of dataset.csv."""
    files = {kind: f"{name}_{kind}.png" for kind in planes}
    for kind, plane in planes.items():
        cv2.imwrite(str(out / files[kind]), plane)
    return {"sample_id": name, **files, "source": source, "split": fold, "tissue": "Colon"}


if __name__ == "__main__":
    write_small(Path(sys.argv[1]), Path(sys.argv[2]))
