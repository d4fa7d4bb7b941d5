"""Estimates on a slide of real fields, with the starter's predictions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from draws import draws
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.geometry import Grid, Mpp, Size
from hover_batch.slide.tissue import TissueMask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

EXTENT, FIELD = 2048, 410
MPP = Mpp(0.25, 0.25)


@pytest.fixture(scope="module")
def cohort(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 2048² pixels: pieces of 25 fields of colon, side by side."""
    folder = tmp_path_factory.mktemp("fields")
    picture = Image.new("RGB", (EXTENT, EXTENT))
    for number, path in enumerate(sorted((data / "nuclei" / "images").glob("consep_*.png"))[:25]):
        picture.paste(Image.open(path).crop((0, 0, FIELD, FIELD)), (number % 5 * FIELD, number // 5 * FIELD))
    picture.save(folder / "colon.png")
    (folder / "cohort.csv").write_text("path,mpp\ncolon.png,0.25\n")
    (folder / "small.toml").write_text("[sample]\ncluster = 256\n")
    return folder / "cohort.csv"


def segment(cohort: Path, out: Path, *options: str) -> str:
    config = str(cohort.with_name("small.toml"))
    flags = ["--backend", "local", "--unit", "1024", "--tissue", "all", "--config", config]
    result = CliRunner().invoke(app, ["segment", str(cohort), "-o", str(out), *flags, *options])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def whole(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    segment(cohort, out)
    return out


def test_an_estimate_and_its_completion(cohort: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = segment(cohort, out, "--stop-at", "30%")
    assert "of 64 clusters" in printed
    slide, reference = (folder / "slides" / "colon" for folder in (out, whole))
    estimate = json.loads((slide / "estimate.json").read_text())["estimate"]
    density = estimate["densities"]["nuclei"]
    truth = pd.read_csv(whole / "summary.csv").nuclei_per_mm2[0]
    print(printed, truth, f"{estimate['tiles'] / estimate['of_tiles']:.1%} computed")
    assert density["low"] <= truth <= density["high"]
    # Nuclei of components that are cut by the end of the halo may differ.
    found, expected = (
        set(pq.read_table(folder)["geometry"].to_pylist())
        for folder in (slide / "sampled_nuclei.parquet", reference / "nuclei.parquet")
    )
    print(f"{len(found - expected)} of {len(found)} nuclei differ from the whole slide's")
    assert len(found - expected) <= 0.01 * len(found)
    segment(cohort, out)
    assert (slide / "nuclei.parquet").read_bytes() == (reference / "nuclei.parquet").read_bytes()


def anchors(table: Path, fields: int) -> NDArray[np.float64]:
    """The nuclei (n, 2) of a slide of `fields` × `fields` of the real fields, chosen at random and mirrored."""
    columns = pq.read_table(table, columns=["centroid_x", "centroid_y"])
    points = np.stack([columns["centroid_x"].to_numpy(), columns["centroid_y"].to_numpy()], axis=1)
    column, row = (points // FIELD).astype(int).T
    by_field = [points[(column == n % 5) & (row == n // 5)] % FIELD for n in range(25)]
    rng = np.random.default_rng(0)
    placed = []
    for y in range(fields):
        for x in range(fields):
            field = by_field[rng.integers(25)]
            placed.append(np.where(rng.random(2) < 0.5, field, FIELD - field) + np.array([x, y]) * FIELD)
    return np.concatenate(placed)


@pytest.mark.parametrize(("clusters", "side", "stop_at"), [(24, 1024, 0.05), (20, 256, 0.15)])
def test_intervals_cover_the_density_of_real_fields(whole: Path, clusters: int, side: int, stop_at: float) -> None:
    """200 draws on a slide of real fields, whose borders are not those of the clusters."""
    extent = clusters * side
    points = anchors(whole / "slides" / "colon" / "nuclei.parquet", -(-extent // FIELD))
    points = points[(points < extent).all(axis=1)]
    grid = Grid.over(Size(extent, extent), MPP, MPP.x)
    mask = TissueMask(np.ones((1, 1), bool), (float(extent), float(extent)))
    result = draws(points, grid, mask, side, stop_at)
    assert result.stopped >= 150
    assert result.covered >= 0.9 * result.stopped
