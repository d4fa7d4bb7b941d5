"""Memory does not grow with the slide: 40,000² pixels need no more than 10,000², with tissue on a quarter of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_slide import write_synthetic_slide

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[1]

# Runs `segment` and writes the peak resident memory (bytes) of two spans, the kernel's mark being reset in between:
# all up to finalize (reading, inference, post-processing), and finalize itself with what was resident before it.
PROBE = """
import json, sys
from pathlib import Path

import hover_batch.executor.local as local
from hover_batch.cli import app

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

finalize = local.finalize

def watched(work, reader, seconds):
    figures = {"before": status("VmHWM"), "resident": status("VmRSS")}
    Path("/proc/self/clear_refs").write_text("5")
    values = finalize(work, reader, seconds)
    figures |= {"finalize": status("VmHWM"), "nuclei": values["nuclei"], "tiles": values["tiles"]}
    Path(sys.argv[1]).write_text(json.dumps(figures))
    return values

local.finalize = watched
app(sys.argv[2:])
"""


def peaks(folder: Path, side: int) -> dict[str, int]:
    folder.mkdir()
    write_synthetic_slide(folder / "slide.tif", size=(side, side), mpp=0.25, tissue_fraction=0.25)
    report = folder / "peaks.json"
    subprocess.run(
        [sys.executable, "-c", PROBE, str(report), "segment", str(folder / "slide.tif"), "-o", str(folder / "out")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    figures: dict[str, int] = json.loads(report.read_text())
    return figures


def test_peak_memory_is_that_of_a_small_slide(tmp_path: Path) -> None:
    small, large = peaks(tmp_path / "small", 10_000), peaks(tmp_path / "large", 40_000)
    for name, figures in (("10,000²", small), ("40,000²", large)):
        extra = (figures["finalize"] - figures["resident"]) / 2**20
        print(
            f"\n{name}: {figures['tiles']} tiles, {figures['nuclei']} nuclei; reading, inference and post-processing "
            f"{figures['before'] / 2**20:.0f} MiB; finalize {extra:.0f} MiB more than was resident, "
            f"{extra / figures['nuclei'] * 1e6:.0f} MiB per million nuclei"
        )
    assert large["tiles"] > 12 * small["tiles"]
    assert large["before"] <= 1.1 * small["before"]
