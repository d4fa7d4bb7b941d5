"""Questions in SQL: the answers are those of the runs' own tables, and nothing else is read or written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from asked import SLIDES, Asked, ask, make
from dataset_runs import MadeRun

import hover_batch
from hover_batch.dataset.opened import Dataset
from hover_batch.dataset.update import add_run
from hover_batch.errors import InputError
from hover_batch.geometry import Box, Size

ODD = "it's [1] *?\"; --"
"""Name of a folder, full of characters that mean something in SQL and in patterns."""


@pytest.fixture(scope="module")
def asked(nuclei: tuple[Any, Size], tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return make(tmp_path_factory.mktemp("asked") / ODD, *nuclei)


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_sql_sees_every_nucleus_once(asked: Asked) -> None:
    known = asked.nuclei()
    with hover_batch.open_cohort(asked.root) as cohort:
        found = cohort.sql("SELECT * FROM nuclei ORDER BY slide_id, nucleus_id")
        counted = cohort.sql(
            "SELECT patient_id, type, count(*) AS n, avg(area_um2) AS area "
            "FROM nuclei JOIN slides USING (slide_id, model) WHERE patient_id IS NOT NULL GROUP BY ALL ORDER BY ALL"
        )
        assert cohort.notes == []
    columns = ["slide_id", "nucleus_id", "type", "centroid_x", "prob_inflammatory", "touches_border"]
    assert set(found.model) == {asked.run.model}
    pd.testing.assert_frame_equal(found[columns], known[columns], check_dtype=False)
    assert [shape.wkb for shape in found.geometry] == list(known.geometry)
    patients = (
        known[known.patient_id != ""].groupby(["patient_id", "type"]).area_um2.agg(["size", "mean"]).reset_index()
    )
    assert counted.patient_id.tolist() == patients.patient_id.tolist() and "007" in set(counted.patient_id)
    assert counted.n.tolist() == patients["size"].tolist()
    np.testing.assert_allclose(counted.area, patients["mean"], rtol=1e-6)


def test_a_sum_is_a_whole_number_and_an_order_is_kept(asked: Asked, tmp_path: Path) -> None:
    query = "SELECT slide_id, sum(nucleus_id) AS total FROM nuclei GROUP BY slide_id ORDER BY total DESC;"
    with hover_batch.open_cohort(asked.root) as cohort:
        found = cohort.sql(query)
    assert found.total.dtype == np.int64
    assert found.total.tolist() == sorted((n * (n + 1) // 2 for _, _, n in SLIDES.values() if n), reverse=True)


@pytest.mark.parametrize("box", [Box(100, 200, 400, 300), (0.0, 0.0, 50.5, 1000.0), (5000, 0, 6000, 100)])
def test_a_window_holds_what_overlaps_it(asked: Asked, box: Any) -> None:
    known = hover_batch.load_nuclei(asked.run.layout.slide("s6").nuclei_parquet)
    x0, y0, x1, y1 = (box.x0, box.y0, box.x1, box.y1) if isinstance(box, Box) else box
    boxes = pd.DataFrame(asked.run.table("s6")["bbox"].to_pylist())
    overlaps = (boxes.xmax > x0) & (boxes.xmin < x1) & (boxes.ymax > y0) & (boxes.ymin < y1)
    with hover_batch.open_cohort(asked.root) as cohort:
        found = cohort.window("s6", box)
        assert len(cohort.window("s8", box)) == 0  # a slide without nuclei
        with pytest.raises(InputError, match=r"s99: is not a slide .*s1, s2"):
            cohort.window("s99", box)
    wanted = known[overlaps.to_numpy()].reset_index(drop=True)
    assert list(found.columns) == list(wanted.columns)
    assert found.nucleus_id.tolist() == wanted.nucleus_id.tolist()
    assert (found.geometry == wanted.geometry).all() and found.type.tolist() == wanted.type.tolist()


REFUSED = [
    "SELECT 1; SELECT 2",
    "COPY (SELECT 1) TO '{free}'",
    "WITH x AS (COPY (SELECT 1) TO '{file}' (USE_TMP_FILE false)) SELECT 1",
    "WITH x AS (INSERT INTO slides SELECT * FROM slides RETURNING 1) FROM x",
    "CREATE TABLE more AS SELECT 1",
    "DROP TABLE slides",
    "DELETE FROM slides",
    "ATTACH '{free}'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "PRAGMA database_list",
    "EXPORT DATABASE '{free}'",
    "SELECT * FROM read_csv('{secret}')",
    "SELECT * FROM read_text('{secret}')",
    "SELECT * FROM '{secret}'",
    "SELECT * FROM glob('{secret}*')",
    "SELECT * FROM query('COPY (SELECT 1) TO ''{free}''')",
    "SELECT * FROM asked",
    "SELECT 1) UNION ALL (SELECT 2",
    "SELECT nonsense FROM nuclei",
    "SELECT CAST(type AS INTEGER) FROM nuclei",
    "SELEKT",
    "",
    "/* only a comment */",
]


@pytest.fixture(scope="module")
def opened(asked: Asked) -> Iterator[Dataset]:
    with hover_batch.open_cohort(asked.root) as cohort:
        yield cohort


@pytest.mark.parametrize("query", REFUSED)
def test_a_query_only_reads_the_data_set(asked: Asked, opened: Dataset, tmp_path: Path, query: str) -> None:
    secret, free = tmp_path / "secret.csv", tmp_path / "written.parquet"
    secret.write_text("a\n1\n")
    file = str(next(asked.root.rglob("model=*/*.parquet"))).replace("'", "''")
    before = contents(asked.root)
    with pytest.raises(InputError, match="^the query"):
        opened.sql(query.format(secret=secret, free=free, file=file))
    assert contents(asked.root) == before and sorted(tmp_path.iterdir()) == [secret]


def test_a_refused_query_ends_the_command(asked: Asked) -> None:
    done = ask("query", asked.root, "DROP TABLE slides", exit_code=2)
    assert done.stderr.startswith("Error: the query") and not done.stdout


def test_settings_cannot_be_changed_on_the_connection_itself(asked: Asked) -> None:
    with hover_batch.open_cohort(asked.root) as cohort:
        for statement in ("SET enable_external_access = true", "SET allowed_paths = ['/etc/passwd']", "LOAD httpfs"):
            with pytest.raises(InputError):
                cohort.execute(statement)
        cohort.execute("CREATE TEMP TABLE large AS SELECT * FROM nuclei WHERE area_um2 > 5")
        assert len(cohort.sql("FROM large"))


def test_results_in_files(asked: Asked, tmp_path: Path) -> None:
    columns = "patient_id, slide_id, bbox, geometry, area_um2, [type_id] AS ids"
    query = f"SELECT {columns} FROM nuclei JOIN slides USING (slide_id, model)"
    for name in ("all.csv", "all.parquet"):
        done = ask("query", asked.root, query, "-o", tmp_path / name)
        assert done.stdout == f"{tmp_path / name}\n" and "1,980 rows" in done.stderr
    as_csv = pd.read_csv(tmp_path / "all.csv", dtype={"patient_id": str})
    as_parquet = pq.read_table(tmp_path / "all.parquet")
    assert len(as_csv) == as_parquet.num_rows == sum(rows for _, _, rows in SLIDES.values())
    assert as_csv.patient_id.dropna().tolist() == as_parquet["patient_id"].drop_null().to_pylist()
    assert as_csv.geometry[0].startswith("POLYGON") and "xmin" in as_csv.bbox[0]
    np.testing.assert_array_equal(as_csv.area_um2.to_numpy(np.float32), as_parquet["area_um2"].to_numpy())


@pytest.mark.parametrize("name", ["x.xlsx", "none/x.csv", "folder.csv", "closed/x.csv"])
def test_files_that_cannot_be_written_are_refused_before_the_query(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "closed").mkdir()
    touch = Path.touch

    def touch_unless_closed(path: Path, *args: Any, **options: Any) -> None:
        if path.parent == tmp_path / "closed":  # root may write everywhere
            denied(path)
        touch(path, *args, **options)

    monkeypatch.setattr(Path, "touch", touch_unless_closed)
    assert f"-o {tmp_path / name}: " in ask("query", asked.root, "SELEKT", "-o", tmp_path / name, exit_code=2).stderr


def test_a_query_without_its_clinical_table(asked: Asked) -> None:
    said = ask("query", asked.root, "SELECT * FROM slides JOIN clinical USING (patient_id)", exit_code=2).stderr
    assert "there is no table clinical; give one with --join FILE.csv" in " ".join(said.split())


def test_a_result_does_not_go_into_the_data_set(asked: Asked) -> None:
    path = asked.root / "slides.parquet"
    assert "must not change" in ask("query", asked.root, "SELECT 1", "-o", path, exit_code=2).stderr


def test_a_result_does_not_replace_the_clinical_table(asked: Asked, tmp_path: Path) -> None:
    clinical = tmp_path / "clinical.csv"
    clinical.write_text("patient_id,stage\n001,2\n")
    for words in (["query", asked.root, "SELECT 1 AS x"], ["cohort", "counts", asked.root]):
        said = ask(*words, "--join", clinical, "-o", clinical, exit_code=2).stderr
        assert f"-o {clinical}: is {clinical}, which must not change" in said
    assert clinical.read_text() == "patient_id,stage\n001,2\n"


def test_a_query_in_other_bytes_than_utf_8(asked: Asked) -> None:
    assert "not UTF-8" in ask("query", asked.root, "SELECT 'caf\udce9'", exit_code=2).stderr


def test_polygons_in_lists(asked: Asked) -> None:
    with hover_batch.open_cohort(asked.root) as cohort:
        shapes = cohort.sql("SELECT slide_id, list(geometry) AS shapes FROM nuclei GROUP BY slide_id ORDER BY slide_id")
        area = cohort.sql("SELECT slide_id, geometry FROM nuclei").groupby("slide_id").geometry
        assert [sum(s.area for s in row) for row in shapes.shapes] == pytest.approx(
            [sum(s.area for s in group) for _, group in area]
        )


def test_a_result_is_printed_where_nobody_reads(asked: Asked) -> None:
    """Standard output is closed, as by `>&-` in a shell."""
    command = [sys.executable, "-m", "hover_batch", "query", str(asked.root), "SELECT 1"]
    shell = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, text=True)
    assert (shell.returncode, shell.stderr) == (0, "")


def test_a_long_result_on_the_terminal(asked: Asked) -> None:
    shown = ask("query", asked.root, "SELECT nucleus_id, 1 / 3 AS third FROM nuclei").stdout
    assert "1980 rows" in shown and "(40 shown)" in shown and "0.33333333 " in shown and len(shown.splitlines()) < 60
    assert (
        ask("query", asked.root, "FROM nuclei").stderr
        == "note: 1,940 rows are hidden; -o FILE.csv writes all of them\n"
    )
    assert "note: most rows are hidden" in ask("query", asked.root, "FROM nuclei, range(10)").stderr
    for table in ("slides", "nuclei"):
        described = ask("query", asked.root, f"DESCRIBE {table}")
        with hover_batch.open_cohort(asked.root) as cohort:
            assert all(f"│ {name} " in described.stdout for name in cohort.sql(f"FROM {table} LIMIT 0").columns)
        assert "shown)" not in described.stdout and described.stderr == ""


def test_numbers_on_the_terminal_keep_all_digits_before_the_point(asked: Asked) -> None:
    """FLOAT would change dates and ids, which pandas writes as 20230115.0 in columns with missing values."""
    shown = {
        "20230115": "20230115.0",
        "16777217": "16777217.0",
        "123456789.25": "123456789.0",
        "-1234.56789": "-1234.5679",
        "2 / 3": "0.66666667",
        "1e-60": "1e-60",
        "1e39": "1e+39",
        "0": "0.0",
        "'inf'": "inf",
        "NULL": "NULL",
    }
    result = ask("query", asked.root, f'SELECT unnest([{", ".join(shown)}]::DOUBLE[]) AS "a b"').stdout
    assert re.findall(r"│ +(\S+) │", result) == list(shown.values())


def test_folders_that_are_no_data_set(asked: Asked, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none", asked.run.layout.root):
        assert "is not a data set" in ask("query", folder, "SELECT 1", exit_code=2).stderr


@pytest.fixture
def copied(asked: Asked, tmp_path: Path) -> Path:
    """Copy of the data set, for tests that change it."""
    return Path(shutil.copytree(asked.root, tmp_path / "copied"))


def test_a_lost_file_is_named(copied: Path) -> None:
    path = next(copied.rglob("model=*/*.parquet"))
    path.unlink()
    message = ask("query", copied, "SELECT avg(area_um2) FROM nuclei", exit_code=2).stderr
    assert path.name in message and "make the data set again" in message


def test_a_file_that_may_not_be_read_is_not_called_removed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(copied.rglob("model=*/*.parquet"))
    path.chmod(0)
    with monkeypatch.context() as patched:
        if os.access(path, os.R_OK):  # by root
            path.write_bytes(b"")
            patched.setattr("builtins.open", denied)
        said = ask("query", copied, "SELECT avg(area_um2) FROM nuclei", exit_code=1).stderr
    assert f"{path}: Permission denied; check that it can be read" in said


def test_a_query_without_a_folder_for_temporary_files(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", fail)
    assert "set TMPDIR to a folder" in ask("query", asked.root, "SELECT 1", exit_code=2).stderr


def denied(path: object, *_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_a_replaced_file_is_not_counted(copied: Path) -> None:
    [path] = list((copied / "nuclei").rglob("*.parquet"))
    table = pq.read_table(path)
    for rows in (table.slice(1), pa.concat_tables([table, table])):
        pq.write_table(rows, path)
        with pytest.raises(InputError, match=rf"has {len(rows):,} nuclei instead of {len(table):,}\)\. If .* repeat"):
            hover_batch.open_cohort(copied)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"a file of nuclei was removed or replaced \(.*too small.*\)\. If"):
        hover_batch.open_cohort(copied)


def test_a_data_set_without_nuclei(nuclei: tuple[Any, Size], tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", *nuclei)
    run.put("empty", 0)
    add_run(run.layout.root, tmp_path / "dataset", (), lambda line: None)
    with hover_batch.open_cohort(tmp_path / "dataset") as cohort:
        assert cohort.sql("SELECT count(*) AS n, max(prob_inflammatory) AS p FROM nuclei").n.tolist() == [0]
        assert len(cohort.window("empty", (0, 0, 10, 10))) == 0
    assert "empty" in ask("cohort", "near", tmp_path / "dataset", "--of", "spindle", "--to", "spindle").stdout


@pytest.mark.faults
def test_ctrl_c_ends_a_query(asked: Asked) -> None:
    endless = "SELECT count(*) FROM range(1000000000) a, range(1000) b WHERE a.range % 7 = b.range % 5"
    probe = (
        "import duckdb, typer; from hover_batch.cli import app; command = typer.main.get_command(app); "
        "print('begins', flush=True); command()"
    )
    words = [sys.executable, "-c", probe, "query", str(asked.root), endless]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "begins\n"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(1)  # the first ones may come before the query
            os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130 and "Traceback" not in said, said


@pytest.fixture
def two_models(nuclei: tuple[Any, Size], copied: Path, tmp_path: Path) -> Path:
    """The data set with a second model, whose nuclei of s1 are others."""
    second = MadeRun(tmp_path / "second", *nuclei, model_sha256="f" * 64)
    second.put("s1", 33)
    add_run(second.layout.root, copied, (), lambda line: None)
    return copied


def test_two_models(two_models: Path) -> None:
    with hover_batch.open_cohort(two_models) as cohort:
        found = cohort.sql("SELECT model, count(*) AS n FROM nuclei WHERE slide_id = 's1' GROUP BY model ORDER BY n")
        assert found.n.tolist() == [33, 120]
        everywhere = (0, 0, 1000, 1000)
        assert len(cohort.window("s1", everywhere, "starter-ffffffff")) == 33
        with pytest.raises(
            InputError,
            match="several models; .* the argument `model`.*, one of starter-00000000, starter-ffffffff",
        ):
            cohort.window("s1", everywhere)
    for question in (["counts"], ["near", "--of", "spindle", "--to", "spindle"], ["compare"]):
        words = ["cohort", question[0], two_models, *question[1:]]
        assert "give --model (in Python, the argument `model`), one of" in ask(*words, exit_code=2).stderr
        assert "several models have this name" in ask(*words, "--model", "starter", exit_code=2).stderr
        assert "model other: is not one of the data set's models" in ask(*words, "--model", "other", exit_code=2).stderr
    one = ask("cohort", "counts", two_models, "--by", "slide_id", "--model", "starter-ffffffff").stdout
    assert "33" in one and "s2" not in one


@pytest.mark.parametrize(
    "box", [(10, 10, 0, 0), (0, 0, np.nan, 5), (0, 0, 5), (0, 0, 5, 5, 5), "1234", None, (0, 0, 0, 9)]
)
def test_what_is_no_box_is_refused(asked: Asked, box: Any) -> None:
    with hover_batch.open_cohort(asked.root) as cohort:
        assert len(cohort.window("s1", (0, 0, np.inf, np.inf))) == 120
        with pytest.raises(InputError, match="must be four numbers"):
            cohort.window("s1", box)


def test_arguments_of_other_types_are_refused(asked: Asked) -> None:
    wrong: Any = 5
    for arguments in ({"path": wrong}, {"clinical": wrong}, {"on": wrong}, {"on": None}, {"clinical": " "}):
        with pytest.raises(InputError, match=f"^{next(iter(arguments))}[: ]"):
            hover_batch.open_cohort(**{"path": asked.root, **arguments})
    with hover_batch.open_cohort(asked.root) as cohort, pytest.raises(InputError, match="query 5: must be a str"):
        cohort.sql(wrong)
    assert "give --join" not in ask("query", asked.root, "SELECT 1").stderr
    assert "no table is given" in ask("query", asked.root, "SELECT 1", "--on", "slide_id", exit_code=2).stderr
