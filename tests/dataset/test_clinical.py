"""Tables about patients, as Excel, R and pandas write them, are joined with the slides or refused."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from asked import PATIENTS, Asked, ask, make

import hover_batch
from hover_batch.geometry import Size


@pytest.fixture(scope="module")
def asked(nuclei: tuple[Any, Size], tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return make(tmp_path_factory.mktemp("asked"), *nuclei)


CLINICAL = """Patient_ID;months;stage;code;name;seen;alive
001;12.5;II;001;"x; y";01/02/2026;yes
 007 ;NA;III;20;"it's";02/02/2026;no
010;7;I;3;z;03/02/2026; NA
999;1;I;4;nobody;04/02/2026;yes
;2;I;5;without an id;05/02/2026;yes
"""


@pytest.mark.parametrize("start", ["", "\ufeff", "sep=;\n"])
def test_a_clinical_table_is_joined_by_ids_that_stay_text(asked: Asked, tmp_path: Path, start: str) -> None:
    path = tmp_path / "it's clinical.csv"
    path.write_text(start + CLINICAL)
    with pytest.warns(UserWarning, match="not in the data set: 1 of 4 patient_ids: 999"):  # noqa: SIM117
        with pytest.warns(UserWarning, match="no row for 3 of the data set's 6 patient_ids: 002, 011, 012"):
            cohort = hover_batch.open_cohort(asked.root, path)
    with cohort:
        found = cohort.sql(
            "SELECT patient_id, months, stage, code, seen, alive, sum(nuclei) AS n "
            "FROM slides JOIN clinical USING (patient_id) GROUP BY ALL ORDER BY ALL"
        )
    assert found.patient_id.tolist() == ["001", "007", "010"] and found.code.tolist() == ["001", "20", "3"]
    assert found.seen[0] == "01/02/2026" and found.alive.tolist() == ["yes", "no", None]
    assert (
        found.months.tolist()[::2] == [12.5, 7.0] and np.isnan(found.months[1]) and found.n.tolist() == [180, 150, 400]
    )
    done = ask("query", asked.root, "SELECT count(*) FROM clinical", "--join", path)
    assert done.stderr.count("note: ") == 2 and "999" in done.stderr


def test_apostrophes_and_number_signs_in_a_clinical_table_are_text(asked: Asked, tmp_path: Path) -> None:
    """DuckDB would read rows between two apostrophes as one cell, and text after # as a comment."""
    path = tmp_path / "clinical.csv"
    path.write_text(
        "patient_id,name,code,months\n001,'t Veld,0x10,12\n007,O',2,40\n#8,relapse #2,3,3\n"
        '010,"a ""b""",4,4\n#x,y,5,5\n'
    )
    with pytest.warns(UserWarning) as notes, hover_batch.open_cohort(asked.root, path) as cohort:
        found = cohort.sql("SELECT patient_id, name, code, months FROM clinical ORDER BY months")
    assert found.name.tolist() == ["relapse #2", 'a "b"', "y", "'t Veld", "O'"]
    assert found.patient_id.tolist() == ["#8", "010", "#x", "001", "007"] and found.code.tolist()[3] == "0x10"
    assert "2 of 5 patient_ids: #8, #x" in " ".join(str(note.message) for note in notes)


def text_noted(value: Any) -> AbstractContextManager[Any]:
    """Expect the note about numbers that are read as text if `value` is such a text."""
    return pytest.warns(UserWarning, match="is read as text, with cells") if isinstance(value, str) else nullcontext()


