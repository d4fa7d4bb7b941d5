"""Gather the content of a run's report from its folder; `hover_batch.report` lays it out.

Only the crops need the slides themselves. The report of an unfinished run lists what is missing.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.cohort.run_folder import estimate_line, read_slides, require_run, slide_if_done
from hover_batch.errors import DISK_FULL, HoverBatchError, InputError
from hover_batch.export.read import NucleiTable
from hover_batch.export.summary import cohort_summary, refuse_altered
from hover_batch.files import check_output_file, read_json
from hover_batch.formatting import duration
from hover_batch.model.package import find_package
from hover_batch.report.charts import Strip, histogram, strips
from hover_batch.report.content import Flagged, Report, Share, SlideRow
from hover_batch.report.measure import MEASURES, Measured
from hover_batch.report.page import Pages
from hover_batch.report.pictures import reduced_picture
from hover_batch.report.slide import report_slide
from hover_batch.status import RunStatus, read_status
from hover_batch.taxonomy import NucleusClass
from hover_batch.version import __version__

Notify = Callable[[str], None]

PICTURED = 50
"""Number of flagged slides shown with their thumbnails, so that the page stays small if all are flagged."""
THUMBNAIL = 160
"""Longer side in pixels of their thumbnails."""


def report_run(folder: Path, output: Path | None, notify: Notify) -> Path:
    """Write the HTML report of the run in `folder`, and return the path of the report.

    An existing report is replaced, including its further pages. With more than 200 finished slides, the pictures are on
    further pages, in a folder next to the report. Of the flagged slides, the first PICTURED (50) are shown with
    thumbnails.

    `output`: file to write; None for report.html in the run's folder. `notify`: function that is called with a line
    about each finished slide, and about what the report lacks.

    InputError if the folder holds no run, a file of the run is corrupted, or the report cannot be written; OSError if a
    file of the run cannot be read or the disk is full.
    """
    status = read_status(folder)
    layout = status.layout
    path = output or layout.report_html
    check_output_file("-o", path, (".html", ".htm"), make_folder=True)
    records = {record.slide_id: record for record in read_slides(layout) or ()}
    rows = _rows(status, records)
    title = f"Cohort {layout.root.name}"
    number_done = sum(row.state == "done" for row in rows)
    sums = _Sums()
    pages = Pages(path, number_done, title)
    # A report outside the run's folder has no links to the slides' files.
    to_run = pages.to_front if path.absolute().parent == layout.root else None
    for index, row in enumerate(rows):
        if row.state == "done":
            notify(f"[{len(sums.done) + 1}/{number_done}] {row.slide_id}")
            row_with_page = replace(row, page=pages.next_page)
            reported = report_slide(layout.slide(row.slide_id), row_with_page, records[row.slide_id], to_run)
            sums.add(row_with_page, reported.table, reported.measured)
            with _writing(path):
                pages.add(reported.detail)
            rows[index] = row_with_page
    report = _report(status, rows, sums, title)
    with _writing(path):
        pages.close(report)
    for line in report.missing:
        notify(f"note: {line}")
    return path


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Convert an OSError in the block, which writes the report at `path`, to an InputError unless the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"{path}: cannot be written ({error}); give another file with -o") from error


@dataclass
class _Sums:
    """Sums over the tables of the slides. `done`: finished slides; `good`: those whose table can be read."""

    done: list[SlideRow] = field(default_factory=list)
    good: list[SlideRow] = field(default_factory=list)
    tables: list[NucleiTable] = field(default_factory=list)
    histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def add(self, row: SlideRow, table: NucleiTable | None, measured: Measured | None) -> None:
        """Add a finished slide; `table` and `measured` are None if its table cannot be read."""
        self.done.append(row)
        if table is None or measured is None:
            return
        self.good.append(row)
        self.tables.append(table)
        for name, counts in measured.histograms.items():
            self.histograms[name] = self.histograms.get(name, 0) + counts

    @property
    def classes(self) -> tuple[NucleusClass, ...]:
        """Classes of the tables, without the background; empty if no table can be read."""
        return self.tables[0].taxonomy.nuclei if self.tables else ()


def _rows(status: RunStatus, records: Mapping[str, SlideRecord]) -> list[SlideRow]:
    """Return every row of the cohort in order, including invalid rows that were left out."""
    failures = {failure.row: failure for failure in status.failures}
    open_slides = {slide.slide_id: slide for slide in status.open}
    rows = []
    for record in records.values():
        slide = status.layout.slide(record.slide_id)
        row = SlideRow(record.slide_id, record.row, "pending", patient_id=record.patient_id, group=record.group)
        if failure := failures.pop(record.row, None):
            row = replace(row, state="failed", note=_reason(failure.stage, failure.reason))
        elif begun := open_slides.get(record.slide_id):
            row = replace(row, state="begun" if status.is_running is False else "in progress", note=begun.line())
        elif "summary" in (stored := slide_if_done(slide) or {}):
            row = replace(
                row,
                state="done",
                summary=stored["summary"],
                warnings=stored.get("warnings", ()),
                flags=status.flags.get(record.slide_id, ()),
            )
        elif (estimated := status.estimates.get(record.slide_id)) is not None:
            row = replace(row, state="estimated", note=estimate_line(estimated))
        rows.append(row)
    rows += [
        SlideRow(failure.slide_id, failure.row, "left out", _reason(failure.stage, failure.reason))
        for failure in failures.values()
    ]
    return sorted(rows, key=lambda row: row.row if row.row is not None else -1)


def _reason(stage: str, reason: str) -> str:
    """Return the reason of a failure, after its stage if that is known."""
    return f"{stage}: {reason}" if stage else reason


def _report(status: RunStatus, rows: Sequence[SlideRow], sums: _Sums, title: str) -> Report:
    """Return the content of the front page."""
    layout, classes = status.layout, sums.classes
    cohort: dict[str, Any] = {}
    if sums.tables:
        summaries = [dict(row.summary) for row in sums.good]
        paths, taxonomy = [table.path for table in sums.tables], sums.tables[0].taxonomy
        cohort = cohort_summary(summaries, paths, taxonomy, status.log.model_busy)
    counts = dict.fromkeys(("done", "estimated", "failed", "left out", "in progress", "begun", "pending"), 0)
    for row in rows:
        counts[row.state] += 1
    for row in sums.done:
        refuse_altered(dict(row.summary), classes, layout.slide(row.slide_id).slide_json)
    run = require_run(layout)
    return Report(
        title=title,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=__version__,
        status=status.lines()[:2],
        counts={name: n for name, n in counts.items() if n or name in ("done", "failed")},
        facts=_facts(status, cohort),
        missing=_missing(status, rows, sums),
        flagged=_flagged(layout, rows),
        estimated=[row for row in rows if row.state == "estimated"],
        classes=classes,
        shares=[_share(kind, cohort) for kind in classes],
        rows=rows,
        cohort=cohort,
        densities=_densities(sums),
        histograms=[histogram(m, sums.histograms[m.column], classes) for m in MEASURES if sums.histograms],
        failures=[row for row in rows if row.state in ("failed", "left out")],
        card=_card(layout, sums, run),
        settings=layout.settings_toml.read_text("utf-8", "replace") if layout.settings_toml.is_file() else None,
        versions=read_json(layout.versions_json),
        run={"folder": layout.root, **run, "command": shlex.join(["hover-batch", *map(str, run.get("command", ()))])},
    )


def _flagged(layout: RunLayout, rows: Sequence[SlideRow]) -> list[Flagged]:
    """Return the flagged slides, the first ones with their thumbnails."""
    flagged = [row for row in rows if row.flags]
    return [
        Flagged(row, reduced_picture(layout.slide(row.slide_id).thumbnail_jpg, THUMBNAIL) if i < PICTURED else None)
        for i, row in enumerate(flagged)
    ]


def _share(kind: NucleusClass, cohort: Mapping[str, Any]) -> Share:
    """Return the numbers of one class. `cohort`: the row of the cohort in the summary."""
    count, total = cohort[f"n_{kind.name}"], cohort["nuclei"]
    return Share(kind, count, count / total if total else None, cohort.get(f"{kind.name}_per_mm2"))


def _facts(status: RunStatus, cohort: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures of the cohort by name, without unknown ones."""
    facts: dict[str, str] = {}
    if cohort:
        facts["nuclei"] = f"{cohort['nuclei']:,}{_interval(cohort, 'nuclei')}"
        if cohort["tissue_mm2"] is not None:
            facts["mm² of tissue"] = f"{cohort['tissue_mm2']:,.4g}"
        if "nuclei_per_mm2" in cohort:
            facts["nuclei per mm²"] = f"{cohort['nuclei_per_mm2']:,.0f}{_interval(cohort, 'nuclei_per_mm2')}"
    log = status.log
    if log.started and log.finished:
        facts["duration of the last start"] = duration((log.finished - log.started).total_seconds())
    if log.tile_rate:
        facts["tiles per second"] = f"{log.tile_rate.per_s:.3g}"
    if log.model_busy is not None:
        facts["of the time, the networks were busy"] = f"{log.model_busy:.0%}"
    return facts


