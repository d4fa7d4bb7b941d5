"""`cohort` and `segment --dataset`: what is added, skipped and refused, and what the user is told."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_runs import MadeRun, check
from made_run import record_table
from PIL import Image
from typer.testing import CliRunner, Result

from hover_batch.cli import app
from hover_batch.cohort.run_lock import locked
from hover_batch.dataset import folder_storage, slides
from hover_batch.dataset.layout import DatasetLayout
from hover_batch.dataset.slides import read_entries
from hover_batch.geometry import Size
from hover_batch.taxonomy import CONSEP, Taxonomy

pytestmark = pytest.mark.usefixtures("small_files")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def said(result: Result) -> str:
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.fixture
def made(nuclei: tuple[Any, Size], tmp_path: Path) -> MadeRun:
    """A run of three slides, of which c is not done."""
    made = MadeRun(tmp_path / "run", *nuclei)
    for slide_id, rows in (("a", 120), ("b", 350)):
        made.put(slide_id, rows)
    made.list("c")
    return made


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return tmp_path / "dataset"


def test_what_is_not_done_is_skipped_until_it_is(made: MadeRun, dataset: Path) -> None:
    result = run("cohort", made.layout.root, "-o", dataset)
    assert result.exit_code == 3 and result.stdout == f"{dataset}\n"
    assert "c: skipped: is not done" in said(result) and "[1/2] " in said(result)
    missing = "2 of 3 slides are in the data set; missing: c. To add them, complete the run with `hover-batch segment"
    assert f"{missing} cohort.csv`, and repeat this command" in said(result)
    made.put("c", 20)
    result = run("cohort", "-o", dataset, made.layout.root)
    assert result.exit_code == 0, result.output
    assert "2 slides already in the data set [1/1] c: 20 nuclei" in said(result) and "missing" not in said(result)
    check(dataset, {(slide_id, made.model): made.table(slide_id) for slide_id in "abc"})


def test_only_some_slides(made: MadeRun, dataset: Path) -> None:
    assert run("cohort", "build", made.layout.root, "-o", dataset, "--slide", "b").exit_code == 0
    assert [entry.slide_id for entry in read_entries(dataset)] == ["b"]
    assert run("cohort", made.layout.root, "-o", dataset, "--slide", "c").exit_code == 4
    result = run("cohort", made.layout.root, "-o", dataset, "--slide", "d")
    assert result.exit_code == 2 and "--slide d: is not a slide of this run" in said(result)


def test_finished_slides_that_the_run_does_not_list_are_noted(made: MadeRun, dataset: Path, tmp_path: Path) -> None:
    """They remain after segmenting slides one by one into the same folder."""
    root = made.layout.root
    listing = made.layout.slides_csv.read_text().splitlines(keepends=True)
    made.layout.slides_csv.write_text("".join(line for line in listing if "/b.svs" not in line))
    note = f"note: {root}: 1 finished slide is not in slides.csv and left out (b); to include all slides, run a"
    for words in (
        ["cohort", root, "-o", dataset],
        ["export", root, "--to", "csv", "-o", tmp_path / "csv"],
        ["report", root, "-o", tmp_path / "r.html"],
        ["status", root],
        ["diff", root, root],
    ):
        assert note in said(run(*words)), words
    made.layout.slides_csv.unlink()
    result = run("cohort", root, "-o", tmp_path / "other")
    assert result.exit_code == 4 and "slides.csv: is missing or lists no slide; repeat the segment" in said(result)


def test_a_corrupted_table_is_skipped_and_the_old_rows_stay(made: MadeRun, dataset: Path) -> None:
    run("cohort", made.layout.root, "-o", dataset)
    old = made.table("a")
    made.put("a", 100, seed=1)
    made.put("b", 90, seed=1)
    path = made.layout.slide("a").nuclei_parquet
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = run("cohort", made.layout.root, "-o", dataset)
    assert result.exit_code == 3 and "a: skipped: " in said(result) and "checksum mismatch" in said(result)
    check(dataset, {("a", made.model): old, ("b", made.model): made.table("b")})
    # Two that only turn out to be corrupted while they are copied: a new one, and one that replaces rows.
    made.put("c", 60)
    spoil(made, "c")
    made.put("d", 50)
    result = run("cohort", made.layout.root, "-o", dataset, "--slide", "c", "--slide", "d")
    assert result.exit_code == 3 and "c: skipped: " in said(result) and "not finite" in said(result)
    kept = {name: made.table(name) for name in "bd"} | {"a": old}
    check(dataset, {(name, made.model): table for name, table in kept.items()})
    made.put("b", 70, seed=2)
    made.put("d", 40, seed=2)
    spoil(made, "b")
    result = run("cohort", made.layout.root, "-o", dataset)
    assert result.exit_code == 3 and "b: skipped: " in said(result) and "[1/4] d: 40 nuclei" in said(result)
    check(dataset, {(name, made.model): table for name, table in kept.items()} | {("d", made.model): made.table("d")})


def spoil(made: MadeRun, slide_id: str) -> None:
    """Give the slide's table a value that is impossible, and record it as if the run had written it."""
    table, path = made.table(slide_id), made.layout.slide(slide_id).nuclei_parquet
    altered = pa.array([np.nan, *table["centroid_x"].to_pylist()[1:]])
    metadata = pq.read_metadata(path).metadata
    table = table.set_column(2, table.schema.field("centroid_x"), altered)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    record_table(made.layout.slide(slide_id))


