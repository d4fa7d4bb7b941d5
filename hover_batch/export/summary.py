"""Write summary.csv and summary.parquet: one row per slide and one for the cohort.

The slides' nuclei.parquet are read one column and one batch at a time, so that a cohort of any size needs the memory of
one batch. Quantiles are exact, neither sampled nor binned, for slides and for the cohort.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import InputError
from hover_batch.files import naming, replacing
from hover_batch.taxonomy import ESTIMATE, NucleusClass, Taxonomy
from hover_batch.uncertainty import CountError

Row = dict[str, Any]
"""Row of a summary: values by column. Columns without a value may be missing, such as those about nuclei of a failed
slide."""

MORPHOLOGY = ("area_um2", "eccentricity", "solidity")
QUARTILES = {"p25": 0.25, "p50": 0.5, "p75": 0.75}

QUALITY = ("h_od_mean", "e_od_mean", "seg_score_mean", "type_prob_mean", "out_of_focus", "ink")
"""Measures of `hover_batch.quality`: means over the nuclei, except for the shares out_of_focus and ink."""

COUNT_ERROR = "count_error"
"""Column with the error of the number of nuclei, as JSON (`hover_batch.uncertainty.CountError`)."""

STAGE = "seconds_"
"""Beginning of the names of the columns with the seconds of a stage."""
_BATCH = 131_072


def summary_schema(taxonomy: Taxonomy) -> pa.Schema:
    """Return the names and types of the columns that every summary for `taxonomy` has, in order.

    They begin with `level`, `slide_id`, `patient_id`, `group` and `status`. Counts are int64, other numbers float64,
    texts string. In a summary, the columns are followed by the estimates, the seconds of each stage and the cohort
    CSV's own columns.
    """
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
        ("nuclei_low", pa.float64()),
        ("nuclei_high", pa.float64()),
        ("nuclei_per_mm2", pa.float64()),
        ("nuclei_per_mm2_low", pa.float64()),
        ("nuclei_per_mm2_high", pa.float64()),
        *((f"{c.name}_per_mm2", pa.float64()) for c in taxonomy.nuclei),
        *((f"{name}_{quartile}", pa.float64()) for name in MORPHOLOGY for quartile in QUARTILES),
        ("model_busy", pa.float64()),
        *((name, pa.float64()) for name in QUALITY),
        ("flags", pa.string()),
        (COUNT_ERROR, pa.string()),
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
    error: CountError | None = None,
    estimate: Mapping[str, Any] | None = None,
) -> Row:
    """Return the summary's row of one slide, as values by column. Its `level` is "slide".

    The cohort CSV's own columns are added. The prefix extra_ is put before a name that the summary already has, or that
    begins with seconds_ or estimated_.

    `record`: row of the slide in the cohort. `taxonomy`: classes of the nuclei. `status`: done, estimated or failed.
    `nuclei`: path of its nuclei.parquet; None for a slide that is not done. `tissue_mm2`: area that was searched in
    mm²; None if unknown. `seconds`: wall time by stage.

    `error`: error of the number of nuclei, for its interval; None if it was not measured. `estimate`: the entry
    `estimate` of estimate.json, whose numbers have columns of their own; None for a slide that is not estimated.

    OSError if the table cannot be read, pyarrow.ArrowInvalid if it is corrupted.
    """
    row: Row = {"level": "slide", "status": status, "slides": 1, "failed": int(status == "failed")}
    if nuclei is not None:
        row |= _of_nuclei([nuclei], taxonomy, tissue_mm2)
        row |= _interval(error, [(row["nuclei"], tissue_mm2)])
        row[COUNT_ERROR] = None if error is None else json.dumps(error.to_json())
    if estimate is not None:
        row |= {"tissue_mm2": tissue_mm2} | _of_estimate(estimate, error, tissue_mm2)
    row |= {STAGE + stage: value for stage, value in seconds.items()}
    return row | _of_record(record, taxonomy)


def with_record_columns(row: Row, record: SlideRecord, taxonomy: Taxonomy) -> Row:
    """Return a copy of the summary's row of a finished slide, with the cohort CSV's columns taken from `record`.

    Columns that neither the summary nor `record` has are dropped.

    `row`: result of `slide_summary` in an earlier start; the CSV may have changed since then. `taxonomy`: classes of
    the nuclei.
    """
    known = set(summary_schema(taxonomy).names)
    measured = {name: value for name, value in row.items() if name in known or name.startswith((STAGE, ESTIMATE))}
    return measured | _of_record(record, taxonomy)


def refuse_altered(row: Row, classes: Sequence[NucleusClass], slide_json: Path) -> None:
    """Raise InputError if the summary's row of a finished slide lacks a number that commands read, as after an edit.

    The number of nuclei of each class must be an integer. Densities and quartiles may be missing, but must be numbers
    otherwise.

    `row`: row of the summary in the file `slide_json`. `classes`: classes of nuclei, without the background.
    """
    counts = [f"n_{kind.name}" for kind in classes]
    densities = [f"{kind.name}_per_mm2" for kind in classes]
    quartiles = [f"{name}_{quartile}" for name in MORPHOLOGY for quartile in QUARTILES if row.get("nuclei")]
    lacking = [name for name in counts if type(row.get(name)) is not int]
    lacking += [name for name in densities + quartiles if not isinstance(row.get(name, 0.0), int | float)]
    if lacking:
        raise InputError(
            f"{slide_json}: was edited: {lacking[0]} in its summary is missing or not a valid number; remove this file "
            "and repeat the segment command, which writes it again"
        )


def _of_record(record: SlideRecord, taxonomy: Taxonomy) -> Row:
    """Return the columns that come from the cohort CSV."""
    row: Row = {"slide_id": record.slide_id, "patient_id": record.patient_id, "group": record.group}
    known = {name.casefold() for name in summary_schema(taxonomy).names}
    for name, value in record.extra.items():
        # A column of the cohort CSV must replace neither one of the summary nor another of the CSV, also not in SQL,
        # which ignores upper and lower case.
        while name.casefold() in known or name in row or name.casefold().startswith((STAGE, ESTIMATE)):
            name = f"extra_{name}"
        row[name] = value
    return row


def cohort_summary(
    slides: Sequence[Row], nuclei: Sequence[Path], taxonomy: Taxonomy, model_busy: float | None = None
) -> Row:
    """Return the summary's row of the cohort, as values by column. Its `level` is "cohort".

    Numbers of nuclei, seconds and tissue areas are sums over the slides. Estimated slides do not count in the areas.
    Densities and quartiles are computed from all nuclei together; they are not means over slides. The interval of the
    number of nuclei treats all slides as slides from one source. It is missing if the finished slides have different
    errors of counts, or one of them has none.

    `slides`: rows of the slides. `nuclei`: paths of the tables of finished slides. `taxonomy`: classes of the nuclei.
    `model_busy`: fraction (0 to 1) of the time in which the networks computed; None if unknown.

    OSError if a table cannot be read, pyarrow.ArrowInvalid if it is corrupted.
    """
    whole = [row for row in slides if row.get("status") != "estimated"]
    done = [row for row in whole if not row["failed"]]
    errors = {row.get(COUNT_ERROR) for row in done}
    error = read_count_error(errors.pop()) if len(errors) == 1 else None
    areas = [row["tissue_mm2"] for row in whole if row.get("tissue_mm2") is not None]
    return {
        "level": "cohort",
        "slides": sum(row["slides"] for row in slides),
        "failed": sum(row["failed"] for row in slides),
        **_of_nuclei(nuclei, taxonomy, sum(areas) if areas else None),
        **_interval(error, [(row["nuclei"], row.get("tissue_mm2")) for row in done]),
        "model_busy": model_busy,
        **{stage: sum(row.get(stage, 0.0) for row in slides) for stage in _starting(STAGE, slides)},
    }


def write_summary(rows: Sequence[Row], taxonomy: Taxonomy, csv_path: Path, parquet_path: Path) -> None:
    """Write the rows of a summary to a CSV and a Parquet file. Existing files are replaced.

    The columns are, in this order: the columns of `summary_schema`, the estimates if there are any, the seconds by
    stage, and the cohort CSV's own columns as text. Missing values are empty in the CSV and null in Parquet. Numbers
    have six significant digits in the CSV and full precision in Parquet.

    `rows`: rows of the slides and of the cohort. `taxonomy`: classes of the nuclei. `csv_path`, `parquet_path`: files
    to write.

    OSError if a file cannot be written.
    """
    schema = summary_schema(taxonomy)
    for name in (*_starting(ESTIMATE, rows), *_starting(STAGE, rows)):
        schema = schema.append(pa.field(name, pa.float64()))
    cohort_columns = dict.fromkeys(name for row in rows for name in row if name not in schema.names)
    for name in cohort_columns:
        schema = schema.append(pa.field(name, pa.string()))
    with replacing(parquet_path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary, compression="zstd")
    with replacing(csv_path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(schema.names)
        writer.writerows([_cell(row.get(name)) for name in schema.names] for row in rows)


def _starting(prefix: str, rows: Sequence[Row]) -> list[str]:
    """Return the names of all columns with this beginning, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(prefix)))


