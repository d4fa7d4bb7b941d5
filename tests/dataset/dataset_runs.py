"""Runs whose tables can be exchanged, and a check of what a data set holds against them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from annotated import nuclei_from, take
from made_run import MPP, record_table, write_field

from hover_batch import __version__
from hover_batch.cohort.layout import RunLayout, SlideLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.cohort.run_folder import RUN_FORMAT
from hover_batch.dataset.layout import DatasetLayout, model_key
from hover_batch.dataset.slides import SlideEntry, read_entries
from hover_batch.export.summary import slide_summary
from hover_batch.geometry import Grid, Size
from hover_batch.nuclei.table import TableContext, merge_parts, to_arrow, write_part
from hover_batch.slide.headers import SlideInfo
from hover_batch.slide.survey import write_survey
from hover_batch.slide.tissue import TissueMask
from hover_batch.taxonomy import CONSEP, Taxonomy

_TABLES: dict[tuple[Any, ...], tuple[Any, bytes, dict[str, Any]]] = {}
"""Nuclei, table and summary of slides that were made before, since many tests make the same."""


class MadeRun:
    """Folder of a run, written slide by slide. `nuclei`: those of all slides, of which each has a share.

    `columns`: further columns of the cohort CSV, by slide_id.
    """

    def __init__(self, out: Path, nuclei: Any, size: Size, model_sha256: str = "0" * 64) -> None:
        self.layout = RunLayout(out)
        self.nuclei, self.size, self.model_sha256 = nuclei, size, model_sha256
        self.patients: dict[str, str] = {}
        self.extra: dict[str, dict[str, str]] = {}
        out.mkdir(parents=True)
        run = {
            "format": RUN_FORMAT,
            "model_id": "starter",
            "model_sha256": model_sha256,
            "command": ["segment", "cohort.csv"],
        }
        self.layout.run_json.write_text(json.dumps(run))

    @property
    def model(self) -> str:
        return model_key("starter", self.model_sha256)

    def list(self, slide_id: str, patient: str = "P1", **extra: str) -> SlideLayout:
        """Put the slide, or a change of its row, into slides.csv."""
        self.patients[slide_id] = patient
        self.extra[slide_id] = extra
        names = list(dict.fromkeys(name for row in self.extra.values() for name in row))
        with self.layout.slides_csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "slide_id", "patient_id", "group", *names, "row", "status"])
            for row, (name, of) in enumerate(self.patients.items(), start=2):
                cells = [self.extra[name].get(column, "") for column in names]
                writer.writerow([f"/slides/{name}.svs", name, of, "", *cells, row, "done"])
        return self.layout.slide(slide_id)

    def put(self, slide_id: str, rows: int, seed: int = 0, taxonomy: Taxonomy = CONSEP, fingerprint: str = "") -> None:
        """Finish the slide, or make it again, with `rows` nuclei, chosen by `seed`."""
        slide = self.layout.slide(slide_id) if slide_id in self.patients else self.list(slide_id)
        slide.folder.mkdir(parents=True, exist_ok=True)
        slide.slide_json.unlink(missing_ok=True)
        grid = Grid(self.size, 1.0, 1.0, MPP, self.size)
        context = TableContext(slide_id, taxonomy, grid, MPP, "cohort", None, "starter", self.model_sha256, __version__)
        mask = TissueMask(np.ones((8, 8), bool), (self.size.width / 8, self.size.height / 8))
        key = (id(self.nuclei), rows, seed, repr(context))
        if key not in _TABLES:
            _TABLES[key] = (self.nuclei, *self._write_table(slide, rows, seed, context, mask))
        _, table, summary = _TABLES[key]
        slide.nuclei_parquet.write_bytes(table)
        info = SlideInfo(self.size, MPP, "cohort", None, (1.0,), "picture", None, fingerprint or f"of {slide_id}", ())
        write_survey(slide.survey_json, info, mask)
        slide.slide_json.write_text(json.dumps({"slide_id": slide_id, "nuclei": rows, "summary": summary}))
        record_table(slide)

    def _write_table(
        self, slide: SlideLayout, rows: int, seed: int, context: TableContext, mask: TissueMask
    ) -> tuple[bytes, dict[str, Any]]:
        """Write the table of nuclei; return its content and its row of the summary."""
        chosen = np.zeros(len(self.nuclei.type_id), bool)
        chosen[np.random.default_rng((seed, rows)).permutation(len(chosen))[:rows]] = True
        part = slide.folder / "part.parquet"
        write_part(part, to_arrow(take(self.nuclei, chosen), context))
        merged = merge_parts([(0, part)], slide.nuclei_parquet, context)
        assert merged.nuclei == rows
        part.unlink()
        summary = slide_summary(
            SlideRecord(context.slide_id, Path("/slides"), 2),
            context.taxonomy,
            status="done",
            nuclei=slide.nuclei_parquet,
            tissue_mm2=mask.area_mm2(MPP),
            seconds={"infer": 3.0},
        )
        return slide.nuclei_parquet.read_bytes(), summary

    def unfinish(self, slide_id: str) -> None:
        """Begin the slide again."""
        self.layout.slide(slide_id).slide_json.unlink()

    def table(self, slide_id: str) -> pa.Table:
        """The slide's nuclei as the run wrote them."""
        return rows_of(self.layout.slide(slide_id).nuclei_parquet)


