"""What many tests share: where the real data lies (tests that need it skip, saying so, where it is absent), and
tiatoolbox's HoVerNet, the reference."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder ../shared/data with real slides and annotated nuclei."""
    if not DATA.is_dir():
        pytest.skip("../shared/data is absent: real slides and annotations are not here")
    return DATA


@pytest.fixture(scope="session")
def hovernet() -> Any:
    """tiatoolbox's HoVerNet, network and post-processing. Its import alone takes many seconds, and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tiatoolbox.models.architecture.hovernet import HoVerNet
    return HoVerNet
