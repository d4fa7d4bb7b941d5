"""Estimates from a part of each slide: both backends draw the same clusters, and complete a slide to the same table."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from accelerators import LoadQuick, Quick
from cohort_runs import SETTINGS, Run, runner
from numpy.typing import NDArray
from PIL import Image
from test_contract import events, tables
from typer.testing import CliRunner

from hover_batch.api import segment_slide
from hover_batch.cli import app
from hover_batch.config import SampleSettings
from hover_batch.errors import InputError
from hover_batch.status import read_status

SAMPLED = replace(
    SETTINGS, infer=replace(SETTINGS.infer, unit=512), sample=SampleSettings(stop_at=0.1, of="spindle", cluster=256)
)
WHOLE = replace(SAMPLED, sample=SampleSettings())


def field(folder: Path, name: str, side: int = 2048) -> None:
    """A slide of 2048² pixels, 64 clusters, with discs in its first `side` pixels along x and y."""
    rng = np.random.default_rng(len(name))
    picture = np.full((2048, 2048, 3), 230, np.uint8)
    y, x = np.mgrid[-9:10, -9:10]
    disc = y**2 + x**2 < 81
    for cx, cy in rng.integers(9, 2038, (1600, 2)):
        if max(cx, cy) < side:
            picture[cy - 9 : cy + 10, cx - 9 : cx + 10][disc] = (90, 60, 140)
    Image.fromarray(picture).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of an even slide, one with nuclei in a corner only, and one that is too small to be sampled."""
    folder = tmp_path_factory.mktemp("slides")
    field(folder, "even")
    field(folder, "uneven", side=500)
    Image.open(folder / "even.png").crop((0, 0, 512, 512)).save(folder / "small.png")
    (folder / "cohort.csv").write_text("path,mpp\neven.png,0.25\nuneven.png,0.25\nsmall.png,0.25\n")
    return folder / "cohort.csv"


