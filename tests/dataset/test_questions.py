"""Ready-made questions have the answers that the runs' tables give by hand, and teach the SQL that they run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dataset_runs
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from asked import SLIDES, Asked, ask, make
from scipy.spatial import cKDTree
from scipy.stats import t

from hover_batch.dataset import update
from hover_batch.dataset.groups import cliffs_delta, with_measuring_error
from hover_batch.dataset.layout import DatasetLayout
from hover_batch.dataset.near import NearQuestion
from hover_batch.dataset.opened import Dataset
from hover_batch.dataset.questions import Subject
from hover_batch.dataset.slides import SlideEntry, read_slides_table, write_slides_table
from hover_batch.geometry import Mpp, Size
from hover_batch.taxonomy import CONSEP, NucleusClass, Taxonomy
from hover_batch.uncertainty import CountError

MPP = Mpp(0.25, 0.75)
"""Pixels much higher than wide, as no scanner makes them, so that a distance in pixels would be wrong."""
TISSUE = 1000 * 0.25 * 1000 * 0.75 / 1e6
"""mm² of tissue of each slide."""
CLASSES = [c.name for c in CONSEP.nuclei]
ODD = """it's "odd"); --"""
"""Name of a class and a group, full of characters that mean something in SQL."""


@pytest.fixture(scope="module")
def asked(nuclei: tuple[Any, Size], tmp_path_factory: pytest.TempPathFactory) -> Asked:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_runs, "MPP", MPP)
        patch.setattr(update, "SHARED_ROWS", 300)  # so that slides are in several files, some shared
        return make(tmp_path_factory.mktemp("asked"), *nuclei)


def answer(folder: Path, *words: object, notes: str = "") -> pd.DataFrame:
    """What `cohort` writes to a file, with ids as text."""
    path = folder / "answer.csv"
    done = ask("cohort", *words, "-o", path)
    assert notes in done.stderr
    ids = ("patient_id", "slide_id", "group", "first", "second")
    return pd.read_csv(path, dtype=dict.fromkeys(ids, str), keep_default_na=False, na_values=[""])


@pytest.mark.parametrize("by", ["patient_id", "group", "slide_id"])
def test_counts(asked: Asked, tmp_path: Path, by: str) -> None:
    found = answer(tmp_path, "counts", asked.root, "--by", by).set_index(by, drop=False)
    slides = pd.DataFrame.from_dict(SLIDES, orient="index", columns=["patient_id", "group", "rows"])
    slides["slide_id"] = slides.index
    assert len(found) == slides[by].nunique()
    known = asked.nuclei()
    for value, row in found.iterrows():
        these = slides[slides[by] == ("" if pd.isna(value) else value)]
        tissue = TISSUE * len(these)
        of_type = known[known.slide_id.isin(these.index)].type.value_counts()
        assert row.slides == len(these) and row.nuclei == these.rows.sum()
        assert row.tissue_mm2 == pytest.approx(tissue)
        assert row.nuclei_per_mm2 == pytest.approx(these.rows.sum() / tissue)
        for name in CLASSES:
            assert row[f"n_{name}"] == of_type.get(name, 0)
            assert row[f"{name}_per_mm2"] == pytest.approx(of_type.get(name, 0) / tissue)
    if by == "group":
        assert found.patients.tolist() == [3, 3, 0]


def test_counts_of_one_class_on_the_terminal(asked: Asked) -> None:
    done = ask("cohort", "counts", asked.root, "--of", "inflammatory")
    assert "inflammatory_per_mm2" in done.stdout and "spindle" not in done.stdout and "007" in done.stdout


def test_slides_with_flags_are_named_and_can_be_left_out(asked: Asked, tmp_path: Path) -> None:
    words = ("counts", asked.root, "--by", "patient_id")
    found = answer(tmp_path, *words, notes="note: quality flags on 1 of 9 slides, counted; --without-flagged")
    assert found.slides.tolist() == [2, 1, 1, 1, 1, 2, 1]
    found = answer(tmp_path, *words, "--without-flagged", notes="1 of 9 slides, left out: s8 (no_nuclei)")
    assert found.slides.tolist() == [2, 1, 1, 1, 1, 1, 1]
    assert found.nuclei_per_mm2[5] == pytest.approx(450 / TISSUE)


