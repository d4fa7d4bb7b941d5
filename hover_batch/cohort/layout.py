"""Every path of a run's output, named once.

::

    out/
      run.json  settings.toml  versions.json  slides.csv  failures.csv  summary.csv  summary.parquet
      report.html  report-slides/  (by `report`)
      logs/events.jsonl  logs/ray.log   example/ (with --example)
      slides/<slide_id>/
        key.json            the run key that this slide's unfinished work belongs to
        quarantine.json     why the slide is left alone, if it is
        markers/            one file a unit: its shard is complete
        parts/              one parquet a region: its nuclei
        survey.json         the slide's header and tissue: with the store, all that new tables need
        predictions.zarr  tissue.geojson  nuclei.parquet  thumbnail.jpg  overlay.jpg  timings.json
        slide.json          written last = done
        nuclei.*            the table in other formats, by `export`
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hover_batch.cohort.slide_id import fault_in
from hover_batch.errors import InputError


class Format(StrEnum):
    """What a table of nuclei can be exported to, by the name that the command line has for it."""

    qupath = "qupath"
    annotation_store = "annotation-store"
    hovernet = "hovernet"
    spatialdata = "spatialdata"
    anndata = "anndata"
    csv = "csv"

    @property
    def suffix(self) -> str:
        """Of the file's name, behind the dot."""
        return _SUFFIXES[self]


_SUFFIXES = {
    Format.qupath: "geojson.gz",
    Format.annotation_store: "db",
    Format.hovernet: "json",
    Format.spatialdata: "spatialdata.zarr",
    Format.anndata: "h5ad",
    Format.csv: "csv",
}


@dataclass(frozen=True)
class SlideLayout:
    """Where one slide's results lie, in the run at `root`. An id that could leave the run's folder is an InputError."""

    root: Path
    slide_id: str

    def __post_init__(self) -> None:
        if fault := fault_in(self.slide_id):
            raise InputError(f"slide_id {self.slide_id!r} {fault}")

    @property
    def folder(self) -> Path:
        return self.root / "slides" / self.slide_id

    @property
    def key_json(self) -> Path:
        return self.folder / "key.json"

    @property
    def quarantine_json(self) -> Path:
        """Says of which run key's work processes died, time and again."""
        return self.folder / "quarantine.json"

    @property
    def markers(self) -> Path:
        return self.folder / "markers"

    def marker(self, column: int, row: int) -> Path:
        """Says that the unit in this cell of the unit grid is predicted and stored."""
        return self.markers / f"{column}_{row}.json"

    @property
    def parts(self) -> Path:
        return self.folder / "parts"

    def part(self, column: int, row: int) -> Path:
        """The nuclei owned by the region in this cell of the region grid."""
        return self.parts / f"{column}_{row}.parquet"

    @property
    def survey_json(self) -> Path:
        """What was known of the slide before its first pixel was predicted."""
        return self.folder / "survey.json"

    @property
    def predictions_zarr(self) -> Path:
        return self.folder / "predictions.zarr"

    @property
    def tissue_geojson(self) -> Path:
        return self.folder / "tissue.geojson"

    @property
    def nuclei_parquet(self) -> Path:
        return self.folder / "nuclei.parquet"

    def exported(self, format: Format) -> Path:
        """The table in another format."""
        return self.folder / f"nuclei.{format.suffix}"

    @property
    def thumbnail_jpg(self) -> Path:
        return self.folder / "thumbnail.jpg"

    @property
    def overlay_jpg(self) -> Path:
        return self.folder / "overlay.jpg"

    @property
    def timings_json(self) -> Path:
        return self.folder / "timings.json"

    @property
    def slide_json(self) -> Path:
        return self.folder / "slide.json"

    @property
    def removal_order(self) -> tuple[Path, ...]:
        """All of the slide's paths, what promises before what is promised: a removal that is cut short leaves no
        slide.json without its table and no marker without its shard."""
        return (
            self.slide_json,
            self.parts,
            self.markers,
            self.predictions_zarr,
            self.survey_json,
            self.tissue_geojson,
            *map(self.exported, Format),
            self.nuclei_parquet,
            self.thumbnail_jpg,
            self.overlay_jpg,
            self.timings_json,
            self.quarantine_json,
            self.key_json,
        )


@dataclass(frozen=True)
class RunLayout:
    """Where a run's results lie. `root` is made absolute, since workers may have another working directory."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.absolute())

    def slide(self, slide_id: str) -> SlideLayout:
        return SlideLayout(self.root, slide_id)

    @property
    def lock(self) -> Path:
        """Locked while a run writes here; the file itself stays."""
        return self.root / ".lock"

    @property
    def example(self) -> Path:
        """The slides of `--example`, with their cohort.csv."""
        return self.root / "example"

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def settings_toml(self) -> Path:
        return self.root / "settings.toml"

    @property
    def versions_json(self) -> Path:
        return self.root / "versions.json"

    @property
    def slides_csv(self) -> Path:
        return self.root / "slides.csv"

    @property
    def failures_csv(self) -> Path:
        return self.root / "failures.csv"

    @property
    def summary_csv(self) -> Path:
        return self.root / "summary.csv"

    @property
    def summary_parquet(self) -> Path:
        return self.root / "summary.parquet"

    @property
    def report_html(self) -> Path:
        return self.root / "report.html"

    @property
    def report_slides(self) -> Path:
        """Pages of the report, where one would be too long."""
        return self.root / "report-slides"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def events_jsonl(self) -> Path:
        return self.logs / "events.jsonl"

    @property
    def ray_log(self) -> Path:
        """What Ray had to say while it ran."""
        return self.logs / "ray.log"

    @property
    def slides(self) -> Path:
        return self.root / "slides"
