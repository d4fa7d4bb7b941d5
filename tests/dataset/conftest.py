"""Shared by the tests of data sets: small files and row groups, and nuclei to fill them."""

from __future__ import annotations

import os
from typing import Any

import pytest
from dataset_runs import drawn

from hover_batch.dataset import nuclei_file, update
from hover_batch.geometry import Size


@pytest.fixture(scope="session")
def nuclei(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Size]:
    """Nuclei for all slides, and the size of the slides."""
    return drawn(tmp_path_factory.mktemp("drawn"))


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of 100 nuclei, and shared files of 300, so that few nuclei fill several of both; nothing is synced."""
    monkeypatch.setattr(nuclei_file, "ROW_GROUP", 100)
    monkeypatch.setattr(update, "SHARED_ROWS", 300)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
