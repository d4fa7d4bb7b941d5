"""The reference executor: what is its own."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerators import LoadQuick, Quick
from conftest import runner
from numpy.typing import NDArray
from test_contract import events, tables

from hover_batch.config import InferSettings
from hover_batch.model.package import Package


class Deaf(Quick):
    """Where a Ctrl-C arrives and is lost, as in a compiler's or a destructor's callback."""

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return super().predict(tiles)


def load_deaf(package: Package, settings: InferSettings) -> Any:
    return Deaf(package.card, settings.batch)


def test_a_ctrl_c_that_is_lost_on_its_way_still_stops_the_run(
    fields: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = runner("local", monkeypatch), tmp_path / "out"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(fields("a"), out, load_deaf)
    assert signal.getsignal(signal.SIGINT) is before
    assert not events(out, "unit_done") and events(out, "run_stopped")
    assert run(fields("a"), out, LoadQuick()).exit_code == 0
    run(fields("a"), tmp_path / "reference", LoadQuick())
    assert tables(out) == tables(tmp_path / "reference")
