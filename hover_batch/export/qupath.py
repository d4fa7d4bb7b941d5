"""GeoJSON that QuPath opens: a FeatureCollection of detections, gzipped, written as a stream.

Every nucleus is a `detection` (a feature that does not say so becomes an annotation, which QuPath draws and keeps at
many times the cost), with its class and the class's colour, the table's measurements, and a UUID. Positions are level-0
pixels of the slide as QuPath shows it: from the corner of OpenSlide's bounds, where the slide has some.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import shapely

from hover_batch.export.read import NucleiTable
from hover_batch.files import replacing
from hover_batch.geometry import qupath_origin

_LEVEL = 4
"""Of gzip: 6, the usual, makes the export take 1.6 times as long for files an eighth smaller."""
_to_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def write_qupath(nuclei: NucleiTable, path: Path) -> None:
    """Write `nuclei` to `path` (.geojson.gz). The bytes depend on the table alone."""
    classes = {c.name: {"name": c.name, "color": list(c.color)} for c in nuclei.taxonomy.classes}
    corner = qupath_origin(nuclei.bounds)
    separator = ""
    with (
        replacing(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", _LEVEL, raw, mtime=0) as file,  # neither time nor hidden name belongs into its header
    ):
        file.write(b'{"type":"FeatureCollection","features":[')
        for batch in nuclei.batches():
            shapes = shapely.transform(nuclei.polygons(batch), lambda points: points - corner)
            rows = zip(
                nuclei.uuids(batch),
                shapely.to_geojson(shapes),
                batch["type"].to_pylist(),
                nuclei.measurements(batch),
                strict=True,
            )
            for identity, geometry, kind, measurements in rows:
                properties: dict[str, Any] = {
                    "objectType": "detection",
                    "classification": classes[kind],
                    "measurements": measurements,
                }
                feature = (
                    f'{separator}\n{{"type":"Feature","id":"{identity}","geometry":{geometry},'
                    f'"properties":{_to_json(properties)}}}'
                )
                file.write(feature.encode())
                separator = ","
        file.write(b"\n]}\n")
