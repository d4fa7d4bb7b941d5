"""PanNuke's three splits, from its published layout to Tables 1 and 2, with every number followed to its file."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from statistics import mean

import pytest
from published import tiles, write_pannuke
from typer.testing import CliRunner

from hover_batch.model.package import find_package
from kd.cli import kd_app
from kd.evaluation.published_rows import MIN_AREA, TABLES

SMALL = ("--size", "64", "--batch", "2", "--steps", "2", "--epoch-steps", "2", "--encoder-weights", "random")


def kd(*arguments: object) -> None:
    done = CliRunner().invoke(kd_app, [str(a) for a in arguments])
    assert done.exit_code == 0, f"{arguments}: {done.output}\n{done.exception}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_three_folds_to_the_tables(tmp_path: Path) -> None:
    cut = tiles(6, 96)
    write_pannuke(tmp_path / "PanNuke", {fold: cut[i : i + 2] for fold, i in (("1", 0), ("2", 2), ("3", 4))})
    data, runs, out = tmp_path / "pannuke.npz", tmp_path / "runs", tmp_path / "tables"
    kd("prepare", tmp_path / "PanNuke", "-o", data)
    splits = ("--split", "1/2/3", "--split", "2/1/3", "--split", "3/2/1")
    kd("sweep", "--data", data, "-o", runs, "--preset", "paper", "--encoder", "mit_b0", "--alpha", 1, *splits,
       "--min-area-px", 10, "--backend", "local", "--threads", 1, "--", *SMALL)  # fmt: skip
    files = sorted(runs.glob("*/scores.json"))
    kd("tables", *files, "-o", out)

    evaluations = [json.loads(file.read_text()) for file in files]
    assert [e["folds"] for e in evaluations] == [["3"], ["3"], ["1"]]
    for file, evaluation in zip(files, evaluations, strict=True):
        package = find_package(str(file.parent / "student.safetensors"))
        train, val, test = file.parent.name.split("_")[-1].split("-")
        settings = package.card.training["settings"]
        assert (settings["train_folds"], settings["val_folds"], evaluation["folds"]) == ([train], [val], [test])
        assert evaluation["sha256"] == package.sha256
    for table in TABLES[:2]:
        with (out / f"{table.name}.csv").open(newline="") as file:
            (row,) = [row for row in csv.DictReader(file) if row["model"] == "mit_b0_a1"]
        traced = re.findall(r"(\S+) \((\w{12})\)", row["run"])
        assert [(out / path).resolve() for path, _ in traced] == files
        assert [sha for _, sha in traced] == [e["sha256"][:12] for e in evaluations]
        assert row[MIN_AREA.title] == "10"
        for column in table.columns:
            values = []
            for evaluation in evaluations:
                value = evaluation["sources"]["pannuke"]
                for key in column.path:
                    value = value[key]
                values += [] if value is None else [value]
            assert row[column.title] == (f"{mean(values):.8g}" if values else "")
    assert "is from tests on fold" not in (out / "tables.md").read_text()
