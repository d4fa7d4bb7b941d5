"""The wheel and the sdist contain what the program needs, and work without a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hover_batch import __version__

ROOT = Path(__file__).resolve().parents[1]
NAME = f"hover_batch-{__version__}"
BUILT = ("hover_batch", "kd")
"""The packages in the wheel."""


def uv(*words: object, cwd: Path = ROOT) -> str:
    done = subprocess.run(["uv", *map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both, the wheel made of what the sdist holds."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--quiet", "--offline", "-o", folder)
    return folder


def sources() -> set[str]:
    files = (path for name in BUILT for path in (ROOT / name).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_packages_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = HeaderParser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())
        scripts = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert {name for name in names if ".dist-info/" not in name} == sources()
    assert f"{NAME}.dist-info/licenses/hover_batch/assets/LICENSE-starter.md" in names
    assert f"{NAME}.dist-info/licenses/hover_batch/assets/LICENSE-starter-open.md" in names
    assert "hover-batch = hover_batch.__main__:main" in scripts
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra") or []) == set(project["optional-dependencies"])


def test_the_sdist_holds_the_sources_and_no_data(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {name.removeprefix(f"{NAME}/") for name in sdist.getnames()}
    assert sources() < names and {"README.md", "LICENSE", "pyproject.toml"} < names
    assert not [name for name in names if name.startswith((".venv", "example-run", "uv.lock"))]


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    """By this Python; what the wheel needs comes from where pip has it from."""
    uv("venv", "--quiet", "--python", sys.executable, tmp_path / "venv")
    there = tmp_path / "venv" / "bin"
    install = ["pip", "install", "--quiet", "--exclude-newer", "2026-11-20T00:00:00Z"]
    try:
        uv(*install, "--python", there / "python", *dist.glob("*.whl"))
    except AssertionError as error:
        if "error sending request" not in str(error):
            raise
        pytest.skip("without a network, what the wheel needs cannot be had")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [there / "hover-batch", "segment", "--example", "-o", "out", "--backend", "local"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = list((tmp_path / "out" / "slides").glob("*/nuclei.parquet"))
    assert len(tables) == 2 and all(pq.read_metadata(table).num_rows > 100 for table in tables)
