"""Read the files of a run's folder: run.json, slides.csv and each slide's slide.json. Nothing is written.

All commands read a run through this module, so that a missing or corrupted file gives the same message in each.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hover_batch.cohort.csv_rows import COLUMNS, MPP_COLUMNS, RUN_COLUMNS
from hover_batch.cohort.layout import RunLayout, SlideLayout
from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.errors import InputError
from hover_batch.files import json_object, read_file, read_json
from hover_batch.formatting import counted, listed
from hover_batch.geometry import Mpp

RUN_FORMAT = "hover-batch run"
"""Value of `format` in run.json, which distinguishes it from files of that name by other programs."""
_COUNTS = ("nuclei", "slides", "failed")
_DENSITY = ("per_mm2", "low", "high")
_MAX_NUMBER = 1e100
_MAX_COUNT = 1 << 53
_NUMBERS = (
    "tissue_mm2", "nuclei_per_mm2", "area_um2_p50", "solidity_p50", "nuclei_low", "nuclei_high", "nuclei_per_mm2_low",
    "nuclei_per_mm2_high",
)  # fmt: skip
"""Columns in the summary of a finished slide that are numbers; a cohort's own columns never have these names."""


def read_run(layout: RunLayout, flag: str = "") -> dict[str, Any] | None:
    """Return the content of run.json, as JSON values by name; None if it does not exist.

    `layout`: paths of the run. `flag`: option that named the folder, for the message; empty if there is none.

    InputError if the file is corrupted or was written by another program, OSError if it cannot be read.
    """
    content = read_file(layout.run_json)
    if content is None:
        return None
    run = json_object(content)
    if run is not None and run.get("format") != RUN_FORMAT:
        raise InputError(f"{_named(layout, flag)}: its run.json was written by another program; name another folder")
    if run is None or not _is_as_written(run):
        raise InputError(
            f"{_named(layout, flag)}: its run.json is corrupted; restore it from a backup, or run the cohort into "
            "another folder"
        )
    return run


def _is_as_written(run: Mapping[str, Any]) -> bool:
    """Whether the values of a run.json that commands compute with have the types that `segment` writes."""
    try:
        batch = run["results_key"]["infer"]["batch"] if "results_key" in run else 1
    except (KeyError, TypeError):
        return False
    return type(batch) is int and isinstance(run.get("command", []), list)


def require_run(layout: RunLayout, flag: str = "") -> dict[str, Any]:
    """Return the content of run.json, as JSON values by name.

    `layout`: paths of the run. `flag`: option that named the folder, for the message; empty if there is none.

    InputError if the folder holds no run, or run.json is corrupted or was written by another program; OSError if it
    cannot be read.
    """
    run = read_run(layout, flag)
    if run is None:
        raise InputError(f"{_named(layout, flag)}: holds no run; give the --output folder of `segment`")
    return run


def _named(layout: RunLayout, flag: str) -> str:
    """Return the folder as messages name it: after its option, if there is one."""
    return f"{flag} {layout.root}".lstrip()


def read_slides(layout: RunLayout) -> tuple[SlideRecord, ...] | None:
    """Return the cohort's slides in the order of slides.csv; None if the file has not been written yet.

    `layout`: paths of the run.

    InputError if the file is corrupted, or invalid after an edit, OSError if it cannot be read.
    """
    content = read_file(layout.slides_csv)
    if content is None:
        return None
    try:
        rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
        if "slide_id" not in (rows.fieldnames or ()):  # an empty file would pass for a run without slides
            raise ValueError("no column slide_id")
        records = tuple(_record(layout, row) for row in rows)
        if twice := [name for name, number in Counter(record.slide_id for record in records).items() if number > 1]:
            raise ValueError(f"slide_id {twice[0]} in several rows")
        return records
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{layout.slides_csv}: is corrupted or was edited ({error}); repeat the segment command, which writes it "
            "again"
        ) from error


