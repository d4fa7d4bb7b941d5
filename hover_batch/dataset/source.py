"""Read a run as the source of a data set: its finished slides and what slides.parquet says of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.cohort.run_folder import read_slides, require_run, slide_if_done
from hover_batch.dataset.layout import model_key
from hover_batch.dataset.slides import FIXED
from hover_batch.errors import InputError, SlideError
from hover_batch.export.read import NucleiTable
from hover_batch.export.summary import STAGE, refuse_altered, summary_schema, with_record_columns
from hover_batch.formatting import listed
from hover_batch.nuclei.table import SCHEMA_VERSION
from hover_batch.quality.flags import Flag, flag_slides, summary_columns
from hover_batch.slide.survey import read_info
from hover_batch.taxonomy import Taxonomy

Row = dict[str, Any]
"""Columns of slides.parquet by name."""

_SAME_FOR_ALL = ("level", "status", "slides", "failed", "model_busy")
"""Columns of the summary that do not describe a finished slide."""


@dataclass(frozen=True)
class RunSource:
    """Run whose slides are added to a data set."""

    layout: RunLayout
    """Paths of the run's results."""
    command: str
    """Command line of the run, for messages."""
    model: str
    """Value of the column `model`."""
    model_name: str
    """Name of the model."""
    model_sha256: str
    """Hash of the model's package."""
    slides: Mapping[str, SlideRecord]
    """Rows of the cohort by slide_id."""
    done: Mapping[str, Mapping[str, Any]]
    """Content of slide.json of the finished slides by slide_id."""
    flags: Mapping[str, tuple[Flag, ...]]
    """Quality flags of the finished slides."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the run in `folder`: its cohort, and the slide.json and quality flags of its finished slides.

        InputError if the folder holds no run, or its run.json or slides.csv is corrupted; OSError if a file cannot be
        read.
        """
        layout = RunLayout(folder)
        run = require_run(layout)
        records = {record.slide_id: record for record in read_slides(layout) or ()}
        finished = {slide_id: slide_if_done(layout.slide(slide_id)) for slide_id in records}
        done = {slide_id: values for slide_id, values in finished.items() if values is not None}
        name, sha256 = str(run.get("model_id")), str(run.get("model_sha256"))
        command = shlex.join(["hover-batch", *map(str, run.get("command", ["segment"]))])
        return cls(layout, command, model_key(name, sha256), name, sha256, records, done, flag_slides(done))

    def chosen(self, slide_ids: Sequence[str]) -> list[str]:
        """Return `slide_ids` without repetitions, or all slides of the run if it is empty.

        InputError if an id is not a slide of this run.
        """
        if unknown := [name for name in slide_ids if name not in self.slides]:
            raise InputError(
                f"--slide {unknown[0]}: is not a slide of this run; {self.layout.slides_csv} lists its slides: "
                f"{listed(self.slides)}"
            )
        return list(dict.fromkeys(slide_ids) if slide_ids else self.slides)

    def fingerprint(self, slide_id: str) -> str:
        """Return the fingerprint of the finished slide `slide_id`, a hash of the slide's content.

        SlideError if its survey.json is missing, corrupted or cannot be read.
        """
        try:
            return read_info(self.layout.slide(slide_id).survey_json).fingerprint
        except OSError as error:
            raise SlideError(
                f"{error.filename}: {error.strerror}; restore it, or remove slide.json beside it and repeat the "
                "segment command"
            ) from error

    def open_table(self, slide_id: str) -> NucleiTable:
        """Return the table of nuclei of the finished slide `slide_id`, after a check of its metadata and checksum.

        SlideError if the table is missing, corrupted or cannot be read.
        """
        return NucleiTable.open(self.layout.slide(slide_id).nuclei_parquet)

    def is_unchanged(self, slide_id: str) -> bool:
        """Return whether slide.json still records the table that it recorded when the run was opened.

        False while the slide is being processed again, because slide.json is removed before the table is replaced.
        OSError if slide.json cannot be read.
        """
        now = slide_if_done(self.layout.slide(slide_id))
        return now is not None and now.get("nuclei_sha256") == self.done[slide_id]["nuclei_sha256"]

    def row(self, slide_id: str, taxonomy: Taxonomy) -> Row:
        """Return the values of a finished slide that come from its run's summary and cohort CSV, by column.

        They may change although the nuclei do not, for example when a patient is corrected, or because a flag depends
        on the other slides of the cohort.

        `slide_id`: the slide. `taxonomy`: classes of the slide's table.
        """
        record, done = self.slides[slide_id], self.done[slide_id]
        known = set(summary_schema(taxonomy).names)
        row: Row = {}
        taken = set(FIXED.names)  # in lower case, since SQL ignores upper and lower case
        refuse_altered(done.get("summary", {}), taxonomy.nuclei, self.layout.slide(slide_id).slide_json)
        summary = with_record_columns(done.get("summary", {}), record, taxonomy)
        for name, value in (summary | summary_columns(done, self.flags[slide_id])).items():
            is_text = name not in known and not name.startswith(STAGE)
            while is_text and name.casefold() in taken:
                name = f"extra_{name}"
            taken.add(name.casefold())
            row[name] = value
        for name in _SAME_FOR_ALL:
            row.pop(name, None)
        mask_path = record.mask_path
        return row | {
            "slide_id": slide_id,
            "model": self.model,
            "path": str(record.path),
            "mask_path": None if mask_path is None else str(mask_path),
            "magnification": record.magnification,
            "run": str(self.layout.root),
        }

    def measured(self, taxonomy: Taxonomy) -> pa.Schema:
        """Return the names and types of the columns of the summary, including the seconds of each stage.

        All other columns of `row` that are not FIXED are text.

        `taxonomy`: classes of the slides' tables.
        """
        stages = dict.fromkeys(
            name for done in self.done.values() for name in done.get("summary", {}) if name.startswith(STAGE)
        )
        return pa.schema([*summary_schema(taxonomy), *(pa.field(name, pa.float64()) for name in stages)])

    def table_row(self, table: NucleiTable) -> Row:
        """Return the values of slides.parquet that describe a finished slide's table of nuclei, by column.

        `table`: table of the slide. SlideError if survey.json of the slide is missing, corrupted or cannot be read.
        """
        done = self.done[table.slide_id]
        return {
            "nuclei_rows": table.rows,
            "nuclei_sha256": done["nuclei_sha256"],
            "fingerprint": self.fingerprint(table.slide_id),
            "mpp_x": table.mpp.x,
            "mpp_y": table.mpp.y,
            "level0_width": table.level0.width,
            "level0_height": table.level0.height,
            "model_name": self.model_name,
            "model_sha256": self.model_sha256,
            "taxonomy": taxonomy_json(table.taxonomy),
            "run_key": done.get("run_key"),
            "software": table.software,
        }

    def file_metadata(self, taxonomy: Taxonomy) -> dict[str, Any]:
        """Return the JSON object that files of nuclei have as the entry `hover_batch` of their metadata.

        The keys are `schema_version`, `taxonomy` (see `Taxonomy.to_json`) and `model` (an object with `id` and
        `sha256`). `taxonomy`: classes of the nuclei.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "taxonomy": taxonomy.to_json(),
            "model": {"id": self.model_name, "sha256": self.model_sha256},
        }


def taxonomy_json(taxonomy: Taxonomy) -> str:
    """Return `taxonomy` as JSON text, the value of the column `taxonomy` of slides.parquet."""
    return json.dumps(taxonomy.to_json(), ensure_ascii=False)
