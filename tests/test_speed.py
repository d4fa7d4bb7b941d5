"""Optimisations are still in effect.

Only ratios of CPU time within this run are compared, as medians of several, with bounds well below the measured ones.
So a step that becomes twice as slow is noticed, but a busy machine is not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from copy import copy
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import torch

from benchmarks.maps import synthetic_maps
from benchmarks.postprocess import Reference, medians, ours
from hover_batch.cohort.events import stream_events
from hover_batch.cohort.record import SlideRecord
from hover_batch.config import EngineSettings, InferSettings, PostSettings, Settings
from hover_batch.geometry import Box, Grid, Mpp, Size
from hover_batch.model.package import find_package, load_network
from hover_batch.model.predict import Predictor
from hover_batch.nuclei.energy import mask_hv
from hover_batch.nuclei.measure import measure
from hover_batch.nuclei.stitch import nuclei_of_region
from hover_batch.nuclei.table import TableContext, to_arrow, write_part
from hover_batch.nuclei.watershed import SobelConstants, instance_map
from hover_batch.segment import run_segment
from hover_batch.slide.example import write_example
from hover_batch.slide.reader import open_slide
from hover_batch.store import PredictionStore
from hover_batch.taxonomy import CONSEP

REPEATS = 5


def ratio(slow: Callable[[], Any], quick: Callable[[], Any]) -> float:
    """CPU seconds of the first by those of the second, in alternation."""
    for work in (slow, quick):
        work()  # compiled and warm
    seconds = medians({"slow": slow, "quick": quick}, REPEATS)
    return seconds["slow"] / seconds["quick"]


def test_post_processing_is_many_times_faster_than_the_reference() -> None:
    """`python -m benchmarks.postprocess` finds 20 times on a real field, 37 on a crowded one; outputs are equal.

    Fewer on a field as small as this one: the reference looks at the whole of it for each nucleus.
    """
    maps, layout = synthetic_maps(1024)
    reference = Reference(maps, layout)
    found = ratio(reference.all, lambda: ours(maps, layout, None))
    print(f"\npost-processing: {found:.1f} times faster than the reference")
    assert found > 4


def test_the_post_stage_costs_little_more_than_its_kernels(tmp_path: Path) -> None:
    """Reading the maps, joining what crosses regions, and writing the part of the table: once four times as much."""
    maps, layout = synthetic_maps(1024)
    mask_hv(maps)
    constants = SobelConstants(**find_package("starter").card.sobel)
    size, mpp = Size(1024, 1024), Mpp(0.25, 0.25)
    store = PredictionStore.create(tmp_path / "predictions.zarr", size, layout.planes, 1024, {})
    store.write(size.box, maps)
    grid = Grid(size, 1.0, 1.0, mpp, size)
    context = TableContext("s", CONSEP, grid, mpp, "file", None, "starter", "0", "0")

    def stage() -> None:
        nuclei = nuclei_of_region(store.read, size.box, layout, PostSettings(), constants)
        write_part(tmp_path / "part.parquet", to_arrow(nuclei, context))

    np_map, h, v = maps[layout.NP], maps[layout.H], maps[layout.V]
    found = ratio(stage, lambda: measure(instance_map(np_map, h, v, constants), maps, layout))
    print(f"\nthe post stage: {found:.2f} times its kernels")
    assert found < 2


class ReadyOutput(torch.nn.Module):
    """Network whose output is there already."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.output


def test_a_prediction_costs_little_more_than_its_network() -> None:
    """Scaling, cropping, softmax, stains and quantisation are beside the network's work."""
    package = find_package("starter")
    predictor = Predictor(
        load_network(package), package.card, InferSettings(batch=4, device="cpu", precision="fp32", threads=1)
    )
    tiles = np.random.default_rng(0).integers(0, 256, (4, 320, 320, 3), np.uint8)
    image = torch.from_numpy(tiles).permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def bare() -> None:
        predictor.network(image)

    with torch.inference_mode():
        output = predictor.network(image)
    beside = copy(predictor)
    beside.network = ReadyOutput(output)
    # Timed without the network, whose own time differs by more from call to call on a busy machine.
    found = ratio(lambda: beside.predict(tiles), bare)
    print(f"\nbeside its network, a prediction costs {found:.2f} times the network")
    assert found < 0.3


def test_reading_costs_little_more_than_openslide(tmp_path: Path) -> None:
    """At the slide's own resolution, where a block is decoded and nothing resampled."""
    slide = next(path for path in sorted(write_example(tmp_path).parent.glob("*.tif*")) if "0.25" in path.name)
    with open_slide(SlideRecord("s", slide, row=1)) as reader, openslide.OpenSlide(slide) as plain:
        grid = Grid.over(reader.info.level0, reader.info.mpp, 0.25)
        box = Box(0, 0, 960, 960)
        found = ratio(lambda: reader.read(box, grid), lambda: np.asarray(plain.read_region((0, 0), 0, (960, 960))))
    print(f"\nreading: {found:.2f} times openslide")
    assert found < 2


def test_the_stages_are_all_there_is(tmp_path: Path) -> None:
    """What no stage counts is little: from a slide's first pixel to its last result."""
    cohort = write_example(tmp_path / "example")
    settings = Settings(
        infer=InferSettings(unit=512, batch=4, device="cpu", runtime="torch"), engine=EngineSettings(backend="local")
    )
    shares = []
    for number in range(3):
        out = tmp_path / f"out{number}"
        outcome = run_segment(str(cohort), out, settings, skip_invalid=False, force=False, command=["test"])
        assert outcome.exit_code == 0
        told = [event for event in stream_events(out / "logs" / "events.jsonl") if "slide_id" in event]
        times = {(event["event"], event["slide_id"]): at(event["time"]) for event in told}
        for slide in outcome.slides:
            name = slide["slide_id"]
            counted = sum(slide["summary"][key] for key in slide["summary"] if key.startswith("seconds_"))
            shares.append(counted / (times["slide_done", name] - times["slide_started", name]))
    print(f"\nstages: {statistics.median(shares):.0%} of the time")
    assert statistics.median(shares[2:]) > 0.85  # the first run compiles


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