def _cell(value: Any) -> Any:
    """Format a cell of the CSV: floats with six significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else value


def _of_estimate(estimate: Mapping[str, Any], error: CountError | None, tissue_mm2: float | None) -> Row:
    """Return the columns of a slide whose densities are estimated.

    Those that end in _true_low and _true_high are the interval of the measuring error alone, as that of a whole slide
    with the estimated density.
    """
    row: Row = {
        f"{ESTIMATE}from_clusters": float(estimate["clusters"]),
        f"{ESTIMATE}of_clusters": float(estimate["of_clusters"]),
    }
    for name, density in estimate["densities"].items():
        row[f"{ESTIMATE}{name}_per_mm2"] = density["per_mm2"]
        row |= {f"{ESTIMATE}{name}_per_mm2_{end}": density[end] for end in ("low", "high")}
    nuclei = round(estimate["densities"]["nuclei"]["per_mm2"] * (tissue_mm2 or 0.0))
    measured = _interval(error, [(nuclei, tissue_mm2)])
    return row | {
        f"{ESTIMATE}nuclei_per_mm2_true_{end}": measured.get(f"nuclei_per_mm2_{end}") for end in ("low", "high")
    }


def _of_nuclei(paths: Sequence[Path], taxonomy: Taxonomy, tissue_mm2: float | None) -> Row:
    """Return counts, densities and quartiles of the nuclei in all tables `paths` together."""
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


def read_count_error(stored: Any) -> CountError | None:
    """Return the error of counts in a cell of a summary's column COUNT_ERROR; None if the cell is empty or invalid.

    `stored`: text of the cell, as JSON.
    """
    try:
        return CountError.from_json(json.loads(stored))
    except (TypeError, ValueError):
        return None


def _interval(error: CountError | None, slides: Sequence[tuple[int, float | None]]) -> Row:
    """Return the interval of the number of nuclei in `slides` and of their density; empty if it is not known.

    `slides`: number of nuclei and mm² of tissue of each.
    """
    interval = None if error is None else error.interval(slides)
    if interval is None:
        return {}
    area = sum(tissue_mm2 or 0.0 for _, tissue_mm2 in slides)
    ends = zip(("low", "high"), interval, strict=True)
    return {
        name: value for end, n in ends for name, value in ((f"nuclei_{end}", n), (f"nuclei_per_mm2_{end}", n / area))
    }


def _quantiles(paths: Sequence[Path], column: str, total: int) -> list[float]:
    """Return the exact QUARTILES of a float32 column without negative values.

    Quantiles are interpolated linearly, as in numpy and pandas. The bits of non-negative floats sort as the floats do,
    so two passes suffice for any number of nuclei. The first counts the upper 16 bits and finds those of each rank; the
    second counts the lower 16 bits of values with the same upper bits.
    """
    positions = [share * (total - 1) for share in QUARTILES.values()]
    ranks = sorted({rank for position in positions for rank in (math.floor(position), math.ceil(position))})
    upper = np.zeros(1 << 16, np.int64)
    for values in _batches(paths, column):
        upper += np.bincount(values.view(np.uint32) >> 16, minlength=len(upper))
    below = np.cumsum(upper)
    bins = [int(np.searchsorted(below, rank, side="right")) for rank in ranks]
    lower = {bin: np.zeros(1 << 16, np.int64) for bin in bins}
    for values in _batches(paths, column):
        bits = values.view(np.uint32)
        for bin, counts in lower.items():
            counts += np.bincount(bits[bits >> 16 == bin] & 0xFFFF, minlength=len(counts))
    ranked = {}
    for rank, bin in zip(ranks, bins, strict=True):
        within = rank - int(below[bin] - upper[bin])
        bits_found = bin << 16 | int(np.searchsorted(np.cumsum(lower[bin]), within, side="right"))
        ranked[rank] = float(np.uint32(bits_found).view(np.float32))
    return [float(np.interp(position, ranks, [ranked[rank] for rank in ranks])) for position in positions]


def _batches(paths: Sequence[Path], column: str) -> Iterator[NDArray[Any]]:
    """Yield the values of one column of several tables, batch by batch."""
    for path in paths:
        with naming(path), pq.ParquetFile(path) as table:
            for batch in table.iter_batches(_BATCH, columns=[column]):
                yield batch.column(0).to_numpy()
