"""Tables, cell by cell, from evaluations with known numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hover_batch.errors import InputError
from hover_batch.taxonomy import CONSEP, PANNUKE, Taxonomy
from kd.cli import kd_app
from kd.evaluation.published_rows import COST_COLUMNS, COST_ROWS, TABLES
from kd.evaluation.remap import PAPER_CONSEP
from kd.evaluation.tables import read_runs, tables, write_tables

LEAK = {"source": "pannuke", "certain": True, "text": "pannuke, 9 of 9 images: the teacher has seen PanNuke"}


def scores(taxonomy: Taxonomy, first: float) -> dict[str, Any]:
    """`first`, and a hundredth more for each class."""
    names = [c.name for c in taxonomy.nuclei]
    by_class = {name: first + i / 100 for i, name in enumerate(names, start=1)}
    plain = dict.fromkeys(("dice", "aji", "dq", "sq", "pq", "bpq", "f_d", "precision", "recall"), first)
    return plain | {"classes": names, "images": 9, "nuclei": 90, "mpq": None, "pq_c": by_class, "f_c": by_class}


def write(path: Path, sources: dict[str, Any], **changed: Any) -> Path:
    report = {
        "label": "b2",
        "sha256": path.stem * 20,
        "architecture": "unet mit_b2",
        "data": "cache",
        "folds": ["3"],
        "sobel_norm": "fixed",
        "min_area_px": 64,
        "sources": sources,
        "by_image": {},
        "leakage": [],
        "cost": {
            "parameters": 27_478_314,
            "patch": 256,
            "macs_per_patch": 7_179_075_584,
            "macs_per_kept_pixel": 174425,
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | changed))
    return path


def read(folder: Path, name: str) -> dict[str, dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two folds of b2 on PanNuke, one of them seen by the teacher; the starter on CoNSeP; b2 on CoNSeP."""
    cost = {"parameters": 1, "patch": 256, "macs_per_patch": 1, "macs_per_kept_pixel": 1.0, "seconds_per_patch": 0.25}
    return [
        write(tmp_path / "runs" / "abc", {"pannuke": scores(PANNUKE, 0.40)}, leakage=[LEAK]),
        write(tmp_path / "runs" / "def", {"pannuke": scores(PANNUKE, 0.44)}, folds=["1"]),
        write(
            tmp_path / "runs" / "123",
            {"consep": scores(CONSEP, 0.3)},
            label="starter",
            architecture="unet mit_b0",
            cost=cost | {"timed_on": "a CPU"},
        ),
        write(tmp_path / "runs" / "fff", {"consep": scores(PAPER_CONSEP, 0.5)}, cost=cost | {"seconds_per_tile": 3.5}),
    ]