@pytest.fixture(scope="module")
def whole(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        runner("local", patch)(slides, out, LoadQuick(), settings=WHOLE)
    return out


def test_slides_end_at_the_precision_asked_for_and_are_completed_later(
    slides: Path, whole: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = run(slides, out, LoadQuick(), settings=SAMPLED)
    assert outcome.exit_code == 0
    assert [s["slide_id"] for s in outcome.estimates] == ["even"]
    assert [s["slide_id"] for s in outcome.slides] == ["uneven", "small"]
    said = json.loads((out / "slides/small/slide.json").read_text())["warnings"]
    assert "--stop-at: 4 clusters with tissue, too few for an estimate, so the whole slide is processed" in said
    reference = tables(whole)
    assert tables(out) == {name: reference[name] for name in ("uneven", "small")}
    even = out / "slides" / "even"
    estimate = json.loads((even / "estimate.json").read_text())["estimate"]
    density = estimate["densities"]["spindle"]
    truth = pd.read_csv(whole / "summary.csv").set_index("slide_id").loc["even"]
    assert density["low"] <= truth.spindle_per_mm2 <= density["high"] <= 1.1 * density["per_mm2"]
    assert estimate["of_clusters"] == 64 and estimate["clusters"] < 40
    # The nuclei of the clusters are those of the whole slide that are anchored there.
    found, all_nuclei = (
        pq.read_table(p) for p in (even / "sampled_nuclei.parquet", whole / "slides/even/nuclei.parquet")
    )
    assert set(found["geometry"].to_pylist()) < set(all_nuclei["geometry"].to_pylist())
    about = pq.read_metadata(even / "sampled_nuclei.parquet").metadata[b"hover_batch"]
    assert json.loads(about)["estimate"] == estimate

    before = len(events(out, "unit_done"))
    assert run(slides, out, LoadQuick(), settings=SAMPLED).exit_code == 0
    assert len(events(out, "unit_done")) == before, "what was estimated is skipped"

    completed = run(slides, out, LoadQuick(), settings=WHOLE)
    assert completed.exit_code == 0 and not completed.estimates and tables(out) == reference
    assert estimate["tiles"] == estimate["of_tiles"] and completed.model_busy is None, "no tile is predicted twice"
    left = {path.name for path in even.iterdir()}
    assert not left & {"sample", "sampled_nuclei.parquet", "estimate.json"}


def test_an_interrupted_estimate_goes_on_with_the_same_clusters(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that breaks in the middle; later, a corrupted tile and lost parts. The estimate is always the same."""
    run, cohort = runner("local", monkeypatch), tmp_path / "cohort.csv"
    cohort.write_text(f"path,mpp\n{slides.parent / 'even.png'},0.25\n")

    class Breaks(Quick):
        batches = 0

        def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
            Breaks.batches += 1
            if Breaks.batches == 12:
                raise RuntimeError("the device is lost")
            return super().predict(tiles)

    run(cohort, tmp_path / "reference", LoadQuick(), settings=SAMPLED)
    out = tmp_path / "out"
    broken = run(cohort, out, lambda package, settings: Breaks(package.card, settings.batch), settings=SAMPLED)
    assert broken.exit_code == 4
    even, reference = (folder / "slides" / "even" for folder in (out, tmp_path / "reference"))
    draw = (even / "sample" / "clusters.json").read_bytes()
    assert 0 < len(list((even / "sample" / "markers").iterdir())) < 24

    def estimate(slide: Path) -> Any:
        content = json.loads((slide / "estimate.json").read_text())
        return content["estimate"], (slide / "sampled_nuclei.parquet").read_bytes()

    assert run(cohort, out, LoadQuick(), settings=SAMPLED).exit_code == 0
    assert (even / "sample" / "clusters.json").read_bytes() == draw == (reference / "sample/clusters.json").read_bytes()
    assert estimate(even) == estimate(reference)

    (even / "estimate.json").unlink()
    shards = [path for path in (even / "sample" / "predictions.zarr" / "c").rglob("*") if path.is_file()]
    shards[7].write_bytes(shards[7].read_bytes()[:-9] + b"corrupted")
    for part in list((even / "sample" / "parts").iterdir())[:3]:
        part.unlink()
    assert run(cohort, out, LoadQuick(), settings=SAMPLED).exit_code == 0
    assert estimate(even) == estimate(reference)


def test_what_is_estimated_is_nowhere_taken_for_whole(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, out = tmp_path / "cohort.csv", tmp_path / "out"
    cohort.write_text(
        f"path,mpp,estimated_age\n{slides.parent / 'even.png'},0.25,50\n{slides.parent / 'small.png'},0.25,60\n"
    )
    outcome = runner("local", monkeypatch)(cohort, out, LoadQuick(), settings=SAMPLED)
    lines = "\n".join(outcome.closing_lines())
    assert "1 slide done, 1 estimated, 0 failed" in lines and "estimated from 24 of 64 clusters" in lines
    summary = pd.read_csv(out / "summary.csv").set_index("slide_id")
    even, small, cohort_row = summary.loc["even"], summary.loc["small"], summary[summary.level == "cohort"].iloc[0]
    assert even.status == "estimated" and even.failed == 0 and np.isnan(even.nuclei) and np.isnan(even.nuclei_per_mm2)
    assert even.estimated_from_clusters == 24 and even.estimated_of_clusters == 64 and even.extra_estimated_age == 50
    assert even.estimated_nuclei_per_mm2_low < even.estimated_nuclei_per_mm2 < even.estimated_nuclei_per_mm2_high
    assert 0.6 < even.estimated_nuclei_per_mm2_true_low / even.estimated_nuclei_per_mm2 < 0.95, "the measuring error"
    assert 1.05 < even.estimated_nuclei_per_mm2_true_high / even.estimated_nuclei_per_mm2 < 1.6
    assert np.isnan(even.estimated_epithelial_per_mm2_low), "a class that was not seen has no interval"
    assert cohort_row.nuclei == small.nuclei and cohort_row.nuclei_per_mm2 == pytest.approx(
        small.nuclei_per_mm2, rel=1e-4
    )
    assert list(pd.read_csv(out / "slides.csv").status) == ["estimated", "done"]
    status = read_status(out)
    assert (status.done, len(status.estimates), status.pending) == (1, 1, 0)
    assert any("estimated from 24 of 64 clusters" in line for line in status.lines())
    assert "estimated" in json.loads(status.to_json())

    def invoke(*command: object) -> str:
        return CliRunner().invoke(app, [str(word) for word in command]).output

    # What was asked for may come from a file: leaving an option out does not undo it.
    remedy = "with --stop-at 0 and without --of"
    assert f"the same command {remedy} completes the estimated slides" in lines
    assert f"repeat the segment command {remedy}" in invoke("export", out, "--to", "csv", "--slide", "even")
    assert f"` {remedy}, and repeat" in invoke("cohort", out, "-o", tmp_path / "dataset")
    assert "even" not in pd.read_parquet(tmp_path / "dataset" / "slides.parquet").slide_id.to_list()
    assert "complete" in invoke("segment", "--from", out, "-o", tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--stop-at", "5%", "--from", "RUN"], "--from .*: needs whole slides, and --stop-at estimates"),
        (["--stop-at", "5%", "--dataset", "DATA"], "--dataset .*: needs whole slides, and --stop-at estimates"),
        (["--stop-at", "5%", "--sobel-norm", "window"], "--stop-at: needs nuclei that do not depend on tile borders"),
        (["--stop-at", "5%", "--of", "tumour"], "--of tumour: must be one of nuclei, miscellaneous, inflammatory"),
        (["--of", "spindle"], "--of spindle: applies to --stop-at; add it, or leave --of out"),
        (["--stop-at", "5"], "--stop-at 5.0: a share below 1, such as 5%"),
        (["--stop-at", "five"], "'five' is not a share such as 5%"),
    ],
)
def test_what_makes_no_sense_is_refused(
    slides: Path, whole: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    places = {"RUN": str(whole), "DATA": str(tmp_path / "data")}
    cohort = [] if "--from" in options else [str(slides)]
    command = ["segment", *cohort, "-o", str(tmp_path / "out"), *(places.get(word, word) for word in options)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and re.search(reason, " ".join(result.output.replace("│", " ").split()))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="stop_at: would give an estimate"):
        segment_slide(slides.parent / "small.png", tmp_path / "out", stop_at=0.05)
