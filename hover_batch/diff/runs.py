"""Open two runs for their comparison: the slides that both have done, and those that only one has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hover_batch.cohort.layout import RunLayout, SlideLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.cohort.run_folder import read_slides, require_run, slide_if_done, why_not_done
from hover_batch.errors import InputError, SlideError
from hover_batch.formatting import LISTED
from hover_batch.slide.survey import read_info
from hover_batch.status import read_status


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    layout: RunLayout
    """Paths of its results."""
    model: str
    """Name of its model."""
    model_sha256: str
    """Hash of its model."""
    records: Mapping[str, SlideRecord]
    """Its slides by slide_id, in the order of its cohort."""
    done: Mapping[str, Mapping[str, Any]]
    """Content of slide.json of its finished slides by slide_id."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Reasons of its failed slides by slide_id."""

    @classmethod
    def open(cls, folder: Path, name: str) -> Self:
        """Read the run in `folder`: its cohort, the slide.json of its finished slides, and its failures.

        `name`: A or B, the name of the run in messages.

        InputError if the folder holds no run, or a file in it is corrupted; OSError if a file cannot be read.
        """
        layout = RunLayout(folder)
        run = require_run(layout, name)
        records = {record.slide_id: record for record in read_slides(layout) or ()}
        failures = {f.slide_id: f"failed ({f.reason})" for f in read_status(folder).failures if f.slide_id in records}
        done = {}
        for slide_id in records:
            content = None if slide_id in failures else slide_if_done(layout.slide(slide_id))
            if content is not None:
                done[slide_id] = content
        return cls(layout, str(run.get("model_id")), str(run.get("model_sha256")), records, done, failures)

    def reason(self, slide_id: str) -> str:
        """Return why the slide `slide_id` is not done in this run, as a phrase for messages.

        OSError if a file of the slide cannot be read.
        """
        if slide_id not in self.records:
            return "not in the cohort"
        return self.failures.get(slide_id) or why_not_done(self.layout.slide(slide_id))

    def to_json(self) -> dict[str, Any]:
        """Return `folder`, `model`, `model_sha256`, `slides` (their number) and `done` (number of finished slides)."""
        return {
            "folder": str(self.layout.root),
            "model": self.model,
            "model_sha256": self.model_sha256,
            "slides": len(self.records),
            "done": len(self.done),
        }


@dataclass(frozen=True)
class Missing:
    """Slide that cannot be compared."""

    slide_id: str
    """Id of the slide."""
    done_in: str
    """Run in which it is done: A, B, both (its tables cannot be read) or neither."""
    reason: str
    """Why it is not done in the other, or cannot be read."""


@dataclass(frozen=True)
class Runs:
    """Two runs on the same slides."""

    first: Side
    """Run A."""
    second: Side
    """Run B."""
    shared: Sequence[str]
    """Slides that are done in both, in the order of A."""
    missing: Sequence[Missing]
    """Slides that are not done in both."""

    @classmethod
    def open(cls, first: Path, second: Path) -> Self:
        """Read the runs in two folders, and check that slides with the same slide_id are the same slide.

        Size, pixel size and fingerprint of slides that both runs have done are compared. A slide is not checked if its
        survey.json is missing or corrupted in one of the runs.

        `first`, `second`: folders of A and B.

        InputError if a folder holds no run, a file of a run is corrupted, the runs have no slide_id in common, or a
        slide is not the same in both. OSError if a file cannot be read.
        """
        a, b = Side.open(first, "A"), Side.open(second, "B")
        if not a.records.keys() & b.records.keys():
            raise InputError(
                f"{first} and {second}: have no slide_id in common; give runs on the same slides, with the same ids in "
                "the column slide_id of both cohorts"
            )
        ids = list(dict.fromkeys([*a.records, *b.records]))
        shared = [slide_id for slide_id in ids if slide_id in a.done and slide_id in b.done]
        faults = [fault for slide_id in shared if (fault := _difference(*_layouts(a, b, slide_id)))]
        if faults:
            more = [f"  … and {len(faults) - LISTED:,} more"] if len(faults) > LISTED else []
            raise InputError(
                "\n".join(
                    [
                        f"{first} and {second}: these slides are not the same, so their nuclei cannot be matched:",
                        *faults[:LISTED],
                        *more,
                        "Give runs on the same files, with the same mpp in both cohorts. Scans of other scanners can "
                        "only be compared by summary.csv.",
                    ]
                )
            )
        return cls(a, b, shared, [_missing(a, b, slide_id) for slide_id in ids if slide_id not in set(shared)])

    def layouts(self, slide_id: str) -> tuple[SlideLayout, SlideLayout]:
        """Return the paths of the results of the slide `slide_id` in A and in B."""
        return _layouts(self.first, self.second, slide_id)


def _layouts(first: Side, second: Side, slide_id: str) -> tuple[SlideLayout, SlideLayout]:
    return first.layout.slide(slide_id), second.layout.slide(slide_id)


def _missing(first: Side, second: Side, slide_id: str) -> Missing:
    """Return why a slide is not compared."""
    if slide_id in first.done:
        return Missing(slide_id, "A", f"B: {second.reason(slide_id)}")
    if slide_id in second.done:
        return Missing(slide_id, "B", f"A: {first.reason(slide_id)}")
    return Missing(slide_id, "neither", f"A: {first.reason(slide_id)}; B: {second.reason(slide_id)}")


def _difference(first: SlideLayout, second: SlideLayout) -> str:
    """Return how a slide of A differs from that of B; "" if it does not, or a survey.json is missing or corrupted.

    Older versions wrote no survey.json: then only size and pixel size are compared, with those of the tables.
    """
    try:
        a, b = (read_info(slide.survey_json) for slide in (first, second))
    except (OSError, SlideError):
        return ""
    if a.level0 != b.level0:
        sizes = " and ".join(f"{info.level0.width:,} × {info.level0.height:,}" for info in (a, b))
        return f"  {first.slide_id}: {sizes} pixels"
    if a.mpp != b.mpp:
        return f"  {first.slide_id}: pixels of {a.mpp} and {b.mpp} µm"
    if a.fingerprint != b.fingerprint:
        return f"  {first.slide_id}: another file, or its mpp is in one cohort CSV only"
    return ""
