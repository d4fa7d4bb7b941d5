"""Compare all slides of two runs, one slide in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hover_batch.diff.cohort import LEVEL, CohortDiff, Limits
from hover_batch.diff.match import MIN_IOU
from hover_batch.diff.places import Place, draw, find_places
from hover_batch.diff.runs import Missing, Runs
from hover_batch.diff.slide import ALL, SlideDiff
from hover_batch.errors import InputError, SlideError
from hover_batch.export.read import NucleiTable
from hover_batch.progress import ProgressCounter
from hover_batch.taxonomy import NucleusClass

PLACES = 12
"""Maximum number of places that are shown."""

Notify = Callable[[str], None]


@dataclass(frozen=True)
class RunsDiff:
    """Differences between two runs."""

    runs: Runs
    """The runs."""
    cohort: CohortDiff
    """Differences by slide and in the cohort."""
    places: Sequence[Place]
    """Places that differ most, with their pictures if these were wanted."""
    classes: tuple[Sequence[NucleusClass], Sequence[NucleusClass]]
    """Classes of A and of B, for the legend; empty if no slide is compared."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of diff.json as JSON values by name: all results except the pictures.

        - `format`, `a` and `b` (the runs), `min_iou`, `endpoint`, `tolerance`, `min_matched`, `faults`;
        - `slides`: see `SlideDiff.to_json`; each also has `patient_id`, None if it is not known;
        - `not_compared`: for each slide that is not compared its `slide_id`, `done_in` and `reason` (see `Missing`);
        - `cohort`: `slides` (their number), `unit`, `level`, `relative_change` (the fields of `MeanChange` by
          endpoint), `confusion` (see `Confusion.to_json`), `classes_only_in_a` and `classes_only_in_b`;
        - `places`: each with `slide_id`, `box` (`x0`, `y0`, `x1`, `y1` in level-0 pixels), and the numbers of nuclei
          that differ, `only_a`, `only_b` and `class_changed`.
        """
        cohort = self.cohort
        confusion = cohort.confusion
        return {
            "format": "hover-batch diff",
            "a": self.runs.first.to_json(),
            "b": self.runs.second.to_json(),
            "min_iou": MIN_IOU,
            "endpoint": cohort.limits.endpoint,
            "tolerance": cohort.limits.tolerance,
            "min_matched": cohort.limits.min_matched,
            "faults": cohort.faults,
            "slides": [
                slide.to_json() | {"patient_id": cohort.patients.get(slide.slide_id)} for slide in cohort.slides
            ],
            "not_compared": [asdict(missing) for missing in cohort.missing],
            "cohort": {
                "slides": len(cohort.slides),
                "unit": cohort.unit,
                "level": LEVEL,
                "relative_change": {name: asdict(cohort.mean_change(name)) for name in cohort.endpoints},
                "confusion": None if confusion is None else confusion.to_json(),
                "classes_only_in_a": [] if confusion is None else confusion.only_in_rows,
                "classes_only_in_b": [] if confusion is None else confusion.only_in_columns,
            },
            "places": [
                {"slide_id": p.slide_id, "box": asdict(p.box)}
                | {"only_a": p.counts[0], "only_b": p.counts[1], "class_changed": p.counts[2]}
                for p in self.places
            ],
        }


def diff_runs(first: Path, second: Path, limits: Limits, *, pictures: bool, notify: Notify) -> RunsDiff:
    """Compare the runs in two folders, one slide after the other.

    Slides whose tables cannot be read are listed in `cohort.missing` of the result; they raise no error.

    `first`, `second`: folders of A and B. `limits`: differences that a validation accepts. `pictures`: whether to draw
    the places that differ most. `notify`: function that is called with a line about each slide.

    InputError if a folder holds no run, a file of a run is corrupted, the runs are not on the same slides, or the
    endpoint is not a class of both. OSError if a file of a run cannot be read. SlideError if a table can no longer be
    read when its places are drawn.
    """
    runs = Runs.open(first, second)
    slides: list[SlideDiff] = []
    unreadable: list[Missing] = []
    places: list[Place] = []
    classes: tuple[Sequence[NucleusClass], Sequence[NucleusClass]] = (), ()
    progress = ProgressCounter("slides")
    progress.expect(len(runs.shared))
    for slide_id in runs.shared:
        try:
            tables = [NucleiTable.open(layout.nuclei_parquet) for layout in runs.layouts(slide_id)]
            _check_endpoint(limits.endpoint, tables)
            rows = " and ".join(f"{table.rows:,}" for table in tables)
            notify(f"{progress.line}; {slide_id}: {rows} nuclei")
            done = [side.done[slide_id] for side in (runs.first, runs.second)]
            slide = SlideDiff.of(tables[0], tables[1], done)
        except SlideError as error:
            unreadable.append(Missing(slide_id, "both", str(error)))
            notify(f"{slide_id}: {error}")
        else:
            places += find_places(slide, tables[0].level0, tables[0].mpp)
            places = sorted(places, key=lambda place: -sum(place.counts))[:PLACES]
            classes = tables[0].taxonomy.nuclei, tables[1].taxonomy.nuclei
            slides.append(replace(slide, disputed=slide.disputed[:0], kinds=slide.kinds[:0]))
        progress.advance()
    records = (runs.second.records, runs.first.records)
    patients = {i: r.patient_id for by_id in records for i, r in by_id.items() if r.patient_id is not None}
    compared = {slide.slide_id for slide in slides}
    patients = {slide_id: patient for slide_id, patient in patients.items() if slide_id in compared}
    cohort = CohortDiff.of(slides, [*runs.missing, *unreadable], patients, limits)
    if pictures:
        places = [_drawn(place, runs) for place in places]
    return RunsDiff(runs, cohort, places, classes)


def _check_endpoint(endpoint: str, tables: Sequence[NucleiTable]) -> None:
    """Check that both tables have the class `endpoint`. InputError if one has not."""
    for run, table in zip("AB", tables, strict=True):
        names = [ALL, *(c.name for c in table.taxonomy.nuclei)]
        if endpoint not in names:
            raise InputError(f"--of {endpoint}: is no class of {run}; give one of {', '.join(names)}")


def _drawn(place: Place, runs: Runs) -> Place:
    """Return the place with its pictures."""
    layouts = runs.layouts(place.slide_id)
    tables = [NucleiTable.open(layout.nuclei_parquet) for layout in layouts]
    records = [side.records[place.slide_id] for side in (runs.first, runs.second)]
    return draw(place, layouts, tables, records)
