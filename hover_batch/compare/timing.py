"""Seconds of both sides, measured in alternation so that whatever else the machine does befalls both; medians."""

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
from hover_batch.model.predict import on_device
from hover_batch.nuclei.image import nuclei_of
from hover_batch.nuclei.measure import Nuclei

Tell = Callable[[str], None]


def latencies(sides: Sequence[Side], batches: Sequence[int], repeats: int, tell: Tell) -> list[dict[int, float]]:
    """Of each side: batch size → seconds of the network alone for one patch, as the paper compares them. None of a
    side that is compiled for one shape of input."""
    found: list[dict[int, float]] = [{} for _ in sides]
    # Whole patches, of which the paper's networks give every pixel.
    networks = [on_device(side.network, side.predictor.device) for side in sides]
    for batch in batches:
        tell(f"seconds a patch, {batch} at once …")
        seconds: list[list[float]] = [[] for _ in sides]
        for _ in range(repeats):
            for number, side in enumerate(sides):
                predictor = side.predictor
                if predictor.runtime == "torch":
                    with predictor.autocast():
                        seconds[number].append(seconds_per_patch(networks[number], side.card, batch))
        for number, of in enumerate(seconds):
            if of:
                found[number][batch] = statistics.median(of)
    return found


@dataclass(frozen=True)
class Seen:
    """A side's result on one field: instances (y, x), their measures, and the seconds that both steps took."""

    instances: NDArray[np.int32]
    nuclei: Nuclei
    infer_s: float
    post_s: float


def see(sides: Sequence[Side], field: Field, repeats: int) -> list[Seen]:
    """Every side's nuclei in a field."""
    seconds: list[list[tuple[float, float]]] = [[] for _ in sides]
    found: list[tuple[NDArray[np.int32], Nuclei]] = []
    for turn in range(repeats):
        for number, side in enumerate(sides):
            started = time.perf_counter()
            maps = predict_image(side.predictor, field.image)
            predicted = time.perf_counter()
            nuclei = nuclei_of(maps, side.constants, side.card.layout)
            seconds[number].append((predicted - started, time.perf_counter() - predicted))
            if turn == 0:
                found.append(nuclei)
    return [
        Seen(instances, nuclei, *(statistics.median(column) for column in zip(*of, strict=True)))
        for (instances, nuclei), of in zip(found, seconds, strict=True)
    ]


def warm(sides: Sequence[Side], field: Field) -> list[int | None]:
    """Let both do their first work, and compile what they compile. Bytes of device memory at the peak of each, None on
    the CPU."""
    peaks: list[int | None] = []
    for side in sides:
        cuda = side.predictor.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        maps = predict_image(side.predictor, field.image)
        nuclei_of(maps, side.constants, side.card.layout)
        peaks.append(torch.cuda.max_memory_allocated() if cuda else None)
    return peaks