def drawn(folder: Path) -> tuple[Any, Size]:
    """Nuclei of a drawn field, 1,600 of them."""
    folder.mkdir(parents=True, exist_ok=True)
    path, instances, types = write_field(folder, 1000)
    path.unlink()
    return nuclei_from(instances, types, len(CONSEP.classes)), Size(1000, 1000)


def rows_of(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read().replace_schema_metadata(None)


def held(dataset: Path) -> dict[tuple[str, str], pa.Table]:
    """The nuclei of a data set by slide_id and model, in order of nucleus_id. Fails if one is double or lost."""
    entries = read_entries(dataset)
    by_file: dict[str, list[SlideEntry]] = {}
    for entry in entries:
        for name in entry.nuclei_files:
            by_file.setdefault(name, []).append(entry)
        assert bool(entry.nuclei_files) == bool(entry.nuclei_rows)
    pieces: dict[tuple[str, str], list[pa.Table]] = {entry.key: [] for entry in entries}
    for name, there in by_file.items():
        table = rows_of(dataset / name)
        assert set(table["slide_id"].unique().to_pylist()) == {entry.slide_id for entry in there}
        assert len({entry.model for entry in there}) == 1 and f"model={there[0].model}/" in name
        for entry in there:
            pieces[entry.key].append(table.filter(pa.compute.equal(table["slide_id"], entry.slide_id)))
    found = {}
    for entry in entries:
        if pieces[entry.key]:
            found[entry.key] = pa.concat_tables(pieces[entry.key]).sort_by("nucleus_id").combine_chunks()
            assert len(found[entry.key]) == entry.nuclei_rows
        else:
            found[entry.key] = None
    return found


def check(dataset: Path, wanted: Mapping[tuple[str, str], pa.Table]) -> None:
    """Check that the data set holds exactly the tables `wanted`, and no other file."""
    found = held(dataset)
    assert found.keys() == wanted.keys()
    for key, table in wanted.items():
        assert same(found[key], table), key
    layout = DatasetLayout(dataset)
    named = {layout.root / name for entry in read_entries(dataset) for name in entry.nuclei_files}
    assert {path for path in layout.root.rglob("*") if path.is_file()} == named | {layout.slides_parquet, layout.lock}


def same(found: pa.Table | None, wanted: pa.Table) -> bool:
    """Whether the tables have the same rows, in all columns."""
    return len(wanted) == 0 if found is None else bool(found.equals(wanted.combine_chunks()))