def test_ours_beside_the_papers(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "tables"
    result = CliRunner().invoke(kd_app, ["tables", *map(str, runs), "-o", str(out)])
    assert result.exit_code == 0, result.exception
    text = (out / "tables.md").read_text()
    trace = "../runs/abc (abcabcabcabc); ../runs/def (defdefdefdef)"
    assert (
        "| b2 † | 0.4200 ± 0.0283 | – | 0.4300 ± 0.0283 | 0.4400 ± 0.0283 | 0.4500 ± 0.0283 | 0.4600 ± 0.0283 "
        f"| 0.4700 ± 0.0283 | 64 | {trace} |" in text
    )
    assert "† b2: pannuke, 9 of 9 images: the teacher has seen PanNuke" in text
    assert (
        "| HoVer-UNet | 0.6286 | 0.4475 | 0.5239 | 0.4009 | 0.3794 | 0.0762 | 0.4779 | 10 | arXiv 2311.12553, Table 1 |"
        in text
    )
    assert "| starter | 0.00 | 256 | 0.00 | 0.0 | 0.2500 | – | ../runs/123 (123123123123) |" in text
    assert "starter was timed on a CPU." in text

    pq = read(out, "pannuke_pq")
    assert float(pq["b2"]["PQ_B"]) == pytest.approx(0.42) and float(pq["b2"]["PQ_B sd"]) == pytest.approx(
        0.04 / 2**0.5, rel=1e-6
    )
    assert (pq["b2"]["PQ_M"], pq["b2"]["run"]) == ("", trace)
    assert (pq["b2"]["min px"], pq["HoVerNet"]["min px"]) == ("64", "10") and "min px sd" not in pq["b2"]
    assert pq["b2"]["seen"].startswith("† pannuke")
    assert (pq["HoVerNet"]["Dead"], pq["HoVerNet"]["run"]) == ("0.1390", "arXiv 2311.12553, Table 1")
    # of the three evaluations on CoNSeP's images or PanNuke's, one is by the paper's classes
    external = read(out, "consep_external")
    assert set(external) == {"HoVerNet", "HoVer-UNet", "b2"}
    assert [float(external["b2"][c]) for c in ("Neoplastic", "Miscellaneous")] == pytest.approx([0.51, 0.54])
    assert external["b2"]["seen"] == ""  # what was seen is PanNuke
    assert [external[name]["s per tile"] for name in ("HoVerNet", "HoVer-UNet", "b2")] == ["48", "17", "3.5"]
    assert "b2 is from tests on fold 1, 3; the published rows are means over the tests" in text
    ours = read(out, "ours_consep")
    assert (ours["starter"]["f spindle"], ours["b2"]["f spindle"]) == ("0.34", "")
    cost = read(out, "cost")
    assert float(cost["b2"]["GMac per patch"]) == pytest.approx(7.179 * 2 / 3, abs=1e-3)
    assert (cost["HoVerNet"]["GMac per patch"], cost["HoVerNet"]["s per patch"]) == ("149.73", "0.835")


def test_a_row_of_all_three_tests_needs_no_note(tmp_path: Path) -> None:
    folds = [("a", "3"), ("b", "3"), ("c", "1")]
    paths = [write(tmp_path / name, {"pannuke": scores(PANNUKE, 0.4)}, folds=[fold]) for name, fold in folds]
    assert [note for table in tables(read_runs(paths), tmp_path) for note in table.notes if "b2" in note] == []


def test_every_cell_of_ours_has_a_run(runs: list[Path], tmp_path: Path) -> None:
    for table in tables(read_runs(runs), tmp_path):
        for row in table.ours:
            assert row.run and set(row.means) == {c.title for c in table.columns}


def test_published_rows_fill_their_columns() -> None:
    for rows, columns in [*((t.rows, t.columns) for t in TABLES), (COST_ROWS, COST_COLUMNS)]:
        assert all(len(cells) == len(columns) for cells in rows.values())
        assert all(cell == "" or float(cell) >= 0 for cells in rows.values() for cell in cells)


def test_a_table_of_published_rows_alone_says_so(runs: list[Path], tmp_path: Path) -> None:
    write_tables(tables(read_runs(runs[2:3]), tmp_path), tmp_path)
    assert (tmp_path / "tables.md").read_text().count("No evaluation was given for this table.") == 3


def test_sources_and_labels_may_have_any_name(tmp_path: Path) -> None:
    """A source is part of a file's name, and a label a cell of Markdown, whose columns must not shift."""
    sources = {"lab/a": scores(PANNUKE, 0.4), "lab%2Fa": scores(PANNUKE, 0.6), "../b": scores(PANNUKE, 0.5)}
    path = write(tmp_path / "abc", sources, label="T=3|\nα=0.5")
    out = tmp_path / "tables"
    write_tables(tables(read_runs([path]), out), out)
    names = {"ours_lab%2Fa": "0.4", "ours_lab%252Fa": "0.6", "ours_..%2Fb": "0.5"}
    assert {name: read(out, name)["T=3|\nα=0.5"]["pq"] for name in names} == names
    assert {file.name for file in tmp_path.iterdir()} == {"abc", "tables"}
    assert not list(out.glob(".*"))
    rows = [line for line in (out / "tables.md").read_text().splitlines() if "T=3" in line]
    assert len(rows) == 4 and all(row.startswith(r"| T=3\| α=0.5 | ") for row in rows)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "the same model on the same images of pannuke"),
        ({"folds": ["3", "3"]}, "the same model on the same images of pannuke"),
        ({"architecture": "unet mit_b0", "folds": ["1"]}, "its architecture is unet mit_b0, .* another --label"),
        ({"sobel_norm": "window", "folds": ["1"]}, "its sobel_norm is window"),
        ({"min_area_px": 10, "folds": ["1"]}, "its min_area_px is 10, but that of .* is 64, .* another --label"),
    ],
)
def test_what_cannot_share_a_row_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    sources = {"pannuke": scores(PANNUKE, 0.4)}
    paths = [write(tmp_path / name / "abc", sources, **more) for name, more in (("a", {}), ("b", changed))]
    with pytest.raises(InputError, match=message):
        read_runs(paths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"sources": {"tnbc": {"pq": NaN}}}', r"not JSON \(NaN is not a number\)"),
        ("[]", "lacks everything"),
        ('{"split": "test"}', "it lacks architecture, by_image, cost"),
    ],
)
def test_what_is_no_evaluation_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_runs([tmp_path / "x.json"])


@pytest.mark.parametrize(
    "changed",
    [
        {"sources": 5},
        {"sources": {"pannuke": None}},
        {"sources": {"pannuke": {"classes": 1}}},
        {"cost": []},
        {"leakage": [1]},
        {"folds": 3},
        {"label": ["b2"], "sources": {"pannuke": {}}},
        *({"sources": {"tnbc": scores(PANNUKE, 0.4) | {"pq": value}}} for value in (True, "0.7", 10**400, [0.7])),
    ],
)
def test_what_looks_like_an_evaluation_and_is_none_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = write(tmp_path / "x.json", **{"sources": {"pannuke": scores(PANNUKE, 0.4)}} | changed)
    with pytest.raises(InputError, match="x.json: not an evaluation of this version"):
        read_runs([path])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.json: No such file or directory"):
        read_runs([tmp_path / "none.json"])
