"""Fake networks: fast ones, one that sleeps as long as a GPU would compute, and ones that crash."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hover_batch.config import InferSettings
from hover_batch.errors import PackageError
from hover_batch.model.card import Card
from hover_batch.model.in_flight import Computed
from hover_batch.model.package import Package

DARK = 150


@dataclass
class Quick:
    """Dark pixels are nuclei, cut by a grid of 32 pixels, and all spindles. Each batch takes `seconds`."""

    card: Card
    batch: int
    seconds: float = 0.0
    turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def at_once(self) -> int:
        return self.batch

    def submit(self, tiles: Sequence[NDArray[np.uint8]]) -> Computed:
        with self.turn:
            return Computed(self.predict, np.stack(tiles))

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        started = time.monotonic()
        side, margin, layout = self.card.tile_out, self.card.margin, self.card.layout
        dark = tiles[:, margin : margin + side, margin : margin + side].min(axis=3) < DARK
        maps = np.zeros((len(tiles), layout.planes, side, side), np.uint8)
        ramp = (np.arange(side) % 32 * 8 - 124).astype(np.int8).view(np.uint8)
        maps[:, layout.NP] = dark * 255
        maps[:, layout.H] = dark * ramp
        maps[:, layout.V] = dark * ramp[:, None]
        maps[:, layout.tp.stop - 1] = dark * 255
        time.sleep(max(0.0, self.seconds - (time.monotonic() - started)))
        return maps


@dataclass(frozen=True)
class LoadQuick:
    """`load` for the executors."""

    seconds: float = 0.0

    def __call__(self, package: Package, settings: InferSettings) -> Any:
        return Quick(package.card, settings.batch, self.seconds)


@dataclass
class Deadly(Quick):
    """Kills its process in the middle of the work, `times` times in all, counted by files in `folder`."""

    folder: Path = Path()
    times: int = 1

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        maps = super().predict(tiles)
        for death in range(self.times):
            try:
                os.close(os.open(self.folder / f"death-{death}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        return maps


@dataclass(frozen=True)
class LoadDeadly:
    folder: Path
    times: int = 1

    def __call__(self, package: Package, settings: InferSettings) -> Any:
        return Deadly(package.card, settings.batch, folder=self.folder, times=self.times)


@dataclass
class Broken(Quick):
    """Raises on every batch after the second, as a lost device does."""

    batches: int = 0

    def predict(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        self.batches += 1
        if self.batches > 2:
            raise RuntimeError("the device is lost")
        return super().predict(tiles)


@dataclass(frozen=True)
class LoadBroken:
    """Of the networks that are loaded only the first breaks."""

    folder: Path

    def __call__(self, package: Package, settings: InferSettings) -> Any:
        try:
            os.close(os.open(self.folder / "broken", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return Quick(package.card, settings.batch)
        return Broken(package.card, settings.batch)


def load_nothing(package: Package, settings: InferSettings) -> Any:
    """Raise as for a package whose weights cannot be loaded."""
    raise PackageError("package planted: the weights do not match their card")


def die_loading(package: Package, settings: InferSettings) -> Any:
    """Kill the process while it loads, as an out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)
