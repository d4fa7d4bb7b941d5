"""What many tests share: where the real data lies, which backend runs cohorts unless a test says otherwise, and
tiatoolbox's HoVerNet, the reference."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from hover_batch.executor.cluster import ask_for_token

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Ray takes many seconds to start; what both backends must do is told by the suite in tests/executor.
os.environ["HOVER_BATCH_BACKEND"] = "local"

# OpenVINO takes seconds to compile a network, for each of hundreds of small runs.
os.environ["HOVER_BATCH_RUNTIME"] = "torch"

# The last batch of a unit is padded to the whole size, and most fields in the tests have few tiles.
os.environ["HOVER_BATCH_BATCH"] = "2"

# Packages that the user has downloaded must not change the tests.
os.environ["HOVER_BATCH_CACHE"] = "/dev/null/cache"

# Ray keeps the environment that it is imported with, and some tests import it that start no cluster.
ask_for_token()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder ../shared/data with real slides and annotated nuclei; tests that need it skip where it is absent."""
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