def _record(layout: RunLayout, row: dict[str, str]) -> SlideRecord:
    """Parse a row of slides.csv. InputError, KeyError, TypeError or ValueError if it is invalid."""
    if None in row:  # where DictReader puts them
        raise ValueError(f"row {row['row']} has more cells than the header")
    cells = {name: cell for name, cell in row.items() if cell}
    x, y = (cells.get("mpp", cells.get(name)) for name in MPP_COLUMNS)
    return SlideRecord(
        slide_id=layout.slide(row["slide_id"]).slide_id,  # InputError if it could leave the folder
        path=Url.of(row["path"]) or Path(row["path"]),
        row=int(row["row"]),
        mpp=Mpp(float(x), float(y)) if x and y else None,
        magnification=float(cells["magnification"]) if "magnification" in cells else None,
        mask_path=Path(cells["mask_path"]) if "mask_path" in cells else None,
        patient_id=cells.get("patient_id"),
        group=cells.get("group"),
        extra={name: value for name, value in row.items() if name not in (*COLUMNS, *RUN_COLUMNS)},
    )


def slide_layouts(layout: RunLayout) -> dict[str, SlideLayout]:
    """Return the paths of the cohort's slides by slide_id, in the order of slides.csv.

    The result is empty if slides.csv has not been written yet.

    `layout`: paths of the run.

    InputError if slides.csv is corrupted, or invalid after an edit, OSError if it cannot be read.
    """
    return {record.slide_id: layout.slide(record.slide_id) for record in read_slides(layout) or ()}


def unlisted_slides(layout: RunLayout, known: Collection[str]) -> list[str]:
    """Return the sorted slide_ids of the slides with a slide.json in the folder of the run that are not in `known`.

    Folders whose name is not a slide_id are skipped. `layout`: paths of the run.
    """
    unlisted = []
    for path in sorted(layout.slides.glob("*/slide.json")):
        if path.parent.name not in known:
            with contextlib.suppress(InputError):
                unlisted.append(layout.slide(path.parent.name).slide_id)
    return unlisted


def note_of_unlisted(layout: RunLayout) -> str:
    """Return a note on finished slides in the folder of the run that slides.csv does not list; "" if there are none.

    They remain from other cohorts that were run into the same folder; commands leave them out.

    `layout`: paths of the run.

    InputError if slides.csv is corrupted, or invalid after an edit, OSError if it cannot be read.
    """
    # slides.csv is not read in a folder without slides, so that the command's own message comes first.
    if not layout.slides.is_dir() or not (others := unlisted_slides(layout, slide_layouts(layout))):
        return ""
    return (
        f"{layout.root}: {counted(len(others), 'finished slide')} {'is' if len(others) == 1 else 'are'} not in "
        f"{layout.slides_csv.name} and left out ({listed(others)}); to include all slides, run a cohort that lists them"
    )


def nuclei_if_done(slide: SlideLayout) -> int | None:
    """Return the number of nuclei of a slide; None if the slide is not finished (see `slide_if_done`).

    `slide`: paths of the slide's results. OSError if slide.json cannot be read.
    """
    done = slide_if_done(slide)
    return None if done is None else int(done["nuclei"])


def slide_if_done(slide: SlideLayout, failed_at: datetime | None = None) -> dict[str, Any] | None:
    """Return the content of a finished slide's slide.json; None if the slide is not finished.

    The slide does not count as finished if its file belongs to another slide, is corrupted, or has values of other
    types or ranges than `segment` writes. In these cases, `segment` processes the slide again.

    `slide`: paths of the slide's results. `failed_at`: time when the slide failed since the run was last started; None
    if it did not. A slide.json that was written before this time does not count, because the last start has already
    rejected it.

    OSError if the file cannot be read.
    """
    try:
        modified = slide.slide_json.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    stored = read_json(slide.slide_json) or {}
    if failed_at is not None and modified < failed_at.timestamp():
        return None
    is_own = stored.get("slide_id", slide.slide_id) == slide.slide_id
    return stored if is_own and _is_well_formed(stored) else None


COMPLETING = "with --stop-at 0 and without --of"
"""How the command of an estimate must be changed to complete it; --stop-at may also come from a file."""


def estimate_of(slide: SlideLayout) -> dict[str, Any] | None:
    """Return the content of a slide's estimate.json; None if the slide is not estimated from a part of it.

    The result is None if a slide.json exists, because the whole slide is done, or if estimate.json does not exist, is
    corrupted or belongs to another slide. In the last two cases, `segment` estimates the slide again.

    `slide`: paths of the slide's results. OSError if the file cannot be read.
    """
    stored = read_json(slide.estimate_json)
    if stored is None or stored.get("slide_id") != slide.slide_id or slide.slide_json.exists():
        return None
    return stored if _is_estimate(stored) else None


