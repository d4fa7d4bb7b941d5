"""Where the real data lies; tests that need it skip, saying so, where it is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder ../shared/data with real slides and annotated nuclei."""
    if not DATA.is_dir():
        pytest.skip("../shared/data is absent: real slides and annotations are not here")
    return DATA