def _interval(cohort: Mapping[str, Any], name: str) -> str:
    """Return the interval of a number of the cohort in brackets, after a space; empty if it has none."""
    low, high = (cohort.get(f"{name}_{end}") for end in ("low", "high"))
    return "" if low is None or high is None else f" ({low:,.0f} to {high:,.0f})"


def _missing(status: RunStatus, rows: Sequence[SlideRow], sums: _Sums) -> list[str]:
    """Return one sentence for each thing that the report lacks."""
    missing = []
    if status.slides is None:
        missing.append("slides.csv is not written yet: the run has not listed its slides.")
    waiting = sum(row.state in ("in progress", "begun", "pending") for row in rows)
    if waiting:
        missing.append(
            f"The run is not finished: {len(sums.done):,} of {len(rows):,} slides are done, and only "
            f"these are counted here; {waiting:,} are not done yet."
        )
    if estimated := sum(row.state == "estimated" for row in rows):
        missing.append(
            f"Slides that are estimated from a part of them, and are not counted in the sums: {estimated:,}."
        )
    if bad := len(sums.done) - len(sums.good):
        missing.append(f"Tables that cannot be read, and are not counted: {bad:,}. The section of each slide says why.")
    return missing


def _densities(sums: _Sums) -> list[Strip]:
    """Return dot plots of each slide's nuclei per mm² of tissue: one of all nuclei, and one per class."""
    names: dict[NucleusClass | None, str] = {None: "nuclei_per_mm2"}
    names |= {kind: f"{kind.name}_per_mm2" for kind in sums.classes}
    return strips(
        {
            kind: [
                (row.summary[name], f"{row.slide_id}: {row.summary[name]:,.0f}")
                for row in sums.good
                if isinstance(row.summary.get(name), int | float)
            ]
            for kind, name in names.items()
        }
    )


def _card(layout: RunLayout, sums: _Sums, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the model's card as JSON values; None if it is not available.

    It is read from a prediction store, or from the package if that still has the hash in run.json.
    """
    for table in sums.tables:
        store = read_json(layout.slide(table.slide_id).predictions_zarr / "zarr.json") or {}
        if card := store.get("attributes", {}).get("model"):
            return dict(card)
    try:
        package = find_package(str(run.get("model_id")))
    except HoverBatchError:
        return None
    return package.card.to_json() if package.sha256 == run.get("model_sha256") else None
