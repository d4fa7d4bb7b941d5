"""`export`: which slides and formats are written to which files, which are skipped, and which are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from hover_batch.cli import app
from hover_batch.cohort.layout import Format, RunLayout
from hover_batch.export import spatial


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two small white tiles, which have no nuclei, and of a broken file."""
    folder = tmp_path_factory.mktemp("export")
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((200, 300, 3), 245, np.uint8)).save(folder / name)
    (folder / "broken.svs").write_bytes(b"no slide")
    (folder / "cohort.csv").write_text("path,slide_id,mpp\na.png,a,0.25\nb.png,b.i-2,0.25\nbroken.svs,c,0.25\n")
    assert run("segment", folder / "cohort.csv", "-o", folder / "out").exit_code == 3
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def written(result: Result) -> list[Path]:
    return [Path(line) for line in result.stdout.splitlines()]


def test_what_is_done_is_written_beside_its_table(out: Path) -> None:
    result = run("export", out, "--to", "qupath", "--to", "csv", "--to", "qupath")
    assert result.exit_code == 3, result.output
    layout = RunLayout(out)
    done = [layout.slide("a"), layout.slide("b.i-2")]
    assert written(result) == [slide.exported(f) for slide in done for f in (Format.qupath, Format.csv)]
    assert all(path.parent == slide.nuclei_parquet.parent for slide in done for path in [slide.exported(Format.csv)])
    assert "[1/3] a: 0 nuclei to qupath" in result.stderr
    assert "[3/3] c: skipped: is not done" in result.stderr
    assert len(pd.read_csv(layout.slide("a").exported(Format.csv))) == 0


def test_names_that_people_try_first_are_known(out: Path, tmp_path: Path) -> None:
    result = run(
        "export", out, "--to", "geojson", "--to", "hovernet-json", "--to", "ngff", "--to", "dicom-ann", "-o", tmp_path
    )
    assert result.exit_code == 3, result.output
    assert [path.name for path in written(result)[:4]] == ["a.geojson.gz", "a.json", "a.ome.zarr", "a.ann.dcm"]
    assert len(written(run("export", out, "--to", "geojson", "--to", "qupath", "-o", tmp_path, "--slide", "a"))) == 1
    shown = " ".join(run("export", "--help").output.replace("│", "").split())
    assert "One of qupath, annotation-store, hovernet, spatialdata, anndata, ome-zarr, dicom, csv;" in shown


def test_into_another_folder_by_the_slide_s_name(out: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    result = run("export", out, "--to", "hovernet", "-o", tmp_path / "new" / "folder", "--slide", "b.i-2")
    assert result.exit_code == 0, result.output
    assert written(result) == [tmp_path / "new" / "folder" / "b.i-2.json"]
    assert json.loads(written(result)[0].read_text())["nuc"] == {}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before, "the run was touched"


def test_a_slide_whose_table_is_harmed_does_not_stop_the_others(out: Path) -> None:
    RunLayout(out).slide("a").nuclei_parquet.write_bytes(b"PAR1")
    result = run("export", out, "--to", "csv")
    assert result.exit_code == 3
    assert written(result) == [RunLayout(out).slide("b.i-2").exported(Format.csv)]
    assert "a: skipped: " in result.stderr and "repeat the segment command" in result.stderr


def test_nothing_done_is_exit_code_4(out: Path) -> None:
    result = run("export", out, "--to", "csv", "--slide", "c")
    assert result.exit_code == 4 and not result.stdout
    assert "c: skipped: is not done" in result.stderr
    (out / "slides.csv").unlink()
    result = run("export", out, "--to", "csv")
    assert result.exit_code == 4 and "no slide is listed yet" in result.stderr


def test_what_cannot_be_is_refused(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(spatial, "find_spec", lambda name: None)
    refused = [
        (("export", out, "--to", "csv", "--slide", "d"), "--slide d: is not a slide of this run"),
        (("export", tmp_path, "--to", "csv"), "holds no run"),
        (("export", out, "--to", "csv", "-o", tmp_path / "file"), "another folder with -o"),
        (("export", out, "--to", "csv", "--to", "anndata"), "pip install 'hover-batch[spatialdata]'"),
        (("export", out, "--to", "word"), "'word' is not one of qupath, annotation-store, hovernet"),
        (("export", out, "--to", "ome-zar"), "csv; did you mean ome-zarr?"),
        (("export", out, "--to", "geo-json"), "csv; did you mean geojson?"),
    ]
    for arguments, message in refused:
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.replace("│", "").split()) and "Traceback" not in result.stderr
        assert not result.stdout
    assert not list(out.rglob("nuclei.csv"))


def test_a_run_started_anew_loses_its_old_exports(finished: Path, out: Path) -> None:
    assert run("export", out, "--to", "csv").exit_code == 3
    assert len(list(out.rglob("nuclei.csv"))) == 2
    assert run("segment", finished.parent / "cohort.csv", "-o", out, "--force").exit_code == 3
    assert len(list(out.rglob("nuclei.parquet"))) == 2 and not list(out.rglob("nuclei.csv"))


def test_what_a_killed_export_left_is_swept(out: Path) -> None:
    table = RunLayout(out).slide("a").exported(Format.csv)
    left = table.with_name(f".{table.name}.0123.partial")
    left.write_bytes(b"half")
    assert run("export", out, "--to", "csv").exit_code == 3
    assert table.is_file() and not left.exists()
