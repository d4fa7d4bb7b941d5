"""Checks before a run: warnings, and all faults of all rows at once."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.cohort.manifest import read_cohort
from hover_batch.config import Settings
from hover_batch.errors import InputError
from hover_batch.plan import Plan, plan_cohort

CARD: Any = SimpleNamespace(name="student", mpp=0.25, tile_out=256)


def planned(folder: Path, text: str) -> Plan:
    path = folder / "cohort.csv"
    path.write_text(text)
    return plan_cohort(read_cohort(path), CARD)


def write_tiff(path: Path, x: float, y: float) -> None:
    """Write 300 × 300 px of `x` by `y` µm."""
    array = np.zeros((300, 300, 3), np.uint8)
    tifffile.imwrite(
        path, array, tile=(128, 128), photometric="rgb", resolution=(1e4 / x, 1e4 / y), resolutionunit="CENTIMETER"
    )


def test_both_sizes_of_anisotropic_pixels_are_printed(tmp_path: Path) -> None:
    write_tiff(tmp_path / "slide.tif", 0.25, 0.5)
    lines = planned(tmp_path, "path\nslide.tif\n").lines(Settings(), CARD)
    assert any("300 × 300 px at 0.25 × 0.5 µm → 300 × 600 at 0.25 µm" in line for line in lines)


def test_odd_pixel_sizes_and_columns_are_warned_of(tmp_path: Path) -> None:
    write_tiff(tmp_path / "slide.tif", 0.025, 0.025)
    text = "path,mask,mpp,magnification,slide_id\nslide.tif,x,,,a\nslide.tif,x,0.25,10,b\n"
    lines = "\n".join(planned(tmp_path, text).lines(Settings(), CARD))
    assert "warning: mpp 0.025:" in lines and "at a magnification of 10 about 1 µm are expected" in lines
    assert "column mask is not used" in lines


def test_all_faults_of_a_row_come_at_once(tmp_path: Path) -> None:
    """A pixel size, a header and a mask that are wrong, in one row; a mask beside the slide in another."""
    write_tiff(tmp_path / "none.tif", 353, 353)
    write_tiff(tmp_path / "slide.tif", 0.25, 0.25)
    ring = [[900, 900], [990, 900], [990, 990], [900, 900]]
    (tmp_path / "away.json").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    (tmp_path / "empty.json").write_text("[]")
    text = (
        "path,slide_id,mpp,mask_path\nnone.tif,a,,empty.json\nslide.tif,b,,away.json\nslide.tif,c,250,\nslide.tif,d,,\n"
    )
    plan = planned(tmp_path, text)
    assert [(fault.row, fault.slide_id_or_path) for fault in plan.cohort.faults] == [
        (2, "a"),
        (2, "a"),
        (3, "b"),
        (4, "c"),
    ]
    parts = ["353 µm", "holds no polygon", "the mask has no tissue", "0.25 µm if it is in nm"]
    assert all(part in fault.message for part, fault in zip(parts, plan.cohort.faults, strict=True))
    assert [slide.record.slide_id for slide in plan.slides] == ["d"] and plan.exit_code == 3


def test_warnings_and_unreadable_slides_are_shown_beside_faults(tmp_path: Path) -> None:
    write_tiff(tmp_path / "slide.tif", 0.25, 0.5)
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    text = "path,slide_id,mask\nslide.tif,a,\nbroken.svs,b,\nnone.svs,c,\n"
    with pytest.raises(InputError, match=r"1 fault, nothing was run\n  row 4 \(c\)") as caught:
        planned(tmp_path, text).raise_if_faulty()
    *_, column, odd, broken, remedy = str(caught.value).splitlines()
    assert "column mask is not used" in column and remedy.startswith("Correct these rows")
    assert odd.startswith("  warning: a: mpp 0.25 × 0.5: pixels of slides are square")
    assert broken.startswith("  warning: b: will fail: ")


def test_unknown_storage_is_a_fault_of_its_row_only(tmp_path: Path) -> None:
    write_tiff(tmp_path / "slide.tif", 0.25, 0.25)
    plan = planned(tmp_path, "path,slide_id\nslide.tif,a\nsss://bucket/slide.svs,b\n")
    assert [slide.record.slide_id for slide in plan.slides] == ["a"]
    (fault,) = plan.cohort.faults
    assert fault.row == 3 and "sss://bucket/slide.svs: fsspec does not support" in fault.message


def test_a_copy_under_another_name_is_warned_of(tmp_path: Path) -> None:
    write_tiff(tmp_path / "slide.tif", 0.25, 0.25)
    write_tiff(tmp_path / "other.tif", 0.25, 0.5)
    (tmp_path / "copy.tif").write_bytes((tmp_path / "slide.tif").read_bytes())
    (tmp_path / "link.tif").symlink_to("slide.tif")
    warnings = planned(tmp_path, "path\nslide.tif\nother.tif\ncopy.tif\nlink.tif\n").cohort.warnings
    assert [warning[:51] for warning in warnings] == [
        "row 5 (link) is the same slide as row 2",
        "row 4 (copy) is a copy of the slide in row 2 (slide",
    ]


def test_a_stretched_mask_is_warned_of(tmp_path: Path) -> None:
    write_tiff(tmp_path / "slide.tif", 0.25, 0.25)
    Image.fromarray(np.triu(np.full((100, 200), 255, np.uint8))).save(tmp_path / "mask.png")
    (warning,) = planned(tmp_path, "path,mask_path\nslide.tif,mask.png\n").cohort.warnings
    assert warning.startswith("slide: ") and "stretched" in warning


def test_only_the_tiles_of_a_mask_are_counted(tmp_path: Path) -> None:
    array = np.zeros((1100, 2100, 3), np.uint8)
    tifffile.imwrite(
        tmp_path / "slide.tif", array, tile=(128, 128), resolution=(40_000, 40_000), resolutionunit="CENTIMETER"
    )
    mask = np.zeros((110, 210), np.uint8)
    mask[40:60, 10:40] = 255  # 400 to 600 by 100 to 400, and 64 pixels around: tiles 1 and 2 by 0 and 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    lines = planned(tmp_path, "path,slide_id,mask_path\nslide.tif,a,mask.png\nslide.tif,b,\n").lines(Settings(), CARD)
    assert lines[2].endswith("≤ 4 tiles in its mask") and lines[3].endswith("≤ 45 tiles")
    assert lines[-1].startswith("at most: 49 tiles, 3 Mpx, ")


def test_pixel_sizes_are_checked_by_the_nuclei(data: Path, tmp_path: Path) -> None:
    with (data / "nuclei" / "dataset.csv").open(newline="") as file:
        image = next(row["image"] for row in csv.DictReader(file) if row["sample_id"] == "cpm15_06")
    Image.new("RGB", (60, 60), "white").save(tmp_path / "white.png")
    (tmp_path / "run.toml").write_text('[infer]\nruntime = "torch"\nthreads = 1\n')
    declared = {"fourfold": 1.0, "absurd": 13.0, "coarse": 18.0}
    rows = [f"{data / 'nuclei' / image},{name},{mpp}\n" for name, mpp in declared.items()]
    (tmp_path / "cohort.csv").write_text("path,slide_id,mpp\n" + "".join(rows) + "white.png,white,0.25\n")
    result = CliRunner().invoke(
        app, ["plan", str(tmp_path / "cohort.csv"), "--check-scale", "--config", str(tmp_path / "run.toml")]
    )
    assert result.exit_code == 0, result.output
    said = dict(line.strip().split(": ", 1) for line in result.stdout.splitlines()[-4:])
    assert said["fourfold"].startswith("warning: the nuclei fit 0.25 µm better than the given 1 (")
    assert said["fourfold"].endswith("put 0.25 into the column mpp of the cohort")
    assert said["absurd"].startswith("warning: the pixel size of 13 µm is not confirmed: no usual one gives enough")
    assert said["coarse"].startswith("warning: the pixel size of 18 µm is not confirmed: it gives fewer than 5 nuclei")
    assert said["white"] == "pixel size not checked, because no tissue was found"
