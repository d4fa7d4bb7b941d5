"""Where the real data lies, and which backend runs cohorts unless a test says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Ray takes many seconds to start; what both backends must do is told by the suite in tests/executor.
os.environ["HOVER_BATCH_BACKEND"] = "local"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder ../shared/data with real slides and annotated nuclei; tests that need it skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip("../shared/data is absent: real slides and annotations are not here")
    return DATA
