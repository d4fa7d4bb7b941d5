"""Whole fields compared with tiatoolbox's post-processing, by the benchmark's functions; the benchmark itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import postprocess
from benchmarks.maps import DENSE_FIELD, SLIDE, real_maps, synthetic_maps
from benchmarks.postprocess import compare
from hover_batch.geometry import Box


def test_a_crowded_field_matches_the_reference(hovernet) -> None:
    agreement = compare(*synthetic_maps(1024))
    assert agreement.identical, agreement
    assert agreement.nuclei > 1500 and agreement.invalid_contours < 0.02 * agreement.nuclei


def test_a_field_of_real_predictions_matches_the_reference(data: Path, hovernet) -> None:
    x, y = DENSE_FIELD.x0, DENSE_FIELD.y0
    agreement = compare(*real_maps(SLIDE, Box(x, y, x + 512, y + 512)))
    assert agreement.identical, agreement
    assert agreement.nuclei > 80


@pytest.mark.slow
def test_large_fields_match_the_reference(data: Path, hovernet) -> None:
    field = DENSE_FIELD
    larger = Box(field.x0, field.y0, field.x1, field.y1 + 256)  # one more row of tiles, for more than 2,000 nuclei
    for maps, layout in (real_maps(SLIDE, larger), synthetic_maps()):
        agreement = compare(maps, layout)
        assert agreement.identical, agreement
        assert agreement.nuclei > 2000 and agreement.invalid_contours < 0.02 * agreement.nuclei


def test_the_benchmark_reports_and_does_not_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hovernet
) -> None:
    monkeypatch.setattr(postprocess, "SLIDE", tmp_path / "absent.tif")
    monkeypatch.setattr(postprocess, "synthetic_maps", lambda: synthetic_maps(256))
    monkeypatch.setattr(postprocess, "peak_bytes", lambda maps, layout, who: 20 * maps[0].size)
    monkeypatch.setattr(sys, "argv", ["postprocess", "--json", str(tmp_path / "out.json"), "--repeats", "1"])
    postprocess.main()
    out, err = capsys.readouterr()
    assert "absent.tif" in err and "times faster" in out
    result = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert result["identical"] is True and result["ratio_tiatoolbox"] > 0
