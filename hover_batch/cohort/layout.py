"""Paths of a run's output, each named once.

::

    out/
      run.json  settings.toml  versions.json  slides.csv  failures.csv  summary.csv  summary.parquet
      report.html  report-slides/  (by `report`)
      logs/events.jsonl  logs/ray.log   example/ (with --example)
      slides/<slide_id>/
        key.json            the run key that this slide's unfinished work belongs to
        quarantine.json     why the slide is quarantined, if it is
        markers/            one file per unit whose shard is complete
        parts/              one Parquet file per region: its nuclei
        survey.json         the slide's header and tissue: with the store, everything that new tables need
        predictions.zarr  tissue.geojson  nuclei.parquet  thumbnail.jpg  overlay.jpg  timings.json
        slide.json          written last: the slide is done
        sample/             with --stop-at: clusters.json, look_*.json; of clusters: markers/, parts/, predictions.zarr
        sampled_nuclei.parquet  estimate.json  (with --stop-at; written last: the slide's density is estimated)
        nuclei.*            the table in other formats, by `export`
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hover_batch.cohort.slide_id import fault_in
from hover_batch.errors import InputError


class Format(StrEnum):
    """Format of an exported table of nuclei; the value is its name on the command line.

    `Format(name)` also accepts the names in ALIASES. `hover_batch.exporting.writer` returns the function that writes a
    format.
    """

    qupath = "qupath"
    annotation_store = "annotation-store"
    hovernet = "hovernet"
    spatialdata = "spatialdata"
    anndata = "anndata"
    ome_zarr = "ome-zarr"
    dicom = "dicom"
    csv = "csv"

    @property
    def suffix(self) -> str:
        """Suffix of an exported file's name, without the first dot, such as geojson.gz."""
        return _SUFFIXES[self]

    @classmethod
    def _missing_(cls, value: object) -> Format | None:
        return ALIASES.get(str(value))


_SUFFIXES = {
    Format.qupath: "geojson.gz",
    Format.annotation_store: "db",
    Format.hovernet: "json",
    Format.spatialdata: "spatialdata.zarr",
    Format.anndata: "h5ad",
    Format.ome_zarr: "ome.zarr",
    Format.dicom: "ann.dcm",
    Format.csv: "csv",
}

ALIASES = {
    "geojson": Format.qupath,
    "hovernet-json": Format.hovernet,
    "ngff": Format.ome_zarr,
    "dicom-ann": Format.dicom,
}
"""Other names of formats, which people try first."""


class PathBelow:
    """Path in a layout: `name` in the folder that is another attribute of the layout, `above`."""

    def __init__(self, above: str, name: str) -> None:
        self._above, self._name = above, name

    def __get__(self, layout: object, kind: type) -> Path:
        return Path(getattr(layout, self._above), self._name)


