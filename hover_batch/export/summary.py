"""summary.csv and summary.parquet: one row a slide and one for the cohort.

Everything about nuclei is read from the slides' nuclei.parquet, a column and a batch at a time, so that a cohort of any
size takes the memory of one batch. Quantiles are exact, of the cohort too: no sample, no bins.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hover_batch.cohort.record import SlideRecord
from hover_batch.files import replacing
from hover_batch.taxonomy import Taxonomy

Row = dict[str, Any]
"""Column → value; a column that has no value (a failed slide has no nuclei) is missing."""

MORPHOLOGY = ("area_um2", "eccentricity", "solidity")
QUARTILES = {"p25": 0.25, "p50": 0.5, "p75": 0.75}

QUALITY = ("h_od_mean", "e_od_mean", "seg_score_mean", "type_prob_mean", "out_of_focus", "ink")
"""Measures of `hover_batch.quality`; densities and scores are means over the nuclei, the others shares."""

_STAGE = "seconds_"
_BATCH = 131_072


def summary_schema(taxonomy: Taxonomy) -> pa.Schema:
    """The columns every summary has, in order. The seconds of each stage and the cohort CSV's own columns follow."""
    columns: list[tuple[str, pa.DataType]] = [
        ("level", pa.string()),
        ("slide_id", pa.string()),
        ("patient_id", pa.string()),
        ("group", pa.string()),
        ("status", pa.string()),
        ("slides", pa.int64()),
        ("failed", pa.int64()),
        ("tissue_mm2", pa.float64()),
        ("nuclei", pa.int64()),
        *((f"n_{c.name}", pa.int64()) for c in taxonomy.nuclei),
        ("nuclei_per_mm2", pa.float64()),
        *((f"{c.name}_per_mm2", pa.float64()) for c in taxonomy.nuclei),
        *((f"{name}_{quartile}", pa.float64()) for name in MORPHOLOGY for quartile in QUARTILES),
        ("model_busy", pa.float64()),
        *((name, pa.float64()) for name in QUALITY),
        ("flags", pa.string()),
    ]
    return pa.schema(columns)


def slide_summary(
    record: SlideRecord,
    taxonomy: Taxonomy,
    *,
    status: str,
    nuclei: Path | None,
    tissue_mm2: float | None,
    seconds: Mapping[str, float],
) -> Row:
    """The row of one slide, `level` "slide".

    `nuclei` is its nuclei.parquet, None for a slide that has none because it failed. `tissue_mm2` is the area that was
    searched; `seconds` the wall time of each stage by its name.
    """
    row: Row = {"level": "slide", "status": status, "slides": 1, "failed": int(nuclei is None)}
    if nuclei is not None:
        row |= _of_nuclei([nuclei], taxonomy, tissue_mm2)
    row |= {_STAGE + stage: value for stage, value in seconds.items()}
    return row | _of_record(record, taxonomy)


def relabelled(row: Row, record: SlideRecord, taxonomy: Taxonomy) -> Row:
    """The `slide_summary` row of a slide done before, with what the cohort CSV says of it today."""
    ours = set(summary_schema(taxonomy).names)
    measured = {name: value for name, value in row.items() if name in ours or name.startswith(_STAGE)}
    return measured | _of_record(record, taxonomy)


def _of_record(record: SlideRecord, taxonomy: Taxonomy) -> Row:
    row: Row = {"slide_id": record.slide_id, "patient_id": record.patient_id, "group": record.group}
    ours = set(summary_schema(taxonomy).names)
    for name, value in record.extra.items():
        # A column of the cohort CSV never takes the place of one of ours.
        row[f"extra_{name}" if name in ours or name.startswith(_STAGE) else name] = value
    return row


