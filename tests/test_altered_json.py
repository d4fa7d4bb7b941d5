"""JSON files of a run that were edited to values of other types: no command ends with a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_run import write_field, write_run
from typer.testing import CliRunner, Result

from hover_batch.cli import app
from hover_batch.cohort.events import stream_events
from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.run_folder import estimate_line, estimate_of
from hover_batch.errors import SlideError
from hover_batch.export.summary import cohort_summary, write_summary
from hover_batch.slide.example import write_pyramidal_tiff
from hover_batch.slide.survey import read_info, read_tissue
from hover_batch.taxonomy import CONSEP

ODD: tuple[Any, ...] = (None, "text", "", True, -1, 10**400, ["text", None], {"a": []}, [[1]], [], {})
QUALITY = {"h_od": 0.4, "e_od": 0.2, "seg_score": 0.9, "type_prob": 0.9, "sharpness": [2.0], "chroma": 80, "dark": 0.8}
LIMITS = {"area_um2": [5.0, 60.0], "h_od": [0.1, 1.5]}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    folder = tmp_path_factory.mktemp("altered")
    layout = write_run(folder / "out", *write_field(folder, 200), done=["a", "b"])
    path = layout.slide("a").slide_json
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"quality": QUALITY, "limits": LIMITS}))
    return layout


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def altered(value: Any) -> Iterator[Any]:
    """`value` with each of its parts replaced by each odd value, and without each part."""
    yield from ODD
    if isinstance(value, dict):
        for name, part in value.items():
            yield {key: other for key, other in value.items() if key != name}
            yield from ({**value, name: other} for other in altered(part))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from ([*value[:i], other, *value[i + 1 :]] for other in altered(part))


def altered_files(path: Path, every: int) -> Iterator[str]:
    """The altered versions of a file, one after the other in its place; `every`: take one of so many."""
    original = path.read_bytes()
    for value in list(altered(json.loads(original)))[::every]:
        path.write_text(json.dumps(value))
        yield path.read_text()
    path.write_bytes(original)


@pytest.mark.parametrize(("command", "every"), [("status", 7), ("report", 61)])
def test_an_altered_slide_json(layout: RunLayout, command: str, every: int) -> None:
    """A slide whose file is not as `segment` writes it is not done; the columns of its classes are checked later."""
    for text in altered_files(layout.slide("a").slide_json, every):
        result = run(command, layout.root)
        assert isinstance(result.exception, SystemExit | None), text
        assert result.exit_code == 0 or (result.exit_code == 2 and "slide.json: was edited" in result.stderr), text


ESTIMATE = {
    "slide_id": "c",
    "run_key": "0",
    "warnings": [],
    "estimate": {
        "of": "spindle", "stop_at": 0.1, "clusters": 24, "of_clusters": 64, "tiles": 64, "of_tiles": 64,
        "densities": {
            "nuclei": {"per_mm2": 90.0, "low": 80.0, "high": 99.0},
            "spindle": {"per_mm2": 0.0, "low": 0.0, "high": 0.0},
        },
    },
    "summary": {
        "slide_id": "c", "level": "slide", "status": "estimated", "slides": 1, "failed": 0, "tissue_mm2": 0.3,
        "estimated_nuclei_per_mm2": 90.0, "seconds_post": 0.5, "patient_id": None,
    },
}  # fmt: skip


def test_an_altered_estimate_is_none_or_can_be_shown_and_summed(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "out", *write_field(tmp_path, 200), done=["a", "c"])
    slide = layout.slide("c")
    slide.slide_json.unlink()
    kept = 0
    for value in [ESTIMATE, *altered(ESTIMATE)]:
        slide.estimate_json.write_text(json.dumps(value))
        if (stored := estimate_of(slide)) is not None:
            kept += 1
            assert "spindle per mm² of tissue" in estimate_line(stored["estimate"])
            rows = [stored["summary"], cohort_summary([stored["summary"]], [], CONSEP)]
            write_summary(rows, CONSEP, tmp_path / "s.csv", tmp_path / "s.parquet")
    assert kept > 20
    slide.estimate_json.write_text(json.dumps(ESTIMATE))
    assert "estimated from 24 of 64 clusters" in run("status", layout.root).stdout


@pytest.mark.parametrize(
    "changes", [{"n_spindle": "1"}, {"spindle_per_mm2": None}, {"n_spindle": 1.5}, {"eccentricity_p25": "0.7"}]
)
def test_altered_numbers_of_the_summary_are_refused(layout: RunLayout, changes: dict[str, Any]) -> None:
    path = layout.slide("a").slide_json
    original = path.read_bytes()
    values = json.loads(original)
    path.write_text(json.dumps({**values, "summary": values["summary"] | changes}))
    results = run("report", layout.root), run("cohort", layout.root, "-o", layout.root.parent / "data")
    path.write_bytes(original)
    for result in results:
        assert result.exit_code == 2 and f"{path}: was edited: {next(iter(changes))} in its summary" in result.stderr


def test_a_slide_that_was_renamed_with_its_folder(tmp_path: Path) -> None:
    """Its nuclei are kept, under the new name."""
    field, *_ = write_field(tmp_path, 200)
    out, rows = tmp_path / "out", tmp_path / "cohort.csv"
    tables = []
    for name in ("a", "b"):
        rows.write_text(f"path,slide_id,mpp\n{field.name},{name},0.25\n")
        assert run("segment", rows, "-o", out, "--backend", "local").exit_code == 0
        tables.append(pd.read_parquet(out / "slides" / name / "nuclei.parquet"))
        assert len(tables[-1]) > 10 and set(tables[-1]["slide_id"]) == {name}
        if name == "a":
            (out / "slides" / "a").rename(out / "slides" / "b")
    predicted = [event for event in stream_events(out / "logs" / "events.jsonl") if event["event"] == "unit_done"]
    assert len(predicted) == 1
    assert tables[0].drop(columns="slide_id").equals(tables[1].drop(columns="slide_id"))


def test_segment_makes_an_altered_slide_json_again(tmp_path: Path) -> None:
    """The slide's nuclei are merged again; nothing is predicted."""
    field, *_ = write_field(tmp_path, 200)
    (tmp_path / "cohort.csv").write_text(f"path,mpp\n{field.name},0.25\n")
    command = ("segment", tmp_path / "cohort.csv", "-o", tmp_path / "out", "--backend", "local")
    assert run(*command).exit_code == 0
    path = tmp_path / "out" / "slides" / field.stem / "slide.json"
    values = json.loads(path.read_bytes())
    kept = ("nuclei", "quality", "nuclei_sha256")
    for changes in ({"quality": {"ink": [0.1]}}, {"summary": values["summary"] | {"solidity_p50": "0.9"}}):
        path.write_text(json.dumps({**values, **changes}))
        assert run("status", tmp_path / "out", "--json").stdout.count('"done": 0') == 1
        assert run(*command).exit_code == 0
        again = json.loads(path.read_bytes())
        assert [again[name] for name in kept] == [values[name] for name in kept]
    path.write_text(json.dumps({**values, "summary": values["summary"] | {"n_spindle": "1"}}))
    result = run(*command)
    assert result.exit_code == 2 and f"{path}: was edited: n_spindle in its summary is missing or" in result.stderr