QUESTIONS = [
    ("counts", "--by", "group"),
    ("counts", "--by", "slide_id", "--of", "spindle", "--without-flagged"),
    ("near", "--of", "epithelial", "--to", "inflammatory", "--by", "patient_id"),
    ("near", "--of", "spindle", "--to", "spindle", "--within", "12.5 µm", "--without-flagged"),
]


@pytest.mark.parametrize("question", QUESTIONS, ids=" ".join)
def test_the_sql_that_is_shown_gives_the_same_answer(asked: Asked, tmp_path: Path, question: tuple[str, ...]) -> None:
    words = [question[0], asked.root, *question[1:]]
    sql = ask("cohort", *words, "--show-sql").stdout
    ask("query", asked.root, sql, "-o", tmp_path / "query.csv")
    ask("cohort", *words, "-o", tmp_path / "answer.csv")
    assert (tmp_path / "query.csv").read_text() == (tmp_path / "answer.csv").read_text()


def near_by_tree(nuclei: pd.DataFrame, of: str, to: str, within: float) -> int:
    """The number of nuclei of one class in a slide that are near another, by scipy."""
    places = {name: rows[["centroid_x", "centroid_y"]] * [MPP.x, MPP.y] for name, rows in nuclei.groupby("type")}
    if of not in places or to not in places:
        return 0
    distances, _ = cKDTree(places[to]).query(places[of], k=[2 if of == to else 1])
    return int((distances[:, 0] <= within).sum())


@pytest.mark.parametrize(
    ("of", "to", "within"),
    [
        ("epithelial", "inflammatory", 9.0),
        ("epithelial", "inflammatory", 20.0),
        ("spindle", "spindle", 20.0),
        ("spindle", "spindle", 333.3),
        ("miscellaneous", "spindle", 333.3),
    ],
)
def test_near_is_what_a_tree_finds(asked: Asked, tmp_path: Path, of: str, to: str, within: float) -> None:
    found = answer(tmp_path, "near", asked.root, "--of", of, "--to", to, "--within", within).set_index("slide_id")
    known = asked.nuclei()
    assert list(found.index) == list(SLIDES)
    for slide_id, row in found.iterrows():
        nuclei = known[known.slide_id == slide_id]
        number = (nuclei.type == of).sum()
        assert (row.nuclei, row.near) == (number, near_by_tree(nuclei, of, to, within))
        assert row.share == pytest.approx(row.near / number) if number else pd.isna(row.share)


def test_near_by_patient_adds_up_slides(asked: Asked, tmp_path: Path) -> None:
    words = ("near", asked.root, "--of", "epithelial", "--to", "inflammatory")
    slides = answer(tmp_path, *words).set_index("slide_id")
    patients = answer(tmp_path, *words, "--by", "patient_id").set_index("patient_id")
    both = slides.loc[["s1", "s2"]].sum()
    assert (patients.loc["001", "nuclei"], patients.loc["001", "near"]) == (both.nuclei, both.near)
    assert patients.loc["001", "share"] == pytest.approx(both.near / both.nuclei)


def test_near_reads_one_file_after_the_other(asked: Asked) -> None:
    with Dataset(asked.root) as dataset:
        question = NearQuestion(Subject.of(dataset, None, False), "spindle", "spindle", 20.0, "slide_id")
        seen: list[list[str]] = []

        def track(items: list[list[SlideEntry]]) -> Iterator[list[SlideEntry]]:
            for entries in items:
                yield entries
                seen.append([entry.slide_id for entry in entries])
                assert dataset.sql("SELECT count(DISTINCT slide_id) AS n FROM nuclei").n[0] == 8  # and is whole again

        rows = question.answer(track).fetchall()
    files = {entry.nuclei_files for entry in dataset.entries if entry.nuclei_files}
    assert len(files) > 1 and len(seen) == len(files) and sorted(sum(seen, [])) == sorted(set(SLIDES) - {"s8"})
    assert len(rows) == len(SLIDES)