def cohort_summary(
    slides: Sequence[Row], nuclei: Sequence[Path], taxonomy: Taxonomy, model_busy: float | None = None
) -> Row:
    """The row of all slides, `level` "cohort". `model_busy`: share of the time in which the networks computed.

    Counts, tissue and seconds are sums over the rows `slides`. Densities and quartiles are those of all nuclei in the
    tables `nuclei` together, not means over slides.
    """
    areas = [row["tissue_mm2"] for row in slides if row.get("tissue_mm2") is not None]
    return {
        "level": "cohort",
        "slides": sum(row["slides"] for row in slides),
        "failed": sum(row["failed"] for row in slides),
        **_of_nuclei(nuclei, taxonomy, sum(areas) if areas else None),
        "model_busy": model_busy,
        **{stage: sum(row.get(stage, 0.0) for row in slides) for stage in _stages(slides)},
    }


def write_summary(rows: Sequence[Row], taxonomy: Taxonomy, csv_path: Path, parquet_path: Path) -> None:
    """Write `rows` to both files with the same columns: ours, seconds by stage, the cohort CSV's own as text.

    What a row has not is empty in the CSV and null in Parquet. The CSV gives six digits, Parquet all.
    """
    schema = summary_schema(taxonomy)
    for stage in _stages(rows):
        schema = schema.append(pa.field(stage, pa.float64()))
    for name in dict.fromkeys(name for row in rows for name in row if name not in schema.names):
        schema = schema.append(pa.field(name, pa.string()))
    with replacing(parquet_path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary, compression="zstd")
    with replacing(csv_path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(schema.names)
        writer.writerows([_cell(row.get(name)) for name in schema.names] for row in rows)


def _stages(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(_STAGE)))


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _of_nuclei(paths: Sequence[Path], taxonomy: Taxonomy, tissue_mm2: float | None) -> Row:
    """Counts, densities and quartiles of the nuclei in `paths` together."""
    by_type = np.zeros(len(taxonomy.classes), np.int64)
    for types in _batches(paths, "type_id"):
        by_type += np.bincount(types, minlength=len(by_type))
    total = int(by_type.sum())
    row: Row = {"tissue_mm2": tissue_mm2, "nuclei": total}
    row |= {f"n_{c.name}": int(by_type[c.id]) for c in taxonomy.nuclei}
    if tissue_mm2:
        row["nuclei_per_mm2"] = total / tissue_mm2
        row |= {f"{c.name}_per_mm2": int(by_type[c.id]) / tissue_mm2 for c in taxonomy.nuclei}
    if total:
        for name in MORPHOLOGY:
            values = _quantiles(paths, name, total)
            row |= {f"{name}_{quartile}": value for quartile, value in zip(QUARTILES, values, strict=True)}
    return row


def _quantiles(paths: Sequence[Path], column: str, total: int) -> list[float]:
    """The QUARTILES of a float32 column without negative values: the smallest value that at least that share of the
    nuclei do not exceed (numpy's "inverted_cdf").

    Bits of floats from 0 up sort as the floats do. So two passes suffice whatever the number of nuclei: one counts the
    upper 16 bits and finds those of each quantile, the next counts the lower 16 among the values that share them.
    """
    ranks = [max(1, int(np.ceil(share * total))) for share in QUARTILES.values()]
    upper = np.zeros(1 << 16, np.int64)
    for values in _batches(paths, column):
        upper += np.bincount(values.view(np.uint32) >> 16, minlength=len(upper))
    below = np.cumsum(upper)
    bins = [int(np.searchsorted(below, rank)) for rank in ranks]
    lower = {bin: np.zeros(1 << 16, np.int64) for bin in bins}
    for values in _batches(paths, column):
        bits = values.view(np.uint32)
        for bin, counts in lower.items():
            counts += np.bincount(bits[bits >> 16 == bin] & 0xFFFF, minlength=len(counts))
    found = []
    for rank, bin in zip(ranks, bins, strict=True):
        within = rank - int(below[bin] - upper[bin])
        bits_found = bin << 16 | int(np.searchsorted(np.cumsum(lower[bin]), within))
        found.append(float(np.uint32(bits_found).view(np.float32)))
    return found


def _batches(paths: Sequence[Path], column: str) -> Iterator[NDArray[Any]]:
    """The values of one column of several tables, a batch at a time."""
    for path in paths:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(_BATCH, columns=[column]):
                yield batch.column(0).to_numpy()
