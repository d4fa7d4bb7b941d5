"""Shared by all tests: the folder of real data, a quick backend and runtime, and the reference HoVerNet."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from hypothesis import settings

from hover_batch.executor.cluster import prepare_own_cluster

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Ray takes many seconds to start; tests/executor checks that both backends give the same results.
os.environ["HOVER_BATCH_BACKEND"] = "local"

# OpenVINO takes seconds to compile a network, in each of hundreds of small runs.
os.environ["HOVER_BATCH_RUNTIME"] = "torch"

# The last batch of a unit is padded to the full size, and most fields in the tests have few tiles.
os.environ["HOVER_BATCH_BATCH"] = "2"

# Tests must not depend on packages in the user's cache.
os.environ["HOVER_BATCH_CACHE"] = "/dev/null/cache"

# typer's runner would make all commands anew for each call, which takes longer than most calls.
typer.testing._get_command = functools.lru_cache(typer.testing._get_command)

# How long an example takes depends on the machine and on what else runs on it.
settings.register_profile("hover-batch", deadline=None)
settings.load_profile("hover-batch")

# Ray keeps the environment at its import, and some tests import it without starting a cluster.
prepare_own_cluster()


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder ../shared/data with real slides and annotated nuclei; skip the test if it does not exist."""
    if not DATA.is_dir():
        pytest.skip("../shared/data does not exist: it holds the real slides and annotations")
    return DATA


@pytest.fixture(scope="session")
def hovernet() -> Any:
    """Return tiatoolbox's HoVerNet, network and post-processing. Its import takes many seconds and gives warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tiatoolbox.models.architecture.hovernet import HoVerNet
    return HoVerNet


@pytest.fixture(scope="module")
def by_torch() -> Iterator[None]:
    """Where no runtime is given it is torch, also in Python and in `kd`, which do not read HOVER_BATCH_RUNTIME."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hover_batch.model.predict.find_spec", lambda name: None)
        yield


@pytest.fixture
def by_default(by_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a test of a module that uses `by_torch`, the runtime is chosen as for a user."""
    monkeypatch.setattr("hover_batch.model.predict.find_spec", find_spec)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Address of an S3 server with an empty bucket named bucket, for uploads that retry at once."""
    import bucket

    import hover_batch.bucket

    monkeypatch.setattr(hover_batch.bucket, "FIRST_WAIT_S", 0.001)
    with bucket.s3_server(monkeypatch, tmp_path) as address:
        bucket.put("bucket", {})
        yield address


@pytest.fixture
def unreliable(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Storage whose calls fail as the test says (`bucket.Unreliable`)."""
    import bucket

    return bucket.unreliable(monkeypatch)