def why_not_done(slide: SlideLayout) -> str:
    """Return why a slide has no table of all its nuclei, and the remedy, as the predicate of a sentence.

    The predicate begins with "is"; the name of the slide goes before it.

    `slide`: paths of the results of a slide that is not done. OSError if estimate.json cannot be read.
    """
    if estimate_of(slide) is not None:
        return f"is only estimated from a part of it; repeat the segment command {COMPLETING} to complete it"
    return "is not done; see failures.csv, or repeat the segment command to finish it"


def estimate_line(estimate: Mapping[str, Any]) -> str:
    """Return the estimated density of a slide and its interval, per mm² of tissue, as a phrase for the user.

    An example is "2,310 nuclei per mm² of tissue (2,200 to 2,420), estimated from 40 of 400 clusters".

    `estimate`: content of `estimate` in estimate.json.
    """
    density = estimate["densities"][estimate["of"]]
    per_mm2, low, high = (f"{density[name]:,.0f}" for name in ("per_mm2", "low", "high"))
    return (
        f"{per_mm2} {estimate['of']} per mm² of tissue ({low} to {high}), estimated from "
        f"{estimate['clusters']:,} of {estimate['of_clusters']:,} clusters"
    )


def _is_well_formed(stored: Mapping[str, Any]) -> bool:
    """Whether the values of a slide.json that commands compute with have the types that `segment` writes."""
    summary, quality, limits = (stored.get(name, {}) for name in ("summary", "quality", "limits"))
    if not all(isinstance(section, dict) for section in (summary, quality, limits)):
        return False
    counts = [summary.get(name) for name in _COUNTS if summary]
    ends = [[summary.get(f"{name}_{end}") is None for end in ("low", "high")] for name in ("nuclei", "nuclei_per_mm2")]
    return (
        _are_counts([stored.get("nuclei"), *counts])
        and summary.get("status", "done") == "done"
        and _is_row(summary)
        and all(low == high for low, high in ends)
        and all(_is_number(value) for name, value in quality.items() if name != "sharpness")
        and _are_numbers(quality.get("sharpness", []))
        and all(_are_numbers(pair) and len(pair) == 2 for pair in limits.values())
        and _are_texts(stored)
    )


def _is_estimate(stored: Mapping[str, Any]) -> bool:
    """Whether the values of an estimate.json that commands compute with have the types that `segment` writes."""
    estimate, summary = stored.get("estimate"), stored.get("summary")
    if not (isinstance(estimate, dict) and isinstance(summary, dict)):
        return False
    densities, of = estimate.get("densities"), estimate.get("of")
    if not (isinstance(densities, dict) and isinstance(of, str) and of in densities):
        return False
    if not all(isinstance(density, dict) and set(_DENSITY) <= set(density) for density in densities.values()):
        return False
    numbers = [estimate.get(name) for name in ("stop_at", "clusters", "of_clusters", "tiles", "of_tiles")]
    numbers += [densities[of][name] for name in _DENSITY]
    return (
        all(map(_is_number, numbers))
        and all(value is None or _is_number(value) for density in densities.values() for value in density.values())
        and summary.get("status") == "estimated"
        and _are_counts([summary.get("slides"), summary.get("failed")])
        and _is_row(summary)
        and isinstance(stored.get("warnings"), list)
        and _are_texts(stored)
    )


def _is_row(summary: Mapping[str, Any]) -> bool:
    """Whether the numbers of a summary's row are numbers or missing, and its other values could be those of a CSV."""
    numbers = [value for name, value in summary.items() if name in _NUMBERS or name.startswith("estimated_")]
    seconds = [value for name, value in summary.items() if name.startswith("seconds_")]
    return (
        all(value is None or _is_number(value) for value in numbers)
        and all(map(_is_number, seconds))
        and all(value is None or isinstance(value, str) or _is_number(value) for value in summary.values())
    )


def _are_texts(stored: Mapping[str, Any]) -> bool:
    """Whether the warnings are a list of texts, and the hashes are texts."""
    warnings = stored.get("warnings", [])
    texts = [stored.get(name, "") for name in ("run_key", "nuclei_sha256")]
    return isinstance(warnings, list) and all(isinstance(text, str) for text in (*warnings, *texts))


def _are_counts(values: Sequence[object]) -> bool:
    return all(type(value) is int and 0 <= value <= _MAX_COUNT for value in values)


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(map(_is_number, values))


def _is_number(value: object) -> bool:
    """Whether a value is a number that a slide may have: finite and not negative."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MAX_NUMBER
