"""Ray cluster for all tests of this folder, and cohorts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import command
import numpy as np
import pytest
from cohort_runs import HERE, Run, engine_of, on_loopback, runner
from PIL import Image
from typer.testing import CliRunner

from hover_batch.cli import app


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster with faults planted in its processes; yields the folder of the files that count them."""
    on_loopback()
    from hover_batch.executor.cluster import started

    folder = tmp_path_factory.mktemp("planted")
    before = {name: os.environ.get(name) for name in ("PLANTED", "PYTHONPATH")}
    os.environ["PLANTED"] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "planted"), str(HERE), str(HERE.parents[1])])
    try:
        plan = engine_of()
        with started(plan.resources, folder / "ray.log", plan.object_store_bytes):
            yield folder
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture(params=["local", "ray"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both backends must pass."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return str(request.param)


@pytest.fixture
def run(backend: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(cohort, out, load=…, plan=…, settings=…)` on that backend, through `run_segment`."""
    return runner(backend, monkeypatch)


@pytest.fixture
def run_on_ray(ray_cluster: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner("ray", monkeypatch)


@pytest.fixture
def fields(tmp_path: Path) -> Callable[..., Path]:
    """`fields("a", "b")`: a cohort of pictures of these names, 700 × 600 pixels of dark discs on pale ground."""

    def write(*names: str, width: int = 700, height: int = 600) -> Path:
        folder = tmp_path / "cohort"
        folder.mkdir(exist_ok=True)
        for number, name in enumerate(names):
            rng = np.random.default_rng(number)
            y, x = np.mgrid[:height, :width]
            picture = np.full((height, width, 3), 230, np.uint8)
            for cy, cx, radius in zip(
                rng.integers(0, height, 60), rng.integers(0, width, 60), rng.integers(6, 14, 60), strict=True
            ):
                picture[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = (90, 60, 140)
            Image.fromarray(picture).save(folder / f"{name}.png")
        rows = "".join(f"{name}.png,0.25\n" for name in names)
        (folder / "cohort.csv").write_text("path,mpp\n" + rows)
        return folder / "cohort.csv"

    return write


@pytest.fixture(scope="session")
def cohort(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real field of 1000² pixels."""
    on_loopback()
    folder = tmp_path_factory.mktemp("cohort")
    shutil.copy(data / "nuclei" / "images" / "consep_train_03.png", folder / "field.png")
    (folder / "cohort.csv").write_text("path,mpp\nfield.png,0.25\n")
    return folder / "cohort.csv"


@pytest.fixture(scope="session")
def whole(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run by `--backend local`."""
    out = tmp_path_factory.mktemp("undisturbed")
    result = CliRunner().invoke(app, ["segment", str(cohort), "-o", str(out), "--backend", "local", *command.SETTINGS])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="session")
def undisturbed(whole: Path) -> bytes:
    return (whole / "slides" / "field" / "nuclei.parquet").read_bytes()
