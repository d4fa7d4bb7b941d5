"""Write JSON as hover_net's inference does: {"mag": …, "nuc": {"1": {bbox, centroid, contour, type_prob, type}, …}}.

Positions are in level-0 pixels of the full canvas, and `mag` is the magnification for pixels of this size
(10 µm / mpp). As in hover_net, integers of `centroid` and `contour` are pixel centres, so that x and y are 0.5 less
than in our tables. `bbox` is [[first row, first column], [last row + 1, last column + 1]]; hover_net's mode for whole
slides adds x to rows and y to columns, an error that is not reproduced. `contour` is not closed, and has integers if
all its coordinates are whole. `type_prob` is the mean probability of the class; in hover_net, it is a share of pixels.

`type_info` holds the names and colours of the types, in the format of hover_net's type_info.json.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from hover_batch.export.read import NucleiTable
from hover_batch.files import replacing

_to_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def write_hovernet_json(nuclei: NucleiTable, path: Path) -> None:
    """Write the table `nuclei` to `path` (.json) in the format of hover_net's inference, batch by batch.

    The keys are `mag` (magnification), `type_info` (name and colour of each type) and `nuc`. `nuc` has an entry for
    each nucleus_id with `bbox`, `centroid`, `contour`, `type_prob` and `type`. `bbox` is [[first row, first column],
    [last row + 1, last column + 1]]. `centroid` is [x, y], and `contour` a list of [x, y] that does not repeat its
    first point. Positions are in level-0 pixels, with integers at pixel centres. An existing file is replaced only when
    all is written.

    OSError if the file cannot be written, SlideError if the table is corrupted.
    """
    mag = round(10 / math.sqrt(nuclei.mpp.x * nuclei.mpp.y))
    info = {str(c.id): [c.name, list(c.color)] for c in nuclei.taxonomy.classes}
    columns = ["nucleus_id", "centroid_x", "centroid_y", "bbox", "type_id", "type_prob", "geometry"]
    separator = ""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f'{{"mag": {mag}, "type_info": {json.dumps(info)}, "nuc": {{')
        for batch in nuclei.batches(columns):
            xmin, ymin, xmax, ymax = (batch["bbox"].field(i).to_numpy() for i in range(4))
            upper_left = np.floor([ymin, xmin]).astype(np.int64)
            lower_right = np.ceil([ymax, xmax]).astype(np.int64)
            points, ring_of_point = shapely.get_coordinates(nuclei.polygons(batch), return_index=True)
            rings = np.split(points - 0.5, np.flatnonzero(np.diff(ring_of_point)) + 1)
            centroids = np.column_stack([batch["centroid_x"], batch["centroid_y"]]) - 0.5
            rows = zip(
                batch["nucleus_id"].to_pylist(),
                np.stack([upper_left.T, lower_right.T], axis=1).tolist(),
                centroids.tolist(),
                rings,
                batch["type_prob"].cast("string").to_pylist(),  # the shortest decimal that gives the same float32
                batch["type_id"].to_pylist(),
                strict=True,
            )
            for nucleus_id, bbox, centroid, ring, type_prob, type_id in rows:
                nucleus = {
                    "bbox": bbox,
                    "centroid": centroid,
                    "contour": _whole(ring[:-1]),
                    "type_prob": float(type_prob),
                    "type": type_id,
                }
                file.write(f'{separator}\n"{nucleus_id}": {_to_json(nucleus)}')
                separator = ","
        file.write("\n}}\n")


def _whole(ring: NDArray[np.float64]) -> list[Any]:
    """Return a ring (k, 2) as lists of x, y; as integers if all are whole."""
    rounded = ring.astype(np.int64)
    points: list[Any] = (rounded if (rounded == ring).all() else ring).tolist()
    return points
