"""Importing the cohort package imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"torch", "ray", "tiatoolbox", "pandas", "numpy", "pyarrow", "zarr", "cv2"}


def test_the_cohort_is_light_to_import() -> None:
    code = "import hover_batch.cohort.ledger, hover_batch.cohort.manifest, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "hover_batch.cohort.ledger" in loaded
    assert loaded & HEAVY == set()