def test_the_same_name_for_another_slide_is_refused(made: MadeRun, nuclei: Any, dataset: Path, tmp_path: Path) -> None:
    run("cohort", made.layout.root, "-o", dataset)
    other = MadeRun(tmp_path / "other", *nuclei)
    other.put("a", 90, seed=3, fingerprint="another")
    other.put("e", 90, seed=3)
    result = run("cohort", other.layout.root, "-o", dataset)
    assert result.exit_code == 2 and f"a: is there from the run {made.layout.root}" in said(result)
    assert "another slide_id" in said(result)
    check(dataset, {(slide_id, made.model): made.table(slide_id) for slide_id in "ab"})
    # The same slide from another run replaces its rows, and its own run may give it another file or mpp.
    other.put("a", 80, seed=3)
    assert run("cohort", other.layout.root, "-o", dataset, "--slide", "a").exit_code == 0
    other.put("a", 70, seed=3, fingerprint="mpp corrected")
    assert run("cohort", other.layout.root, "-o", dataset, "--slide", "a").exit_code == 0
    check(dataset, {("a", made.model): other.table("a"), ("b", made.model): made.table("b")})
    # Another model does not mind.
    third = MadeRun(tmp_path / "third", *nuclei, model_sha256="f" * 64)
    third.put("a", 90, fingerprint="another")
    assert run("cohort", third.layout.root, "-o", dataset).exit_code == 0


def test_other_classes_of_the_same_model_are_refused(made: MadeRun, nuclei: Any, dataset: Path, tmp_path: Path) -> None:
    run("cohort", made.layout.root, "-o", dataset)
    other = MadeRun(tmp_path / "other", *nuclei)
    values: Any = CONSEP.to_json()
    values["classes"][1]["name"] = "others"
    other.put("e", 90, taxonomy=Taxonomy.from_json(values))
    result = run("cohort", other.layout.root, "-o", dataset)
    assert result.exit_code == 2 and "--class-map; add this run to another data set" in said(result)
    check(dataset, {(slide_id, made.model): made.table(slide_id) for slide_id in "ab"})