def test_bad_questions(asked: Asked) -> None:
    said = [
        (("counts", "--by", "nonsense"), "--by nonsense: is not a column of the slides; columns: slide_id, model, "),
        (("counts", "--of", "lymphocyte"), "--of lymphocyte: is not a class of these nuclei; their classes: misc"),
        (("near", "--of", "x", "--to", "spindle"), "--of x: is not a class"),
        (("near", "--of", "spindle", "--to", "x"), "--to x: is not a class"),
        (("near", "--of", "spindle", "--to", "spindle", "--within", "0"), "--within 0: must be a distance in µm"),
        (("near", "--of", "spindle", "--to", "spindle", "--within", "nan"), "--within nan: must be a distance in µm"),
        (("near", "--of", "spindle", "--to", "spindle", "--within", "2 mm"), "'2 mm' is not a length in µm, such as"),
        (("compare", "--by", "nonsense"), "--by nonsense: is not a column"),
        (("compare", "--by", "slide_id"), "slides in several groups: 001, 012"),
        (("compare", "--by", "patient_id"), "--by patient_id: a patient alone is no group; give a column"),
        (("compare", "--by", "groups"), "--by groups: is not a column of the slides"),
        (("compare", "--by", "groups"), "did you mean group?"),
        (("compare", "--by", "mask_path"), "no slide has both a patient_id and a mask_path"),
        (("compare", "--by", "model"), "has 1 group (starter-00000000); 2 to 10 can be compared"),
    ]
    for (question, *words), message in said:
        assert message in ask("cohort", question, asked.root, *words, exit_code=2).stderr


def test_odd_names_of_classes_and_groups(nuclei: tuple[Any, Size], tmp_path: Path) -> None:
    classes = [NucleusClass(c.id, ODD if c.name == "spindle" else c.name, c.color) for c in CONSEP.classes]
    asked = make(tmp_path / ODD, *nuclei, groups={"a": ODD}, taxonomy=Taxonomy("odd", tuple(classes)))
    found = answer(tmp_path, "counts", asked.root, "--by", "group", "--of", ODD)
    assert found.group.tolist()[1] == ODD and found[f"n_{ODD}"].sum() == (asked.nuclei().type == ODD).sum()
    found = answer(tmp_path, "near", asked.root, "--of", ODD, "--to", ODD, "--within", "30", "--by", "group")
    assert found.near.sum() > 0 and ODD in found.group.tolist()
    found = answer(tmp_path, "compare", asked.root, "--of", ODD)
    assert found.measure.tolist() == [f"{ODD}_per_mm2"] and ODD in (found["first"][0], found.second[0])
    sql = ask("cohort", "near", asked.root, "--of", ODD, "--to", ODD, "--show-sql").stdout
    assert "s1" in ask("query", asked.root, sql).stdout


def test_cliffs_delta_counts_pairs() -> None:
    random = np.random.default_rng(1)
    for first, second in ((5, 8), (1, 3), (20, 20)):
        a, b = random.integers(0, 6, first).astype(float), random.integers(0, 6, second).astype(float)
        pairs = np.sign(b[None, :] - a[:, None])
        assert cliffs_delta(a, b) == pytest.approx(pairs.mean())
    assert cliffs_delta(np.array([1.0, 2]), np.array([3.0, 4])) == 1


def test_compare_takes_patients_not_slides_nor_nuclei(asked: Asked, tmp_path: Path) -> None:
    notes = "note: 1 slide without patient_id or group left out: s9\nnote: fewer than 10 patients in a (3), b (3)"
    found = answer(tmp_path, "compare", asked.root, "--by", "group", notes=notes)
    assert found.measure.tolist() == ["nuclei_per_mm2", *(f"{name}_per_mm2" for name in CLASSES)]
    row = found.iloc[0]
    a = np.array([180 / 2, 200, 150]) / TISSUE
    b = np.array([400, 500, 450 / 2]) / TISSUE
    assert (row["first"], row.second, row.patients_first, row.patients_second) == ("a", "b", 3, 3)
    assert (row.median_first, row.median_second) == pytest.approx((np.median(a), np.median(b)))
    assert row.difference == pytest.approx(np.median(b) - np.median(a))
    assert (row.cliffs_delta, row.cliffs_delta_high) == (1, 1)  # all of b are above all of a
    # With three patients, the extremes of the medians are those of the patients themselves.
    assert (row.difference_low, row.difference_high) == pytest.approx((b.min() - a.max(), b.max() - a.min()))
    assert (found.difference_low <= found.difference).all() and (found.difference <= found.difference_high).all()


