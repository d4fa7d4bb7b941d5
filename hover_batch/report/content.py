"""Content of a report, as the templates receive it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hover_batch.quality.flags import Flag
from hover_batch.report.charts import Histogram, Strip
from hover_batch.report.pictures import Heatmap
from hover_batch.taxonomy import NucleusClass

State = Literal["done", "estimated", "failed", "left out", "in progress", "begun", "pending"]


@dataclass(frozen=True)
class SlideRow:
    """Row of the table of slides."""

    slide_id: str
    """Id of the slide; for an invalid row, its name in messages."""
    row: int | None
    """Row in the cohort; None if unknown."""
    state: State
    """State of the slide; `left out` for an invalid row."""
    note: str = ""
    """Progress, estimate, or reason of the failure."""
    patient_id: str | None = None
    """Patient; None if the cohort gives none."""
    group: str | None = None
    """Group of slides; None if the cohort gives none."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Columns of `export.summary` by name; empty unless the slide is done."""
    warnings: Sequence[str] = ()
    """Sentences about the slide, such as an unusual pixel size."""
    flags: Sequence[Flag] = ()
    """Quality flags; empty unless the slide is done."""
    page: str | None = None
    """Link to the page with the pictures; "" if they are on the same page, None if there are none."""

    @property
    def seconds(self) -> float | None:
        """Total seconds of all stages of the slide; None if none is known. Slides that are not done have none."""
        stages = self.stages
        return sum(stages.values()) if stages else None

    @property
    def stages(self) -> dict[str, float]:
        """Seconds that the slide took in each stage, by stage; empty unless the slide is done."""
        return stages_of(self.summary)


@dataclass(frozen=True)
class Crop:
    """Field of a slide with contours drawn on it."""

    picture: str
    """JPEG data URI."""
    x0: int
    """Left edge in level-0 pixels."""
    y0: int
    """Upper edge in level-0 pixels."""
    side_um: float
    """Width in µm."""
    nuclei: int
    """Number of nuclei drawn."""


@dataclass(frozen=True)
class SlideDetail:
    """Pictures of one slide, as data URIs; None for a picture whose file is missing."""

    row: SlideRow
    """Row of the slide in the table."""
    extra: Mapping[str, str]
    """Cohort CSV's own columns."""
    mpp: float | None
    """Pixel size of level 0 in µm; None if the table cannot be read."""
    thumbnail: str | None
    """Thumbnail with the tissue's outline, as a JPEG data URI."""
    overlay: str | None
    """Reduced overlay, as a JPEG data URI."""
    overlay_file: str | None
    """Link from the page to the full overlay; None if the report is outside of the run's folder."""
    heatmaps: Sequence[Heatmap]
    """Heatmaps of density; empty if the table cannot be read."""
    crops: Sequence[Crop]
    """Crops with contours; empty if the slide cannot be opened."""
    missing: Sequence[str]
    """One sentence for each thing that is missing."""


@dataclass(frozen=True)
class Flagged:
    """Slide with quality flags."""

    row: SlideRow
    """Row of the slide in the table."""
    thumbnail: str | None
    """JPEG data URI; None if the file is missing, or many slides are flagged."""


@dataclass(frozen=True)
class Share:
    """Number of nuclei of one class in the cohort."""

    kind: NucleusClass
    """Class of the nuclei."""
    count: int
    """Number of nuclei."""
    share: float | None
    """Share of all nuclei; None if there are none."""
    per_mm2: float | None
    """Nuclei per mm² of tissue; None if the area is unknown or 0."""


@dataclass(frozen=True)
class Report:
    """Content of the front page."""

    title: str
    """Title of the page."""
    written: str
    """Time of the report, in UTC."""
    version: str
    """Version of hover-batch."""
    status: Sequence[str]
    """First lines of `hover-batch status`."""
    counts: Mapping[str, int]
    """Number of slides by state."""
    facts: Mapping[str, str]
    """Figures of the cohort by name, as text."""
    missing: Sequence[str]
    """One sentence for each thing that the report lacks."""
    flagged: Sequence[Flagged]
    """Slides with quality flags."""
    estimated: Sequence[SlideRow]
    """Slides whose density is estimated from a part of them."""
    classes: Sequence[NucleusClass]
    """Classes without the background; empty if no table can be read."""
    shares: Sequence[Share]
    """Number of nuclei of each class."""
    rows: Sequence[SlideRow]
    """All slides, in the order of the cohort."""
    cohort: Mapping[str, Any]
    """Cohort's row of the summary; empty if no table can be read."""
    densities: Sequence[Strip]
    """Dot plots of nuclei per mm² of tissue."""
    histograms: Sequence[Histogram]
    """Histograms of measurements by class."""
    failures: Sequence[SlideRow]
    """Failed slides and invalid rows of the cohort."""
    card: Mapping[str, Any] | None
    """Model's card; None if it is not available."""
    settings: str | None
    """Content of settings.toml; None if the file is missing."""
    versions: Mapping[str, str] | None
    """Content of versions.json; None if the file is missing."""
    run: Mapping[str, Any]
    """Content of run.json, and the folder."""

    @property
    def done_with_interval(self) -> bool:
        """True if at least one slide has an interval for its number of nuclei."""
        return any(row.summary.get("nuclei_low") is not None for row in self.rows)

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage, summed over all slides."""
        return stages_of(self.cohort)


def stages_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds by stage, from the columns `seconds_STAGE` of a summary's row. Missing values are left out.

    `summary`: the row, as values by column.
    """
    prefix = "seconds_"
    return {k.removeprefix(prefix): v for k, v in summary.items() if k.startswith(prefix) and v is not None}