@pytest.mark.parametrize("command", ["status", "report", "cohort"])
@pytest.mark.parametrize("changes", [{"command": 7}, {"results_key": None}, {"results_key": {"infer": {}}}])
def test_an_altered_run_json_is_refused(layout: RunLayout, command: str, changes: dict[str, Any]) -> None:
    original = layout.run_json.read_bytes()
    layout.run_json.write_text(json.dumps(json.loads(original) | changes))
    result = run(command, layout.root, *(["-o", layout.root.parent / "data"] if command == "cohort" else []))
    layout.run_json.write_bytes(original)
    assert result.exit_code == 2 and "its run.json is corrupted; restore it from a backup" in result.stderr


def test_an_altered_survey_json_is_a_fault_of_its_slide(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "out", *write_field(tmp_path, 200), done=["a"])
    path = layout.slide("a").survey_json
    original = json.loads(path.read_bytes())
    valid = {"bounds": [None], "fingerprint": ["text", ""], "vendor": ["text", ""], "warnings": [[]], "given": [True]}
    for part, name, read in (
        *(("slide", name, read_info) for name in ("level0", "mpp", "bounds", "fingerprint", "vendor", "warnings")),
        *(("tissue", name, read_tissue) for name in original["tissue"]),
    ):
        for odd in (odd for odd in ODD if odd not in valid.get(name, ())):
            path.write_text(json.dumps(original | {part: original[part] | {name: odd}}))
            with pytest.raises(SlideError, match="cannot be read .*run the slide again"):
                read(path)


def test_a_row_that_repeats_the_pixel_size_of_the_file_keeps_its_results(tmp_path: Path) -> None:
    write_pyramidal_tiff(tmp_path / "a.tif", np.full((300, 300, 3), 230, np.uint8), 0.25)
    rows, out = tmp_path / "cohort.csv", tmp_path / "out"
    for text in ("path\na.tif\n", "path,mpp\na.tif,0.25\n", "path\na.tif\n"):
        rows.write_text(text)
        assert run("segment", rows, "-o", out, "--backend", "local").exit_code == 0
    rows.write_text("path,mpp\na.tif,0.26\n")
    result = run("segment", rows, "-o", out, "--backend", "local")
    assert result.exit_code == 2 and "finished with another file, mpp or mask" in result.stderr


@pytest.mark.parametrize(("change", "message"), [(",x,y", "row 2 has more cells"), ("", "slide_id a in several rows")])
def test_an_altered_row_of_slides_csv_is_refused(tmp_path: Path, change: str, message: str) -> None:
    layout = write_run(tmp_path / "out", *write_field(tmp_path, 200), done=["a", "b"])
    text = layout.slides_csv.read_text()
    row = text.splitlines()[1]
    layout.slides_csv.write_text(text.replace(row, row + change if change else f"{row}\n{row}"))
    for command in (["status"], ["export", "--to", "csv"], ["cohort", "-o", tmp_path / "dataset"]):
        result = run(*command, layout.root)
        assert result.exit_code == 2 and f"was edited ({message}" in result.stderr, result.output
