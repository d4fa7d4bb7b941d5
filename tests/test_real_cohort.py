"""One cohort of real slides of two scanners, two tiles and a broken file, from the CSV to the tables."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import geopandas
import numpy as np
import openslide
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from real_slides import CMU, COMPLETE, TCGA, write_real_cohort
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.config import PostSettings
from hover_batch.dataset.slides import read_entries
from hover_batch.geometry import cell_box
from hover_batch.metrics import match_centroids
from hover_batch.model.card import Card
from hover_batch.nuclei.measure import Nuclei, concatenate
from hover_batch.nuclei.stitch import nuclei_of_region
from hover_batch.nuclei.watershed import SobelConstants
from hover_batch.store import PredictionStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

RADIUS_UM = 3.0
OTHERS_OFFSET = 32


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run."""
    folder = tmp_path_factory.mktemp("real")
    cohort = write_real_cohort(data, folder)
    result = CliRunner().invoke(app, ["segment", str(cohort), "-o", str(folder / "out")])
    assert result.exit_code == 3, result.output
    return folder / "out"


def test_broken_is_listed_with_its_reason_and_the_others_are_complete(out: Path) -> None:
    failures = pd.read_csv(out / "failures.csv")
    assert list(failures.slide_id) == ["broken"]
    assert "broken.svs" in failures.reason[0] and failures.row[0] == 6
    slides = pd.read_csv(out / "slides.csv")
    assert list(slides.status) == ["done", "done", "done", "done", "failed"]
    summary = pd.read_csv(out / "summary.csv")
    assert (summary[summary.level == "cohort"].failed == 1).all()
    for slide_id in COMPLETE:
        slide = out / "slides" / slide_id
        for name in ("slide.json", "tissue.geojson", "thumbnail.jpg", "overlay.jpg", "timings.json"):
            assert (slide / name).stat().st_size > 0
        assert (slide / "predictions.zarr" / "zarr.json").exists()
        nuclei = geopandas.read_parquet(slide / "nuclei.parquet")
        assert len(nuclei) == json.loads((slide / "slide.json").read_text())["nuclei"] > 100
        assert nuclei.geometry.is_valid.all()
        assert list(nuclei.nucleus_id) == list(range(1, len(nuclei) + 1))


def test_the_metadata_tells_what_the_positions_mean(out: Path) -> None:
    sizes = {CMU: (2220, 2967, 0.499), TCGA: (8704, 6784, 0.2485)}
    for slide_id, (width, height, mpp) in sizes.items():
        path = out / "slides" / slide_id / "nuclei.parquet"
        metadata = json.loads(pq.read_metadata(path).metadata[b"hover_batch"])
        assert metadata["level0"] == {"width": width, "height": height}
        assert metadata["mpp"]["x"] == pytest.approx(mpp, abs=5e-5)
        nuclei = geopandas.read_parquet(path)
        assert nuclei.centroid_x.between(0, width).all() and nuclei.centroid_y.between(0, height).all()


def test_centroids_agree_with_another_models(out: Path, data: Path) -> None:
    """A plausibility check, not truth: the other cells are predictions of another model. The figures are printed.

    Its positions lie OTHERS_OFFSET pixels to the upper left of the nuclei, which is seen without any model of ours:
    the slide is darkest under them when they are moved back.
    """
    others = pd.read_csv(data / "slides" / f"{TCGA}_pseudo_cells.csv")
    theirs = others[["x", "y"]].to_numpy(np.float64)
    with openslide.OpenSlide(data / "slides" / f"{TCGA}.tif") as slide:
        grey = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("L"))
    shades = {}
    for offset in range(0, 65, 4):
        x, y = np.rint(theirs + offset).astype(int).T
        inside = (x < grey.shape[1]) & (y < grey.shape[0])
        shades[offset] = grey[y[inside], x[inside]].mean()
    assert min(shades, key=lambda offset: shades[offset]) == OTHERS_OFFSET

    nuclei = geopandas.read_parquet(out / "slides" / TCGA / "nuclei.parquet")
    ours = nuclei[["centroid_x", "centroid_y"]].to_numpy()
    f1 = {}
    for offset in (0, OTHERS_OFFSET):
        pairs = len(match_centroids(theirs + offset, ours, RADIUS_UM / 0.2485))
        f1[offset] = 2 * pairs / (len(ours) + len(theirs))
        print(
            f"\n{len(ours)} nuclei, {len(theirs)} of the other model moved by {offset} px: F1 at 3 µm {f1[offset]:.3f}"
        )
    assert f1[OTHERS_OFFSET] > 0.75


def test_units_of_1024_pixels_give_the_same_nuclei(out: Path, data: Path, tmp_path: Path) -> None:
    """The other run had units of 4096 pixels: six of them, against some forty."""
    arguments = ["segment", str(data / "slides" / f"{TCGA}.tif"), "-o", str(tmp_path), "--unit", "1024"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    slides = [folder / "slides" / TCGA for folder in (out, tmp_path)]
    units = [json.loads((slide / "slide.json").read_text())["units"] for slide in slides]
    assert units[1] > 5 * units[0]
    tables = [(slide / "nuclei.parquet").read_bytes() for slide in slides]
    assert tables[0] == tables[1]


def nuclei_in_cores(store: PredictionStore, card: Card, core: int) -> Nuclei:
    """All nuclei of a slide, post-processed in regions of `core` pixels."""
    settings, constants = PostSettings(), SobelConstants.from_json(card.sobel)
    boxes = [cell_box(*cell, core).intersect(store.canvas) for cell in store.canvas.cells(core)]
    return concatenate([nuclei_of_region(store.read, box, card.layout, settings, constants) for box in boxes])


def test_cores_of_any_size_give_the_same_nuclei(out: Path) -> None:
    """The whole TCGA slide in cores of 512, 1024 and 2048 pixels and as one."""
    store = PredictionStore.open(out / "slides" / TCGA / "predictions.zarr")
    card = Card.from_json(store.array.attrs["model"])
    side = max(store.canvas.width, store.canvas.height)
    whole = nuclei_in_cores(store, card, side)
    assert len(whole) > 5000
    for core in (512, 1024, 2048):
        part = nuclei_in_cores(store, card, core)
        for field in fields(Nuclei):
            if field.name != "contours":
                assert getattr(part, field.name).tobytes() == getattr(whole, field.name).tobytes(), (core, field.name)
        assert all((a == b).all() for a, b in zip(part.contours, whole.contours, strict=True))


def rings(nuclei: Nuclei) -> set[bytes]:
    return {ring.tobytes() for ring in nuclei.contours}


def test_a_data_set_has_all_nuclei_of_the_run(out: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["cohort", str(out), "-o", str(tmp_path / "dataset")])
    assert result.exit_code == 3 and "broken: skipped: is not done" in result.stderr
    entries = read_entries(tmp_path / "dataset")
    assert sorted(entry.slide_id for entry in entries) == sorted(COMPLETE)
    [file] = {name for entry in entries for name in entry.nuclei_files}
    with pq.ParquetFile(tmp_path / "dataset" / file) as shared:
        held = shared.read().replace_schema_metadata(None)
    for slide_id in COMPLETE:
        with pq.ParquetFile(out / "slides" / slide_id / "nuclei.parquet") as table:
            wanted = table.read().replace_schema_metadata(None)
        found = held.filter(pc.equal(held["slide_id"], slide_id)).sort_by("nucleus_id")
        assert found.combine_chunks().equals(wanted.combine_chunks())
    assert len(held) == sum(entry.nuclei_rows for entry in entries)