def test_what_is_no_data_set_is_refused(made: MadeRun, dataset: Path, tmp_path: Path) -> None:
    root = made.layout.root
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    pq.write_table(pa.table({"slide_id": ["a"]}), tmp_path / "foreign" / "slides.parquet")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "slides.parquet").write_bytes(b"PAR1PAR1")
    refused: list[tuple[tuple[str | Path, ...], str]] = [
        ((tmp_path / "nowhere", "-o", dataset), "holds no run; give the --output folder"),
        ((root, "-o", root), "is the folder of a run; name a new folder"),
        ((root, "-o", tmp_path / "full"), "holds notes.txt but no slides.parquet"),
        ((root, "-o", tmp_path / "file"), "name another folder"),
        ((root, "-o", tmp_path / "file" / "in"), "name another folder"),
        ((root, "-o", tmp_path / "foreign"), "was written by another program"),
        ((root, "-o", tmp_path / "torn"), "its slides.parquet is corrupted"),
        ((root,), "Missing option '--output'"),
    ]
    for arguments, message in refused:
        before = sorted(tmp_path.rglob("*"))
        result = run("cohort", *arguments)
        assert result.exit_code == 2, result.output
        assert message in said(result)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_newer_version_and_a_second_writer_are_refused(
    made: MadeRun, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("cohort", made.layout.root, "-o", dataset)
    with locked(DatasetLayout(dataset).lock):
        result = run("cohort", made.layout.root, "-o", dataset)
    assert result.exit_code == 2 and "is writing to it" in said(result) and f"-o {dataset}" in said(result)
    with monkeypatch.context() as patched:
        patched.setattr(slides, "VERSION", 2)
        slides.write_slides_table(DatasetLayout(dataset), slides.read_slides_table(dataset))
    result = run("cohort", made.layout.root, "-o", dataset)
    assert result.exit_code == 2 and "version 2" in said(result) and "update hover-batch" in said(result)


def test_a_lost_file_of_nuclei_is_named(made: MadeRun, dataset: Path) -> None:
    run("cohort", made.layout.root, "-o", dataset)
    entry = next(entry for entry in read_entries(dataset) if entry.slide_id == "a")
    (dataset / entry.nuclei_files[0]).unlink()
    result = run("cohort", made.layout.root, "-o", dataset)
    assert result.exit_code == 3 and "[1/1] a: 120 nuclei" in said(result)
    check(dataset, {(slide_id, made.model): made.table(slide_id) for slide_id in "ab"})
    (dataset / entry.nuclei_files[0]).write_bytes(b"PAR1")
    made.put("c", 30)
    result = run("cohort", made.layout.root, "-o", dataset)
    assert result.exit_code == 2 and "make it again from its runs" in said(result)


def test_a_full_disk_leaves_what_was_there(made: MadeRun, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("cohort", made.layout.root, "-o", dataset)
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    made.put("c", 30)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name in ((pq.ParquetWriter, "write_table"), (folder_storage, "write_slides_table")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, full)
            result = run("cohort", made.layout.root, "-o", dataset)
        assert result.exit_code == 1 and "no space left on disk; free some space and run the same" in said(result)
        assert all(path.read_bytes() == content for path, content in before.items())
    assert run("cohort", made.layout.root, "-o", dataset).exit_code == 0
    check(dataset, {(slide_id, made.model): made.table(slide_id) for slide_id in "abc"})


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """A cohort of two white pictures, which are quick, and a broken one."""
    for name, white in (("a.png", 245), ("b.png", 246)):
        Image.fromarray(np.full((200, 300, 3), white, np.uint8)).save(tmp_path / name)
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    (tmp_path / "cohort.csv").write_text("path,slide_id,mpp\na.png,a,0.25\nb.png,b,0.25\nbroken.svs,c,0.25\n")
    return tmp_path / "cohort.csv"


def test_segment_adds_its_slides(cohort: Path, dataset: Path, tmp_path: Path) -> None:
    command = ("segment", cohort, "-o", tmp_path / "out", "--dataset", dataset)
    result = run(*command)
    assert result.exit_code == 3, result.output
    assert "data set: [2/2] b: 0 nuclei" in said(result) and "c: skipped" not in said(result)
    assert [entry.slide_id for entry in read_entries(dataset)] == ["a", "b"]
    cohort.write_text(cohort.read_text().replace("broken.svs,c", "a.png,c"))
    result = run(*command, "--log-format", "json")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    assert lines[-2]["message"] == "data set: [1/1] c: 0 nuclei"
    assert lines[-1]["message"].startswith("data set: a, c: are the same slide")


def test_segment_checks_the_data_set_before_it_runs(cohort: Path, dataset: Path, tmp_path: Path) -> None:
    for folder, message in ((tmp_path, "no slides.parquet"), (tmp_path / "out", "is the folder of --output")):
        result = run("segment", cohort, "-o", tmp_path / "out", "--dataset", folder)
        assert result.exit_code == 2 and message in said(result)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["file", "file/dataset", "new/dataset"])
def test_segment_checks_that_the_data_set_can_be_created(
    cohort: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    wrong = f"{tmp_path}/file is not a folder"
    if where.startswith("new"):
        wrong = f"{tmp_path} cannot be written"
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    ended = run("segment", cohort, "-o", tmp_path / "out", "--dataset", tmp_path / where)
    assert ended.exit_code == 2 and f"{tmp_path / where}: {wrong}; name another folder" in said(ended)
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_fails_costs_no_slide(
    cohort: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort.write_text(cohort.read_text().replace("broken.svs,c", "a.png,c"))

    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(dataset))

    monkeypatch.setattr(folder_storage, "locked", denied)
    result = run("segment", cohort, "-o", tmp_path / "out", "--dataset", dataset)
    assert result.exit_code == 3 and "3 slides done, 0 failed" in result.stdout
    assert "Permission denied" in said(result) and f"hover-batch cohort {tmp_path / 'out'} -o {dataset}" in said(result)
    monkeypatch.undo()
    assert run("cohort", tmp_path / "out", "-o", dataset).exit_code == 0


def test_help_shows_both_forms(made: MadeRun, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(run("cohort", "--help").stdout.split())
    assert "hover-batch cohort OUT -o DATASET" in text and "build" in text
    assert run("cohort").exit_code == 2
    os.rename(made.layout.root, made.layout.root.with_name("build"))
    monkeypatch.chdir(dataset.parent)
    assert run("cohort", "./build", "-o", dataset).exit_code == 3
