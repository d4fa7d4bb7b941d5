"""Data sets in a bucket hold what they do on disk, wherever a writer fails, and are read in ranges."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import bucket
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from asked import ask
from bucket import Unreliable, reset_to
from dataset_runs import MadeRun, check, held, same

import hover_batch
from hover_batch.bucket import BucketFolder
from hover_batch.cohort.record import Url
from hover_batch.dataset import bucket_storage
from hover_batch.dataset.bucket_files import BucketFiles
from hover_batch.dataset.update import add_run
from hover_batch.errors import InputError, UploadError
from hover_batch.geometry import Size
from hover_batch.view.serve import serve

URL = "s3://bucket/dataset"

pytestmark = pytest.mark.usefixtures("server", "small_files")


@pytest.fixture
def run(nuclei: tuple[Any, Size], tmp_path: Path) -> MadeRun:
    """A run with a slide in several row groups, two that share a file, and one without nuclei."""
    run = MadeRun(tmp_path / "run", *nuclei)
    for slide_id, rows in {"a": 450, "b": 150, "c": 60, "d": 0}.items():
        run.put(slide_id, rows)
    return run


def changed(run: MadeRun) -> dict[str, Any]:
    """Make two slides again, and a new one. Returns the tables before."""
    old = {slide_id: run.table(slide_id) for slide_id in "abcd"}
    run.put("a", 310, seed=1)
    run.put("b", 90, seed=1)
    run.put("e", 40)
    return old


def fetched(folder: Path) -> Path:
    """The data set in the bucket, copied to a folder; a lock file is added, which `check` expects."""
    for name, content in {".lock": b"", **bucket.contents("bucket")}.items():
        path = folder / name.removeprefix("dataset/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert bucket.SECRET.encode() not in content and bucket.KEY_ID.encode() not in content
    return folder


def wanted(run: MadeRun) -> dict[tuple[str, str], Any]:
    return {(slide_id, run.model): run.table(slide_id) for slide_id in run.patients}


def test_the_bucket_holds_the_files_that_the_folder_does(run: MadeRun, tmp_path: Path) -> None:
    for step in ("first", "again"):
        for place in (URL, tmp_path / "disk"):
            done = ask("cohort", run.layout.root, "-o", place)
            assert done.stdout == f"{place}\n"
        on_disk = {p.relative_to(tmp_path / "disk").as_posix(): p for p in (tmp_path / "disk").rglob("*.parquet")}
        there = bucket.contents("bucket")
        assert {name.removeprefix("dataset/") for name in there} == set(on_disk), step
        assert [name for name, path in on_disk.items() if there[f"dataset/{name}"] != path.read_bytes()] == []
        check(fetched(tmp_path / step), wanted(run))
        changed(run)


def test_questions_have_the_answers_of_the_folder(run: MadeRun, tmp_path: Path) -> None:
    answers: list[list[str]] = []
    for place in (URL, tmp_path / "disk"):
        ask("cohort", run.layout.root, "-o", place)
        query = "SELECT type, count(*), avg(area_um2) FROM nuclei GROUP BY type ORDER BY type"
        near = ["cohort", "near", place, "--of", "epithelial", "--to", "inflammatory"]
        answers.append([ask(*words).stdout for words in (["query", place, query], ["cohort", "counts", place], near)])
    assert answers[0] == answers[1]
    with hover_batch.open_cohort(URL) as remote, hover_batch.open_cohort(tmp_path / "disk") as local:
        for slide_id in "abcd":
            windows = [cohort.window(slide_id, (100, 100, 600, 500)) for cohort in (remote, local)]
            pd.testing.assert_frame_equal(*windows)
        for name in ("s3://bucket/other.parquet", f"{URL}/slides.parquet", "/etc/passwd"):
            with pytest.raises(InputError, match="it can only read nuclei, slides"):
                remote.sql(f"SELECT * FROM read_text('{name}')")
    with pytest.raises(InputError, match=f"{URL}/x: is not a data set; .*aws s3 cp"):
        hover_batch.open_cohort(f"{URL}/x")
    with pytest.raises(InputError, match="data set has 4 slides; choose one"):
        serve(Url(URL), None, 0, lambda line: None)


def test_a_lost_file_is_named(run: MadeRun) -> None:
    add_run(run.layout.root, Url(URL), (), lambda line: None)
    with hover_batch.open_cohort(URL) as cohort:
        there = bucket.contents("bucket")
        reset_to("bucket", {"dataset/slides.parquet": there["dataset/slides.parquet"]})
        lost = f"the query failed: {URL}: nuclei/model=.* does not exist any more; repeat"
        with pytest.raises(InputError, match=lost):
            cohort.sql("SELECT avg(area_um2), avg(perimeter_um) FROM nuclei")


def test_a_query_reads_the_ranges_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file of several MB; DuckDB reads small ones at once."""
    values = np.random.default_rng(0).random((2, 300_000))
    pq.write_table(pa.table({"x": np.arange(300_000), "y": values[0], "z": values[1]}), tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    bucket.put("bucket", {"dataset/[1] *.parquet": content})
    read: list[int] = []
    read_range = BucketFolder.read_range

    def counted(folder: BucketFolder, name: str, start: int, end: int) -> bytes:
        found = read_range(folder, name, start, end)
        read.append(len(found))
        return found

    monkeypatch.setattr(BucketFolder, "read_range", counted)
    files = BucketFiles(BucketFolder(Url(URL)))
    with duckdb.connect() as connection:
        connection.register_filesystem(files)
        [(total,)] = connection.sql(f"SELECT sum(y) FROM read_parquet(['{files.path('[1] *.parquet')}'])").fetchall()
    assert total == pytest.approx(values[0].sum())
    assert sum(read) < len(content) / 2


POSITIONS = [pytest.param(1, marks=pytest.mark.faults), 40]


@pytest.mark.parametrize("step", POSITIONS)
def test_any_request_may_fail(
    run: MadeRun, unreliable: Unreliable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Once: it is repeated. For good: what is there opens, and the same command adds the rest."""
    monkeypatch.setattr(bucket_storage, "KEPT_FOR", timedelta(0))
    url = Url(URL)
    add_run(run.layout.root, url, (), lambda line: None)
    before = bucket.contents("bucket")
    old = changed(run)
    new = {slide_id: run.table(slide_id) for slide_id in run.patients}
    first = unreliable.calls + 1
    add_run(run.layout.root, url, (), lambda line: None)
    requests = unreliable.calls - first
    assert requests > 15
    for number in range(0, requests, step):
        reset_to("bucket", before)
        first = unreliable.calls + 1
        unreliable.failing = range(first + number, first + 1000)
        with pytest.raises(UploadError, match=f"^{URL}: "):
            add_run(run.layout.root, url, (), lambda line: None)
        unreliable.failing = ()
        for (slide_id, _), table in held(fetched(tmp_path / f"{number}")).items():
            assert same(table, new[slide_id]) or same(table, old[slide_id]), (number, slide_id)
        first = unreliable.calls + 1
        unreliable.failing = range(first + number % 3, first + 1000, 3)  # one in three, which is repeated
        add_run(run.layout.root, url, (), lambda line: None)
        unreliable.failing = ()
        check(fetched(tmp_path / f"{number}-whole"), wanted(run))


@pytest.mark.faults
def test_a_kill_between_uploads(run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 once there are so many files more; then the same command again."""
    monkeypatch.setattr(bucket_storage, "KEPT_FOR", timedelta(0))
    code = (
        "import sys; from pathlib import Path; from hover_batch.cohort.record import Url; "
        "from hover_batch.dataset import nuclei_file, update; nuclei_file.ROW_GROUP, update.SHARED_ROWS = 100, 300; "
        f"update.add_run(Path(sys.argv[1]), Url({URL!r}), (), print)"
    )
    for number in range(1, 5):
        reset_to("bucket", {})
        with subprocess.Popen([sys.executable, "-c", code, str(run.layout.root)]) as process:
            while process.poll() is None and len(bucket.names("bucket")) < number:
                time.sleep(0.001)
            process.kill()
        found = held(fetched(tmp_path / f"{number}"))
        assert all(same(table, run.table(slide_id)) for (slide_id, _), table in found.items())
        add_run(run.layout.root, Url(URL), (), lambda line: None)
        check(fetched(tmp_path / f"{number}-whole"), wanted(run))


def test_a_second_writer_is_noticed(run: MadeRun, nuclei: tuple[Any, Size], tmp_path: Path) -> None:
    """Its slides stay, and files that it may be uploading are not removed."""
    other = MadeRun(tmp_path / "other", *nuclei, model_sha256="f" * 64)
    other.put("o", 50)
    bucket.put("bucket", {"dataset/nuclei/model=starter-ffffffff/being-uploaded.parquet": b""})
    bucket.put("bucket", {"dataset/slides.parquet": empty_table(tmp_path)})

    def interfere(line: str) -> None:
        if line.startswith("[1/"):
            add_run(other.layout.root, Url(URL), (), lambda line: None)

    with pytest.raises(InputError, match="another command has changed this data set"):
        add_run(run.layout.root, Url(URL), (), interfere)
    add_run(run.layout.root, Url(URL), (), lambda line: None)
    assert "dataset/nuclei/model=starter-ffffffff/being-uploaded.parquet" in bucket.names("bucket")
    found = held(fetched(tmp_path / "found"))
    assert {slide_id for slide_id, _ in found} == {*"abcdo"}


def empty_table(folder: Path) -> bytes:
    from hover_batch.dataset.layout import DatasetLayout
    from hover_batch.dataset.slides import FIXED, write_slides_table

    write_slides_table(DatasetLayout(folder), FIXED.empty_table())
    return (folder / "slides.parquet").read_bytes()


def test_places_that_are_refused(run: MadeRun, tmp_path: Path) -> None:
    bucket.put("bucket", {"dataset/notes.txt": b"mine", "run/run.json": b"{}"})
    cohort = tmp_path / "cohort.csv"
    cohort.write_text("path\n")
    for command, message in (
        (("cohort", run.layout.root, "-o", URL), "holds notes.txt but no slides.parquet"),
        (("segment", cohort, "-o", tmp_path / "out", "--dataset", URL), "--dataset s3://bucket/dataset: holds notes"),
        (("segment", cohort, "-o", URL, "--work", tmp_path, "--dataset", f"{URL}/"), "is the folder of --output"),
        (("segment", cohort, "-o", URL, "--work", tmp_path, "--dataset", tmp_path), "or --work; name another"),
        (("cohort", run.layout.root, "-o", "s3://bucket/run"), "is the folder of a run"),
        (("cohort", run.layout.root, "-o", "s3://none/dataset"), "no such bucket"),
        (("query", f"s3://me:{bucket.SECRET}@bucket/dataset", "SELECT 1"), "give credentials in the environment"),
    ):
        said = ask(*command, exit_code=2).stderr
        assert message in said and bucket.SECRET not in said
