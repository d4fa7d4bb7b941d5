"""Measure the time that a model takes, as in arXiv 2311.12553: per patch, and per tile as in its Table 3."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hover_batch.model.cost import seconds_per_patch
from hover_batch.model.predict import Predictor
from hover_batch.model.prepare import on_device

TILE = 1000
"""Side in pixels of the timed tile, which is that of CoNSeP's images."""
RUNS = 3
"""Number of times that each time is measured; the median is returned."""


def timed(
    network: nn.Module,
    predictor: Predictor,
    nuclei_of: Callable[[NDArray[np.uint8]], object],
    images: Sequence[NDArray[np.uint8]],
) -> dict[str, Any]:
    """Measure a model's speed. Return the times in seconds and the hardware, as JSON values by name.

    - `seconds_per_patch`: the network alone, in float32; median of RUNS (3) measurements (see
      `hover_batch.model.cost.seconds_per_patch`);
    - `seconds_per_tile`: inference and post-processing of an image of TILE² pixels in memory, as on slides; None if no
      image is large enough;
    - `tile_runs`: seconds of each of RUNS runs, of which `seconds_per_tile` is the median; empty if no image is large
      enough;
    - `timed_on`: the device, and the precision and runtime of the tile.

    Use the times only to compare models on one idle machine.

    `network`: network with the weights of the model; it is set to evaluation mode and may be moved to the device of
    `predictor`. `predictor`: its predictor. `nuclei_of`: function from an image (y, x, 3) uint8 RGB to its nuclei; it
    uses `predictor` and has been called before, so that everything is loaded and compiled. `images`: images (y, x, 3)
    uint8 RGB; the tile is the upper left corner of the first one that is large enough.

    Raises PackageError if the card's architecture is not known, torch.OutOfMemoryError if a batch does not fit in the
    GPU's memory. Errors of `nuclei_of` propagate.
    """
    on_its_device = on_device(network, predictor.device)
    patch = statistics.median(seconds_per_patch(on_its_device, predictor.card) for _ in range(RUNS))
    tile = next((np.ascontiguousarray(i[:TILE, :TILE]) for i in images if min(i.shape[:2]) >= TILE), None)
    runs = [] if tile is None else [_seconds(nuclei_of, tile) for _ in range(RUNS)]
    cpu = f"a CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name(predictor.device) if predictor.device.type == "cuda" else cpu
    return {
        "seconds_per_patch": patch,
        "seconds_per_tile": statistics.median(runs) if runs else None,
        "tile_runs": runs,
        "timed_on": f"{device}: patches in float32, the tile in {predictor.precision} by {predictor.runtime}",
    }


def _seconds(work: Callable[[NDArray[np.uint8]], object], image: NDArray[np.uint8]) -> float:
    started = time.perf_counter()
    work(image)
    return time.perf_counter() - started
