"""Content of a report, as its templates receive it."""

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
    """Row of the table of slides.

    `row`: row in the cohort, None if it is not known. `summary`: the columns of `export.summary` by name; empty unless
    the slide is done. `note`: its progress, or why it failed. `page`: the file with its pictures, "" if they are on the
    same page, None if it has none.
    """

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
        """Seconds of all stages together; None unless the slide is done."""
        stages = self.stages
        return sum(stages.values()) if stages else None

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of the slide by stage."""
        return stages_of(self.summary)


@dataclass(frozen=True)
class Crop:
    """Field of a slide with contours drawn on it.

    `picture`: data URI. `x0`, `y0`: its upper left corner in level-0 pixels. `side_um`: its width in µm. `nuclei`:
    number of nuclei drawn.
    """

    picture: str
    x0: int
    y0: int
    side_um: float
    nuclei: int


@dataclass(frozen=True)
class SlideDetail:
    """Pictures of one slide, as data URIs; None if a file is missing.

    `extra`: the cohort CSV's own columns. `mpp`: µm per level-0 pixel. `overlay_file`: link from the page to the full
    overlay. `missing`: a sentence for each picture that is missing.
    """

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
    """Nuclei of one class in the cohort.

    `share`: of all nuclei, None if there are none; `per_mm2`: per mm² of tissue.
    """

    kind: NucleusClass
    count: int
    share: float | None
    per_mm2: float | None


@dataclass(frozen=True)
class Report:
    """Content of the front page.

    `stands`: the first lines of `status`. `counts`: slides by state. `facts`: figures by name, as text. `missing`: a
    sentence for each thing that cannot be shown. `card`, `settings`, `versions`, `run`: provenance.
    """

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
        """Seconds of all slides together, by stage."""
        return stages_of(self.cohort)


def stages_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds by stage from a row of the summary."""
    prefix = "seconds_"
    return {k.removeprefix(prefix): v for k, v in summary.items() if k.startswith(prefix) and v is not None}