def test_a_clinical_table_in_parquet_by_another_column(asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    pq.write_table(pa.table({"slide_id": ["s1", "s5"], "batch": [1, 2]}), path)
    words = [
        "cohort",
        "counts",
        asked.root,
        "--by",
        "batch",
        "--join",
        path,
        "--on",
        "slide_id",
        "-o",
        tmp_path / "x.csv",
    ]
    ask(*words)
    found = pd.read_csv(tmp_path / "x.csv")
    assert found.batch.fillna(0).tolist() == [1, 2, 0] and found.nuclei.tolist()[:2] == [120, 400]


@pytest.mark.parametrize(
    ("text", "on", "message"),
    [
        ("patient_id,x\n1,2\n", "patient_id", "no patient_id in it is in the data set; it has 1, and the data set 001"),
        ("patient_id,x\n001,2\n001,3\n", "patient_id", "several rows have the same patient_id: 001"),
        (
            "patient,x\n001,2\n",
            "patient_id",
            "has no column patient_id, but patient, x; rename patient to patient_id, or",
        ),
        ("patient_id,x\n001,2\n002,3,4,5\n", "patient_id", "cannot be read as CSV"),
        ("patient_id,x\n001,2\n", "patient", "did you mean patient_id?"),
        ("patient_id,x\n", "patient_id", "no patient_id in it is in the data set; it has none"),
        ("patient_id,x\n\xff001,2\n", "patient_id", "cannot be read as CSV"),
        (
            "PK\x03\x04\x14",
            "patient_id",
            "is a spreadsheet or an archive, not a CSV; save the table as CSV",
        ),
        (
            "patient_id,Patient_ID,x\n001,002,1\n",
            "patient_id",
            "named patient_id, by any case: patient_id, Patient_ID",
        ),
        ("patient_id,patient_id\n001,002\n", "patient_id", ": patient_id, patient_id; keep one"),
        ("# exported\npatient_id,x\n001,2\n", "patient_id", "cannot be read as CSV"),
        ("", "patient_id", "clinical.csv"),
    ],
)
def test_clinical_tables_that_cannot_be_joined(asked: Asked, tmp_path: Path, text: str, on: str, message: str) -> None:
    path = tmp_path / "clinical.csv"
    path.write_bytes(text.encode("latin-1"))
    assert message in ask("query", asked.root, "SELECT 1", "--join", path, "--on", on, exit_code=2).stderr


@pytest.mark.parametrize(
    ("months", "read"),
    [
        ("3,5", 3.5),
        ("#N/A", None),
        ("4.500", 4500),
        ("-1.250,5", -1250.5),
        ("1,250", "1,250"),
        ("4.5", "4.5"),
    ],
)
def test_numbers_and_missing_values_of_excel(asked: Asked, tmp_path: Path, months: str, read: Any) -> None:
    path = tmp_path / "clinical.csv"
    path.write_text(f"patient_id;months\n001;{months}\n002;0,5\n", encoding="utf-8")
    with text_noted(read), pytest.warns(UserWarning, match="no row for"):
        cohort = hover_batch.open_cohort(asked.root, path)
    with cohort:
        assert cohort.connection.sql("SELECT months FROM clinical ORDER BY patient_id").fetchall()[0] == (read,)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_nan_is_a_missing_value(asked: Asked, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clinical.{suffix}"
    table = pd.DataFrame({"patient_id": PATIENTS, "months": [1.0, np.nan, 3.0, np.nan, np.nan, np.nan]})
    if suffix == "csv":
        table.to_csv(path, index=False, na_rep="NaN")
    else:
        pq.write_table(pa.table({name: table[name].tolist() for name in table}), path)
    with hover_batch.open_cohort(asked.root, path) as cohort:
        found = cohort.sql("SELECT count(months) AS known, avg(months) AS mean FROM clinical")
    assert found.to_dict("list") == {"known": [2], "mean": [2.0]}


def test_a_corrupted_parquet_file(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "clinical.parquet").write_bytes(b"PAR1 and no more")
    said = ask("query", asked.root, "SELECT 1", "--join", tmp_path / "clinical.parquet", exit_code=2).stderr
    assert "clinical.parquet: cannot be read as CSV" in said


def test_a_clinical_table_that_does_not_exist(asked: Asked, tmp_path: Path) -> None:
    assert "no such file" in ask("query", asked.root, "SELECT 1", "--join", tmp_path / "x.csv", exit_code=2).stderr


def test_ids_that_a_parquet_file_stores_as_bytes(asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / "clinical.parquet"
    pq.write_table(pa.table({"patient_id": pa.array([b"001", "é".encode()], pa.binary())}), path)
    with pytest.warns(UserWarning, match="not in the data set: 1 of 2 patient_ids: é|no row for"):
        cohort = hover_batch.open_cohort(asked.root, path)
    with cohort:
        assert cohort.sql("SELECT patient_id FROM clinical ORDER BY ALL").patient_id.tolist() == ["001", "é"]