def test_a_column_of_both_tables_is_taken_from_the_clinical_one_only_if_the_slides_have_no_values(
    asked: Asked, tmp_path: Path
) -> None:
    path = tmp_path / "clinical.csv"
    path.write_text("patient_id,group,magnification\n001,c,20x\n012,d,40x\n")
    said = ask("cohort", "counts", asked.root, "--by", "group", "--join", path, exit_code=2).stderr
    assert "--by group: is a column of the slides and of the clinical table; rename it" in said
    ask("cohort", "counts", asked.root, "--by", "magnification", "--join", path, "-o", tmp_path / "x.csv")
    found = pd.read_csv(tmp_path / "x.csv").set_index("magnification")
    assert found.nuclei["20x"] == 180 and found.nuclei["40x"] == 450


def test_the_measuring_error_of_sources_in_differences() -> None:
    """One source scales a difference and keeps its sign; with two, equal groups may differ by their factors."""
    exact = CountError(mean=0.2, mean_variance=0, source=0, slide=0, field_mm2=0, unpaired=0, df=6)
    a, b = np.full(5, 100.0), np.full(5, 300.0)
    found = with_measuring_error((a, b), exact)
    assert found.one_source == found.two_sources == pytest.approx((200 * np.exp(0.2),) * 2)
    error = replace(exact, mean=0.0, mean_variance=0.001, source=0.01)
    one, two = with_measuring_error((a, b), error).one_source, with_measuring_error((a, b), error).two_sources
    half = t.ppf(0.975, 6) * np.sqrt(0.011)
    assert one == pytest.approx((200 * np.exp(-half), 200 * np.exp(half)), rel=0.02)
    assert two[0] < one[0] and two[1] > one[1]
    same = with_measuring_error((a, a), error)
    assert same.one_source == (0, 0)
    # The median of |t1 - t2| of two sources: a normal approximation of the difference of two factors near 1.
    assert -60 < same.two_sources[0] < -20 and 20 < same.two_sources[1] < 60


def test_compare_carries_the_measuring_error_if_all_slides_have_the_same(asked: Asked, tmp_path: Path) -> None:
    root = tmp_path / "measured"
    shutil.copytree(asked.root, root)
    layout = DatasetLayout(root)
    slides = read_slides_table(root)
    error = CountError(mean=0.1, mean_variance=0.001, source=0.01, slide=0.003, field_mm2=0.002, unpaired=0.3, df=6)
    column = slides.column_names.index("count_error")
    cells = [json.dumps(error.to_json())] * len(slides)
    write_slides_table(layout, slides.set_column(column, "count_error", pa.array(cells)))
    found = answer(tmp_path, "compare", root, "--by", "group", notes="the measuring error of classes is not known")
    row, *classes = found.itertuples()
    low, high = row.difference_one_source_low, row.difference_one_source_high
    assert row.difference_two_sources_low < low < row.difference < high < row.difference_two_sources_high
    assert all(np.isnan(row.difference_two_sources_low) for row in classes)
    assert "two sources" in ask("cohort", "compare", root, "--by", "group").stdout
    cells[0] = json.dumps(replace(error, df=5).to_json())
    write_slides_table(layout, slides.set_column(column, "count_error", pa.array(cells)))
    notes = "the measuring error of these counts is not known"
    assert np.isnan(answer(tmp_path, "compare", root, "--by", "group", notes=notes).difference_one_source_low[0])


def test_compare_on_the_terminal_with_groups_of_a_clinical_table(asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / "clinical.csv"
    path.write_text("patient_id,response\n001,no\n002,no\n007,yes\n010,yes\n011,yes\n012,no\n")
    words = ("cohort", "compare", asked.root, "--by", "response", "--join", path, "--of", "inflammatory")
    done = ask(*words)
    assert "no (n = 3)" in done.stdout and "yes (n = 3)" in done.stdout and "inflammatory_per_mm2" in done.stdout
    assert ask(*words).stdout == done.stdout  # the resamples are the same each time
    assert "1 slide without patient_id or response" in done.stderr
    sql = ask(*words, "--show-sql").stdout
    shown = ask("query", asked.root, sql, "--join", path).stdout
    assert shown.count("│ no ") == 3 and "inflammatory_per_mm2" in shown
