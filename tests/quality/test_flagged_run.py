"""Flags of a run on all its surfaces, and --fail-on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from hover_batch.cli import app
from hover_batch.quality.flags import Flag, flag_slides


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures without tissue: nothing is predicted, so that runs of it are quick."""
    folder = tmp_path_factory.mktemp("cohort")
    random = np.random.default_rng(0)
    grey = np.repeat(random.integers(60, 250, (200, 300, 1)), 3, axis=2).astype(np.uint8)
    pictures = {"grey": grey, "black": np.zeros_like(grey), "white": np.full_like(grey, 255), "dot": grey[:1, :1]}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    path = folder / "cohort.csv"
    path.write_text("path,mpp\n" + "".join(f"{name}.png,0.25\n" for name in pictures))
    return path


@pytest.fixture(scope="module")
def out(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    result = run("segment", cohort, "-o", folder)
    assert result.exit_code == 0, result.output
    assert "flagged: 4 slides of 4" in result.stdout and "white: no_tissue: No tissue was found." in result.stdout
    return folder


def summary(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "summary.csv").open(newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def slides(folder: Path) -> dict[str, dict[str, object]]:
    return {path.parent.name: json.loads(path.read_bytes()) for path in folder.glob("slides/*/slide.json")}


def test_slides_without_tissue_are_flagged_everywhere(out: Path) -> None:
    rows = summary(out)
    assert {name: rows[name]["flags"] for name in ("grey", "white")} == {"grey": "no_tissue;grey", "white": "no_tissue"}
    assert rows["black"]["flags"].startswith("no_tissue") and rows["dot"]["flags"].startswith("no_tissue")
    assert rows["grey"]["ink"] == "0"
    assert "flagged: 4 slides (no_tissue 4" in run("status", out).stdout
    stands = json.loads(run("status", out, "--json").stdout)
    assert set(stands["flagged"]["white"]) == {"no_tissue"}
    assert run("report", out).exit_code == 0
    page = (out / "report.html").read_text()
    assert "Slides to look at" in page and "<b>grey</b> The picture has no colour." in page


def test_tissue_without_a_nucleus_is_flagged_everywhere(tmp_path: Path) -> None:
    """Plain pink, which the model searches; a single pixel of it; a part that a mask leaves out; a mask on glass."""
    pink = np.full((200, 300, 3), (225, 160, 200), np.uint8)
    glass = np.full_like(pink, 245)
    for name, picture in {"pink": pink, "dot": pink[:1, :1], "masked": pink, "glass": glass}.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    mask = np.zeros((200, 300), np.uint8)
    mask[:20, :20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "cohort.csv").write_text(
        "path,slide_id,mpp,mask_path\npink.png,pink,0.25,\ndot.png,dot,0.25,\nmasked.png,masked,0.25,mask.png\n"
        "glass.png,glass,0.25,mask.png\n"
    )
    out = tmp_path / "out"
    result = run("segment", tmp_path / "cohort.csv", "-o", out, "--batch", "1")
    assert result.exit_code == 0, result.output
    stands = json.loads(run("status", out, "--json").stdout)
    assert run("report", out).exit_code == 0
    assert summary(out)["glass"]["flags"] == "mask;no_nuclei" and "mask 1, no_nuclei 4" in run("status", out).stdout
    assert "glass: Only 0% of the mask lies on stained tissue." in result.stderr
    for name in ("pink", "dot", "masked"):
        assert f"{name}: no_nuclei: No nucleus was found in the tissue. Look at overlay.jpg" in result.stdout
        assert "no_nuclei" in summary(out)[name]["flags"].split(";")
        assert "no_nuclei" in stands["flagged"][name]
    assert (out / "report.html").read_text().count("<b>no_nuclei</b>") >= 3
    again = run("segment", "--from", out, "-o", tmp_path / "new", "--batch", "1")
    assert again.exit_code == 0, again.output
    assert summary(tmp_path / "new")["glass"]["flags"] == "mask;no_nuclei"


def test_resumed_runs_and_new_tables_have_equal_flags(out: Path, cohort: Path, tmp_path: Path) -> None:
    before = summary(out)
    assert "flagged: 4 slides of 4" in run("segment", cohort, "-o", out).stdout
    assert run("segment", "--from", out, "-o", tmp_path / "new").exit_code == 0
    for rows in (summary(out), summary(tmp_path / "new")):
        assert {name: row["flags"] for name, row in rows.items()} == {
            name: row["flags"] for name, row in before.items()
        }
    held, new = slides(out), slides(tmp_path / "new")
    assert {name: value["quality"] for name, value in held.items()} == {n: v["quality"] for n, v in new.items()}


def test_fail_on_makes_failures_of_flags_and_loses_nothing(cohort: Path, tmp_path: Path) -> None:
    refused = run("segment", cohort, "-o", tmp_path / "out", "--fail-on", "blurry")
    assert refused.exit_code == 2 and "--fail-on blurry: is not a flag" in refused.stderr
    result = run("segment", cohort, "-o", tmp_path / "out", "--fail-on", "grey", "--fail-on", "ink")
    assert result.exit_code == 3, result.output
    with (tmp_path / "out" / "failures.csv").open(newline="") as file:
        failures = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert failures["grey"]["stage"] == "quality"
    assert failures["grey"]["reason"].startswith("--fail-on grey: The picture has no colour.")
    assert "white" not in failures
    rows = summary(tmp_path / "out")
    assert rows["grey"]["status"] == "failed" and rows["grey"]["flags"] == "no_tissue;grey"
    assert (tmp_path / "out" / "slides" / "grey" / "nuclei.parquet").is_file()
    again = run("segment", cohort, "-o", tmp_path / "out")
    assert again.exit_code == 0 and "grey: done before" in again.stderr


def test_a_run_of_an_older_version_says_so_once(cohort: Path, tmp_path: Path) -> None:
    assert run("segment", cohort, "-o", tmp_path / "old").exit_code == 0
    for path in (tmp_path / "old").glob("slides/*/slide.json"):
        held = json.loads(path.read_bytes())
        del held["quality"], held["limits"]
        path.write_text(json.dumps(held))
    result = run("segment", cohort, "-o", tmp_path / "old")
    assert result.stdout.count("older version") == 1 and "4 slides" in result.stdout
    assert summary(tmp_path / "old")["grey"]["flags"] == "no_tissue"


def test_the_order_of_slides_does_not_matter(out: Path) -> None:
    held = slides(out)
    expected: dict[str, tuple[Flag, ...]] = flag_slides(held)
    assert flag_slides(dict(reversed(held.items()))) == expected
