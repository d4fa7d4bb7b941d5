"""Choose the number of tiles per batch on a GPU, for `--batch auto`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

MAX_BATCH = 1024
MIN_GAIN = 0.05
"""Gain in tiles per second below which a batch is not doubled again."""
MAX_SHARE = 0.6
"""Share of the free memory that a batch may take; the rest is for batches in flight."""
REPEATS = 5

Trial = Callable[[int], tuple[float, float]]
"""Function from a batch size to the seconds per batch, and the share of the free memory that it takes.

torch.OutOfMemoryError if memory is too small."""


def doubled(trial: Trial) -> int:
    """Return the largest batch size that is worthwhile, a power of two up to MAX_BATCH (1024).

    The size is doubled from 1 on. Doubling ends when memory is too small, the batch takes more than MAX_SHARE (60 %) of
    the free memory, or the gain in tiles per second is less than MIN_GAIN (5 %). The result is 1 even if one tile takes
    too much memory.

    `trial`: function that measures a batch size (see `Trial`). Its errors other than torch.OutOfMemoryError propagate.
    """
    best, seconds_per_tile = 1, float("inf")
    for size in (2**n for n in range(MAX_BATCH.bit_length())):
        try:
            seconds, share = trial(size)
        except torch.OutOfMemoryError:
            break
        if share > MAX_SHARE or seconds / size * (1 + MIN_GAIN) > seconds_per_tile:
            break
        best, seconds_per_tile = size, seconds / size
    return best


def cuda_trial(compute: Callable[[Tensor], object], side: int, device: torch.device) -> Trial:
    """Return a `Trial` that measures `compute` on a CUDA device.

    The trial runs random tiles and returns the median seconds of REPEATS calls, after one that selects kernels. The
    share of memory refers to the memory that is free when this function is called. Each trial resets torch's peak
    memory statistics of the device, and raises torch.OutOfMemoryError if the batch does not fit.

    `compute`: function of tiles (n, 3, side, side) uint8 RGB on the device. `side`: side of a tile in pixels. `device`:
    the CUDA device.
    """
    free, _ = torch.cuda.mem_get_info(device)

    def trial(size: int) -> tuple[float, float]:
        tiles = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=device)
        held, seconds = torch.cuda.memory_allocated(device), []
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(REPEATS + 1):
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            compute(tiles)
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        taken = torch.cuda.max_memory_allocated(device) - held
        return statistics.median(seconds[1:]), taken / free  # the first call selects kernels

    return trial
