"""Commands that must start fast import nothing heavy: torch, Ray and tiatoolbox take many seconds.

Each probe is a new interpreter, since this one has already imported them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "ray", "tiatoolbox"}

COMMAND = """
import json, sys
from pathlib import Path
from hover_batch.cli import app
try:
    app(sys.argv[2:], prog_name="hover-batch")
finally:
    Path(sys.argv[1]).write_text(json.dumps(sorted(sys.modules)))
"""


def _run(arguments: list[str], folder: Path, report: Path) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run `hover-batch ARGUMENTS` in `folder`; returns how it ended, and which of HEAVY it imported."""
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, str(report), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.is_file(), ended.stderr
    return ended, HEAVY & set(json.loads(report.read_text()))


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "cwd"
    folder.mkdir()
    return folder


COMMANDS = [
    [],
    ["segment"],
    ["plan"],
    ["status"],
    ["export"],
    ["report"],
    ["view"],
    ["query"],
    ["cohort"],
    ["cohort", "compare"],
    ["kd"],
    ["models"],
    ["models", "import"],
    ["doctor"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(command: list[str], empty: Path, tmp_path: Path) -> None:
    ended, heavy = _run([*command, "--help"], empty, tmp_path / "modules.json")
    assert ended.returncode == 0, ended.stderr
    assert "Usage" in ended.stdout
    assert heavy == set()


def test_plan_of_a_tile_imports_nothing_heavy_and_writes_nothing(empty: Path, tmp_path: Path) -> None:
    assert cv2.imwrite(str(empty / "tile.png"), np.full((512, 512, 3), 200, np.uint8))
    (empty / "cohort.csv").write_text("path,mpp\ntile.png,0.25\n")
    ended, heavy = _run(["plan", "cohort.csv"], empty, tmp_path / "modules.json")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()
    assert heavy == set()
    assert {path.name for path in empty.rglob("*")} == {"tile.png", "cohort.csv"}


def test_status_imports_nothing_heavy_and_writes_nothing(empty: Path, tmp_path: Path) -> None:
    slide = empty / "out" / "slides" / "a"
    slide.mkdir(parents=True)
    (slide / "key.json").write_text("{}")
    (empty / "out" / "run.json").write_text('{"format": "hover-batch run"}')
    (empty / "out" / "slides.csv").write_text("path,slide_id,row,status\na.svs,a,2,pending\n")
    before = sorted(empty.rglob("*"))
    ended, heavy = _run(["status", "out"], empty, tmp_path / "modules.json")
    assert ended.returncode == 0, ended.stderr
    assert "1 begun" in ended.stdout
    assert heavy == set()
    assert sorted(empty.rglob("*")) == before


def test_plan_of_real_slides_imports_nothing_heavy(data: Path, empty: Path, tmp_path: Path) -> None:
    slides = [data / "slides" / name for name in ("CMU-1-Small-Region.svs", "TCGA-V5-A7RE_40x_colsW.tif")]
    (empty / "cohort.csv").write_text("\n".join(["path", *map(str, slides)]))
    ended, heavy = _run(["plan", "cohort.csv"], empty, tmp_path / "modules.json")
    assert ended.returncode == 0, ended.stderr
    assert heavy == set()


@pytest.mark.parametrize(
    "module",
    ["hover_batch.config", "hover_batch.model.heads", "hover_batch.cohort.record", "kd.training.config"],
)
def test_shared_words_import_nothing_heavy(module: str) -> None:
    """These are imported by every command and every station."""
    probe = f"import sys, {module}; print(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", probe],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert HEAVY & set(ended.stdout.split()) == set()


def test_training_and_packaging_do_without_ray_zarr_and_tiatoolbox() -> None:
    """They are to run on machines with torch and little else, from an .npz."""
    probe = (
        "import sys; sys.modules |= dict.fromkeys(('ray', 'zarr', 'tiatoolbox'))  # an import of these fails\n"
        "import kd.training.train, kd.package, kd.commands.train"
    )
    subprocess.run([sys.executable, "-c", probe], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_the_package_and_its_names_are_there_at_once() -> None:
    """`import hover_batch` brings nothing but itself; its functions come when they are asked for."""
    probe = (
        "import sys; before = set(sys.modules); import hover_batch; dir(hover_batch); hover_batch.__version__\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})\n"
        "assert all(hasattr(hover_batch, name) for name in hover_batch.__all__)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert not (HEAVY | {"numpy", "pandas", "pyarrow", "typer"}) & set(ended.stdout.split())
