"""What a report shows, as its templates are given it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hover_batch.quality.flags import Flag
from hover_batch.report.charts import Histogram, Strip
from hover_batch.report.pictures import Heatmap
from hover_batch.taxonomy import NucleusClass

State = Literal["done", "failed", "left out", "under way", "begun", "pending"]


@dataclass(frozen=True)
class SlideRow:
    """One line of the table of slides. `summary`: the columns of `export.summary` by name, empty where it is not done;
    `note`: how far it is, or why it failed; `page`: the file with its pictures, "" where they are on the same page and
    None where it has none."""

    slide_id: str
    row: int | None
    state: State
    note: str = ""
    patient_id: str | None = None
    group: str | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    flags: Sequence[Flag] = ()
    page: str | None = None

    @property
    def seconds(self) -> float | None:
        """Of all stages together, where the slide is done."""
        stages = self.stages
        return sum(stages.values()) if stages else None

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage."""
        return stages_of(self.summary)


@dataclass(frozen=True)
class Crop:
    """A field of the slide with its contours. `side_um`: of its longer side; `nuclei`: drawn in it."""

    picture: str
    x0: int
    y0: int
    side_um: float
    nuclei: int


@dataclass(frozen=True)
class SlideDetail:
    """The pictures of one slide, as data URIs, None where the file is not there. `missing` says what is, and why;
    `overlay_file`: the full overlay, relative to the page."""

    row: SlideRow
    extra: Mapping[str, str]
    mpp: float | None
    thumbnail: str | None
    overlay: str | None
    overlay_file: str | None
    heatmaps: Sequence[Heatmap]
    crops: Sequence[Crop]
    missing: Sequence[str]


@dataclass(frozen=True)
class Flagged:
    """A slide to look at. `thumbnail`: a data URI; None where the file is not there, or many slides are flagged."""

    row: SlideRow
    thumbnail: str | None


@dataclass(frozen=True)
class Share:
    """Nuclei of one class in the cohort. `share`: of all nuclei, None where there are none."""

    kind: NucleusClass
    count: int
    share: float | None
    per_mm2: float | None


@dataclass(frozen=True)
class Report:
    """All that the front page says. `stands`: the lines of `status`, `facts`: name → value in words; `missing`: what
    cannot be shown, and why."""

    title: str
    written: str
    version: str
    stands: Sequence[str]
    counts: Mapping[str, int]
    facts: Mapping[str, str]
    missing: Sequence[str]
    flagged: Sequence[Flagged]
    classes: Sequence[NucleusClass]
    shares: Sequence[Share]
    rows: Sequence[SlideRow]
    cohort: Mapping[str, Any]
    densities: Sequence[Strip]
    histograms: Sequence[Histogram]
    failures: Sequence[SlideRow]
    card: Mapping[str, Any] | None
    settings: str | None
    versions: Mapping[str, str] | None
    run: Mapping[str, Any]

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of all slides by stage."""
        return stages_of(self.cohort)


def stages_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Stage → seconds, of a row of the summary."""
    prefix = "seconds_"
    return {k.removeprefix(prefix): v for k, v in summary.items() if k.startswith(prefix) and v is not None}
