"""Time two networks in alternation, so that other load on the machine affects both equally. Medians are reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hover_batch.compare.fields import Field
from hover_batch.compare.sides import Side
from hover_batch.model.cost import seconds_per_patch
from hover_batch.model.images import predict_image
from hover_batch.model.prepare import on_device
from hover_batch.nuclei.image import nuclei_of
from hover_batch.nuclei.measure import Nuclei

Notify = Callable[[str], None]


def latencies(sides: Sequence[Side], batches: Sequence[int], repeats: int, notify: Notify) -> list[dict[int, float]]:
    """Return the median seconds per patch of each side's network, by batch size.

    Whole patches are counted, as in HoVerNet's paper. The result of a side whose runtime is not torch is empty, since
    its network is compiled for one input shape. All networks are set to evaluation mode, and may be moved to their
    devices. Loading their predictors changes settings of torch in the whole process (see `Side.predictor`).

    `sides`: the networks. `batches`: batch sizes. `repeats`: repetitions of each measurement. `notify`: function that
    is called with a line about each batch size.

    InputError if a device or a runtime cannot be used, PackageError if a network cannot be compiled or its architecture
    is not known, torch.OutOfMemoryError if a batch does not fit in the GPU's memory.
    """
    medians: list[dict[int, float]] = [{} for _ in sides]
    # Whole patches, as in the paper, rather than only the pixels that are kept.
    networks = [on_device(side.network, side.predictor.device) for side in sides]
    for batch in batches:
        notify(f"seconds per patch, batch size {batch} …")
        seconds: list[list[float]] = [[] for _ in sides]
        for _ in range(repeats):
            for number, side in enumerate(sides):
                predictor = side.predictor
                if predictor.runtime == "torch":
                    with predictor.autocast():
                        seconds[number].append(seconds_per_patch(networks[number], side.card, batch))
        for number, measured in enumerate(seconds):
            if measured:
                medians[number][batch] = statistics.median(measured)
    return medians


@dataclass(frozen=True)
class SideResult:
    """Result of one network on one field."""

    instances: NDArray[np.int32]
    """Instance map (y, x) int32, 0 = background."""
    nuclei: Nuclei
    """Measurements of the instances, in inference pixels of the field."""
    infer_s: float
    """Median seconds of inference."""
    post_s: float
    """Median seconds of post-processing."""


def process_field(sides: Sequence[Side], field: Field, repeats: int) -> list[SideResult]:
    """Run inference and post-processing of each network on a field. Return the results with the median times.

    Predictors that are not loaded yet are loaded first. This changes settings of torch in the whole process (see
    `Side.predictor`).

    `sides`: the networks. `field`: field with its pixels. `repeats`: number of repetitions, at least 1.

    InputError if a device or a runtime cannot be used, PackageError if a network cannot be compiled,
    torch.OutOfMemoryError if one tile does not fit in the GPU's memory.
    """
    seconds: list[list[tuple[float, float]]] = [[] for _ in sides]
    results: list[tuple[NDArray[np.int32], Nuclei]] = []
    for repetition in range(repeats):
        for number, side in enumerate(sides):
            started = time.perf_counter()
            maps = predict_image(side.predictor, field.image)
            predicted = time.perf_counter()
            result = nuclei_of(maps, side.splitter, side.card.layout)
            seconds[number].append((predicted - started, time.perf_counter() - predicted))
            if repetition == 0:  # all repetitions have the same result
                results.append(result)
    return [
        SideResult(instances, nuclei, *(statistics.median(column) for column in zip(*times, strict=True)))
        for (instances, nuclei), times in zip(results, seconds, strict=True)
    ]


def warm_up(sides: Sequence[Side], field: Field) -> list[int | None]:
    """Run each network once on `field`. Return the peak GPU memory of each in bytes; None on the CPU.

    Compilation and cold caches then do not affect the measurements. The peak is measured for this process while the
    network runs. It includes everything else that the process holds on the GPU, such as the other network.

    Predictors that are not loaded yet are loaded first. This changes settings of torch in the whole process (see
    `Side.predictor`). torch's peak statistics of the GPU are reset.

    `sides`: the networks. `field`: a field, already read.

    InputError if a device or a runtime cannot be used, PackageError if a network cannot be compiled,
    torch.OutOfMemoryError if one tile does not fit in the GPU's memory.
    """
    peaks: list[int | None] = []
    for side in sides:
        on_gpu = side.predictor.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        maps = predict_image(side.predictor, field.image)
        nuclei_of(maps, side.splitter, side.card.layout)
        peaks.append(torch.cuda.max_memory_allocated() if on_gpu else None)
    return peaks