@dataclass(frozen=True)
class SlideLayout:
    """Paths of one slide's results, whether or not they exist.

    No path leaves the run's folder: InputError if the slide_id cannot name a folder.
    """

    root: Path
    """Folder of the run."""
    slide_id: str
    """Id of the slide in the cohort."""

    def __post_init__(self) -> None:
        if fault := fault_in(self.slide_id):
            raise InputError(f"slide_id {self.slide_id!r} {fault}")

    @property
    def folder(self) -> Path:
        """Folder of all results of the slide."""
        return self.root / "slides" / self.slide_id

    key_json = PathBelow("folder", "key.json")
    """JSON file with the run key of the slide's unfinished work."""
    quarantine_json = PathBelow("folder", "quarantine.json")
    """File with the run key, stage and reason of the slide's quarantine; exists only while it is quarantined."""
    markers = PathBelow("folder", "markers")
    """Folder of the slide's markers, one JSON file per unit that is predicted and stored."""

    def marker(self, column: int, row: int) -> Path:
        """Return the path of a unit's marker, which exists once the unit is predicted and stored.

        `column`, `row`: cell of the unit in the unit grid.
        """
        return self.markers / f"{column}_{row}.json"

    parts = PathBelow("folder", "parts")
    """Folder of the parts of the table of nuclei, one Parquet file per post-processed region."""

    def part(self, column: int, row: int) -> Path:
        """Return the path of the part of the table with the nuclei that a region owns.

        `column`, `row`: cell of the region in the unit grid.
        """
        return self.parts / f"{column}_{row}.parquet"

    survey_json = PathBelow("folder", "survey.json")
    """File with the slide's header and tissue mask, written before the first pixel of the slide is predicted."""
    predictions_zarr = PathBelow("folder", "predictions.zarr")
    """Folder of the prediction store (`PredictionStore`), which holds the slide's predicted maps."""
    tissue_geojson = PathBelow("folder", "tissue.geojson")
    """GeoJSON file with the outline of the tissue in which nuclei are searched for."""
    nuclei_parquet = PathBelow("folder", "nuclei.parquet")
    """Parquet file with the slide's table of nuclei, one row per nucleus."""

    def exported(self, format: Format) -> Path:
        """Return the path of the slide's table of nuclei in another format, whether or not it exists.

        `format`: format of the exported table; it determines the suffix of the path.
        """
        return self.folder / f"nuclei.{format.suffix}"

    thumbnail_jpg = PathBelow("folder", "thumbnail.jpg")
    """JPEG picture of the whole slide with the outline of its tissue."""
    overlay_jpg = PathBelow("folder", "overlay.jpg")
    """JPEG picture of the slide's field with the most nuclei; their contours are drawn on it."""
    timings_json = PathBelow("folder", "timings.json")
    """File with the seconds that the slide took, by stage."""
    slide_json = PathBelow("folder", "slide.json")
    """File with the slide's summary; written last, so that it exists only if the slide is done."""

    @property
    def sample(self) -> SampleLayout:
        """Paths of the slide's results when its density is estimated from clusters (`--stop-at`)."""
        return SampleLayout(self.root, self.slide_id)

    sampled_nuclei_parquet = PathBelow("folder", "sampled_nuclei.parquet")
    """Parquet file with the table of the nuclei in the clusters that were drawn to estimate the slide's density."""
    estimate_json = PathBelow("folder", "estimate.json")
    """File with the slide's estimated densities; written last, only once the estimate is precise enough."""

    @property
    def kept(self) -> tuple[Path, ...]:
        """Paths of the slide's results that a user keeps, files or folders, slide.json last.

        Not included are working files, such as markers and the prediction store, and the results of --stop-at,
        sampled_nuclei.parquet and estimate.json.
        """
        return (
            self.nuclei_parquet,
            self.thumbnail_jpg,
            self.overlay_jpg,
            self.tissue_geojson,
            self.survey_json,
            self.timings_json,
            *map(self.exported, Format),
            self.slide_json,
        )

    @property
    def removal_order(self) -> tuple[Path, ...]:
        """Paths of all the slide's results in the order of removal, with markers before the data that they refer to.

        An interrupted removal therefore leaves no slide.json without its table, and no marker without its shard.
        """
        return (
            self.slide_json,
            self.estimate_json,
            self.sample.working,
            self.sampled_nuclei_parquet,
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
class SampleLayout(SlideLayout):
    """Paths of one slide's results, with the markers, parts and predictions of clusters instead of units."""

    working = PathBelow("folder", "sample")
    """Folder of the working files of the clusters."""
    markers = PathBelow("working", "markers")
    """Folder of the markers, one file per cluster that is predicted and stored."""
    parts = PathBelow("working", "parts")
    """Folder of the nuclei, one Parquet file per post-processed cluster."""
    predictions_zarr = PathBelow("working", "predictions.zarr")
    """Folder of the prediction store of the clusters, one shard per tile."""
    clusters_json = PathBelow("working", "clusters.json")
    """File with all clusters of the slide and the order in which the clusters are drawn."""

    def look_json(self, look: int) -> Path:
        """Return the path of the file with the densities that are estimated at a look, after a batch of clusters.

        `look`: number of the look, from 0; the names of the files count from 1.
        """
        return self.working / f"look_{look + 1}.json"


@dataclass(frozen=True)
class RunLayout:
    """Paths of a run's results, whether or not they exist."""

    root: Path
    """Folder of the run; made absolute, since workers may have another working directory."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.absolute())

    def slide(self, slide_id: str) -> SlideLayout:
        """Return the paths of the results of the slide `slide_id`. InputError if the id cannot name a folder."""
        return SlideLayout(self.root, slide_id)

    lock = PathBelow("root", ".lock")
    """Lock file, which a run locks while it writes to the folder, and which is never removed."""
    example = PathBelow("root", "example")
    """Folder of the slides of `--example` and their cohort.csv."""
    run_json = PathBelow("root", "run.json")
    """File with the identity of the run: model, settings and cohort."""
    settings_toml = PathBelow("root", "settings.toml")
    """TOML file with the settings in effect, which can be given to `--config`."""
    versions_json = PathBelow("root", "versions.json")
    """File with the versions of Python and of the packages that determine results."""
    slides_csv = PathBelow("root", "slides.csv")
    """CSV file with the slides of the cohort and the status of each."""
    failures_csv = PathBelow("root", "failures.csv")
    """CSV file with the slides that failed since the run was last started; written when the run ends."""
    summary_csv = PathBelow("root", "summary.csv")
    """CSV file with the summary: one row per slide and one for the cohort."""
    summary_parquet = PathBelow("root", "summary.parquet")
    """Parquet file with the content of summary.csv in full precision."""
    report_html = PathBelow("root", "report.html")
    """HTML file with the first page of the report, written by the command `report`."""
    report_slides = PathBelow("root", "report-slides")
    """Folder of the further pages of a large cohort's report."""
    logs = PathBelow("root", "logs")
    """Folder of the run's logs, events.jsonl and ray.log."""
    events_jsonl = PathBelow("logs", "events.jsonl")
    """File with the run's events, one JSON object per line."""
    ray_log = PathBelow("logs", "ray.log")
    """File with Ray's own messages."""
    slides = PathBelow("root", "slides")
    """Folder of all slides' results, with one folder per slide."""

    @property
    def kept(self) -> tuple[Path, ...]:
        """Paths of the results of the whole run that a user keeps, files or folders.

        The folders of the slides, the logs and the example are not included.
        """
        return (
            self.run_json,
            self.settings_toml,
            self.versions_json,
            self.slides_csv,
            self.failures_csv,
            self.summary_csv,
            self.summary_parquet,
            self.report_html,
            self.report_slides,
        )
