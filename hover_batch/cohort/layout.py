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

    @property
    def key_json(self) -> Path:
        """JSON file with the run key of the slide's unfinished work."""
        return self.folder / "key.json"

    @property
    def quarantine_json(self) -> Path:
        """File with the run key, stage and reason of the slide's quarantine; exists only while it is quarantined."""
        return self.folder / "quarantine.json"

    @property
    def markers(self) -> Path:
        """Folder of the slide's markers, one JSON file per unit that is predicted and stored."""
        return self.folder / "markers"

    def marker(self, column: int, row: int) -> Path:
        """Return the path of a unit's marker, which exists once the unit is predicted and stored.

        `column`, `row`: cell of the unit in the unit grid.
        """
        return self.markers / f"{column}_{row}.json"

    @property
    def parts(self) -> Path:
        """Folder of the parts of the table of nuclei, one Parquet file per post-processed region."""
        return self.folder / "parts"

    def part(self, column: int, row: int) -> Path:
        """Return the path of the part of the table with the nuclei that a region owns.

        `column`, `row`: cell of the region in the unit grid.
        """
        return self.parts / f"{column}_{row}.parquet"

    @property
    def survey_json(self) -> Path:
        """File with the slide's header and tissue mask, written before the first pixel of the slide is predicted."""
        return self.folder / "survey.json"

    @property
    def predictions_zarr(self) -> Path:
        """Folder of the prediction store (`PredictionStore`), which holds the slide's predicted maps."""
        return self.folder / "predictions.zarr"

    @property
    def tissue_geojson(self) -> Path:
        """GeoJSON file with the outline of the tissue in which nuclei are searched for."""
        return self.folder / "tissue.geojson"

    @property
    def nuclei_parquet(self) -> Path:
        """Parquet file with the slide's table of nuclei, one row per nucleus."""
        return self.folder / "nuclei.parquet"

    def exported(self, format: Format) -> Path:
        """Return the path of the slide's table of nuclei in another format, whether or not it exists.

        `format`: format of the exported table; it determines the suffix of the path.
        """
        return self.folder / f"nuclei.{format.suffix}"

    @property
    def thumbnail_jpg(self) -> Path:
        """JPEG picture of the whole slide with the outline of its tissue."""
        return self.folder / "thumbnail.jpg"

    @property
    def overlay_jpg(self) -> Path:
        """JPEG picture of the slide's field with the most nuclei; their contours are drawn on it."""
        return self.folder / "overlay.jpg"

    @property
    def timings_json(self) -> Path:
        """File with the seconds that the slide took, by stage."""
        return self.folder / "timings.json"

    @property
    def slide_json(self) -> Path:
        """File with the slide's summary; written last, so that it exists only if the slide is done."""
        return self.folder / "slide.json"

    @property
    def sample(self) -> SampleLayout:
        """Paths of the slide's results when its density is estimated from clusters (`--stop-at`)."""
        return SampleLayout(self.root, self.slide_id)

    @property
    def sampled_nuclei_parquet(self) -> Path:
        """Parquet file with the table of the nuclei in the clusters that were drawn to estimate the slide's density."""
        return self.folder / "sampled_nuclei.parquet"

    @property
    def estimate_json(self) -> Path:
        """File with the slide's estimated densities; written last, only once the estimate is precise enough."""
        return self.folder / "estimate.json"

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

    @property
    def working(self) -> Path:
        """Folder of the working files of the clusters."""
        return self.folder / "sample"

    @property
    def markers(self) -> Path:
        """Folder of the markers, one file per cluster that is predicted and stored."""
        return self.working / "markers"

    @property
    def parts(self) -> Path:
        """Folder of the nuclei, one Parquet file per post-processed cluster."""
        return self.working / "parts"

    @property
    def predictions_zarr(self) -> Path:
        """Folder of the prediction store of the clusters, one shard per tile."""
        return self.working / "predictions.zarr"

    @property
    def clusters_json(self) -> Path:
        """File with all clusters of the slide and the order in which the clusters are drawn."""
        return self.working / "clusters.json"

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

    @property
    def lock(self) -> Path:
        """Lock file, which a run locks while it writes to the folder, and which is never removed."""
        return self.root / ".lock"

    @property
    def example(self) -> Path:
        """Folder of the slides of `--example` and their cohort.csv."""
        return self.root / "example"

    @property
    def run_json(self) -> Path:
        """File with the identity of the run: model, settings and cohort."""
        return self.root / "run.json"

    @property
    def settings_toml(self) -> Path:
        """TOML file with the settings in effect, which can be given to `--config`."""
        return self.root / "settings.toml"

    @property
    def versions_json(self) -> Path:
        """File with the versions of Python and of the packages that determine results."""
        return self.root / "versions.json"

    @property
    def slides_csv(self) -> Path:
        """CSV file with the slides of the cohort and the status of each."""
        return self.root / "slides.csv"

    @property
    def failures_csv(self) -> Path:
        """CSV file with the slides that failed since the run was last started; written when the run ends."""
        return self.root / "failures.csv"

    @property
    def summary_csv(self) -> Path:
        """CSV file with the summary: one row per slide and one for the cohort."""
        return self.root / "summary.csv"

    @property
    def summary_parquet(self) -> Path:
        """Parquet file with the content of summary.csv in full precision."""
        return self.root / "summary.parquet"

    @property
    def report_html(self) -> Path:
        """HTML file with the first page of the report, written by the command `report`."""
        return self.root / "report.html"

    @property
    def report_slides(self) -> Path:
        """Folder of the further pages of a large cohort's report."""
        return self.root / "report-slides"

    @property
    def logs(self) -> Path:
        """Folder of the run's logs, events.jsonl and ray.log."""
        return self.root / "logs"

    @property
    def events_jsonl(self) -> Path:
        """File with the run's events, one JSON object per line."""
        return self.logs / "events.jsonl"

    @property
    def ray_log(self) -> Path:
        """File with Ray's own messages."""
        return self.logs / "ray.log"

    @property
    def slides(self) -> Path:
        """Folder of all slides' results, with one folder per slide."""
        return self.root / "slides"

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
