"""The guide's toy architecture: one file and one card, of another distribution, are all that a run needs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.model.architectures import file_of
from hover_batch.model.package import find_package

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"


def test_the_guides_toy_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, packaging = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "toy.py").write_text(toy)
    installed = tmp_path / "toy-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[hover_batch.architectures]\ntoy = toy\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert file_of("toy") == tmp_path / "toy.py" and "toy" not in sys.modules
    exec(packaging, {})
    assert find_package("toy.safetensors").card.architecture == "toy"

    picture = Image.new("RGB", (200, 200), (230, 220, 230))
    for x, y in ((40, 40), (127, 60), (60, 128), (150, 150)):  # two lie across the borders of tiles
        ImageDraw.Draw(picture).ellipse((x - 9, y - 9, x + 9, y + 9), fill=(70, 40, 90))
    picture.save("tile.png")
    Path("cohort.csv").write_text("path,mpp\ntile.png,0.25\n")
    words = "segment cohort.csv -o out --model toy.safetensors --unit 256 --tissue all --batch 2"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    nuclei = pq.read_table("out/slides/tile/nuclei.parquet").to_pydict()
    assert len(nuclei["type"]) == 4
    assert np.ptp(nuclei["area_um2"]) < 1, "a nucleus at the border of two tiles was cut"
