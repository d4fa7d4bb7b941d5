"""Throughput of networks by batch size, precision, runtime and tile size, and of `segment` on a slide.

    python -m benchmarks.throughput [--json FILE] network [--device cuda] [--batches 1,8,64] [--precisions fp32,fp16]
    scripts/loopback uv run python -m benchmarks.throughput [--json FILE] slide [--side 20000] [-- --batch 64 …]

`network`: the starter, and HoVerNet-fast with random weights, called as in `segment`: tiles and maps are bytes, copies
and quantisation are included, and two batches are in flight, so that a GPU computes one while the next is copied. A
measurement is the mean of --in-a-row batches, after a first one that fills the queue. All batch sizes are combined with
all precisions. With the first batch size and precision, also the other runtimes, larger tiles with the same margin, and
the networks without one of the optimisations are measured: folding normalisations into convolutions, not computing
margins, merging upsampling with the next convolution. Runs alternate; medians are reported. `--networks starter` leaves
out HoVerNet, which is slow on a CPU.

`slide`: `segment` with the flags after `--` on a synthetic slide of side × side pixels, a quarter of it tissue. Reports
seconds per mm² of tissue, and the fraction of time in which the networks were busy.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hover_batch.compare.sides import Side, load_side, random_teacher
from hover_batch.config import InferSettings
from hover_batch.model import predict, prepare
from hover_batch.model.in_flight import in_flight
from hover_batch.model.package import STARTER

TEACHER = "hovernet_fast-pannuke"
"""Published model with the architecture of the random HoVerNet-fast."""
TISSUE = 0.25
"""Fraction of the synthetic slide that is tissue."""
MPP = 0.25
"""Pixel size of the synthetic slide in µm."""


SAVINGS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "folding": ("folded", nn.Module.eval),
    "leaving the margin out": ("without_margin", lambda network, *_: network),
    "merged upsampling": ("upsampling_merged", lambda network: network),
}
"""Optimisation → its function in `hover_batch.model.prepare`, and a replacement that leaves it out."""


@dataclass(frozen=True)
class Way:
    """Way to run a network."""

    network: str
    """starter or hovernet-fast."""
    batch: int
    """Tiles per batch."""
    precision: str
    """fp32, fp16 or bf16."""
    runtime: str = "torch"
    """torch, compile or openvino."""
    tile: int = 0
    """Side of input tiles in pixels; 0: the side in the card."""
    without: str = ""
    """Optimisation of SAVINGS that is left out."""


def ways(
    networks: list[str], batches: list[int], precisions: list[str], runtimes: list[str], tiles: list[int]
) -> Iterator[Way]:
    """Yield all ways to measure for these networks, batch sizes, precisions, runtimes and sides of input tiles.

    Batch sizes and precisions are combined; the rest is measured with the first batch size and precision only (see the
    module). Each network begins with its plain way, by torch and without changes.
    """
    for network in networks:
        for precision in precisions:
            for batch in batches:
                yield Way(network, batch, precision)
        first = Way(network, batches[0], precisions[0])
        for runtime in ("torch", *runtimes):
            if runtime != "torch":
                yield replace(first, runtime=runtime)
            if runtime != "compile":
                yield from (replace(first, runtime=runtime, without=saving) for saving in savings(network, runtime))
        for tile in tiles:
            yield replace(first, tile=tile)


def savings(network: str, runtime: str) -> Iterator[str]:
    """Yield the optimisations, as named in SAVINGS, that are used for this network with this runtime."""
    yield "folding"
    if network == "starter":
        yield "leaving the margin out"
        if runtime == "openvino":
            yield "merged upsampling"


def predictor_of(way: Way, sides: dict[str, Side], device: str) -> predict.Predictor:
    """Return the predictor for a way. `sides`: networks by name. `device`: of the predictor; OpenVINO uses the CPU."""
    side = sides[way.network]
    card = side.card
    if way.tile:
        card = replace(card, tile_in=way.tile, tile_out=way.tile - (card.tile_in - card.tile_out))
    settings = InferSettings(
        device="cpu" if way.runtime == "openvino" else device,
        precision="auto" if way.runtime == "openvino" else way.precision,  # type: ignore[arg-type]  # a flag's text
        runtime=way.runtime,  # type: ignore[arg-type]
        batch=way.batch,
    )
    with contextlib.ExitStack() as patches:
        if way.without:
            patches.enter_context(patch.object(prepare, *SAVINGS[way.without]))
        return predict.Predictor(side.network, card, settings)


def network(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print the throughput of networks in all ways; return it as JSON values.

    `arguments`: of the command `network`, as parsed by `main`.
    """
    settings = InferSettings(device=arguments.device)
    sides = {"starter": load_side(str(STARTER), "", settings), "hovernet-fast": random_teacher(TEACHER, settings)}
    todo = list(ways(arguments.networks, arguments.batches, arguments.precisions, arguments.runtimes, arguments.tiles))
    predictors = [predictor_of(way, sides, arguments.device) for way in todo]
    inputs = [
        np.random.default_rng(0).integers(0, 256, (way.batch, p.card.tile_in, p.card.tile_in, 3), np.uint8)
        for way, p in zip(todo, predictors, strict=True)
    ]
    seconds: list[list[float]] = [[] for _ in todo]
    for turn in range(arguments.repeats + 1):
        for n, predictor in enumerate(predictors):
            seconds_per_batch = in_a_row(predictor, inputs[n], arguments.in_a_row)
            if turn:  # the first turn is a warm-up
                seconds[n].append(seconds_per_batch)
        print(f"{turn} of {arguments.repeats}", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    for way, predictor, times in zip(todo, predictors, seconds, strict=True):
        median, kept_pixels = statistics.median(times), way.batch * predictor.card.tile_out**2
        rows.append(
            {
                "network": way.network,
                "batch": way.batch,
                "precision": predictor.precision,
                "runtime": way.runtime,
                "tile": predictor.card.tile_in,
                "without": way.without,
                "tiles_per_second": way.batch / median,
                "us_per_kept_pixel": median / kept_pixels * 1e6,
                "mm2_per_second": kept_pixels * (predictor.card.mpp / 1000) ** 2 / median,
            }
        )
    first_us: dict[str, float] = {}
    for row in rows:
        first_us.setdefault(row["network"], row["us_per_kept_pixel"])
    print(f"{'':80} {'tiles/s':>9} {'µs/px':>8} {'mm²/s':>8} {'÷ first':>8}")
    for row in rows:
        title = f"{row['network']}, {row['batch']} tiles of {row['tile']}, {row['precision']} by {row['runtime']}"
        title += f", without {row['without']}" if row["without"] else ""
        print(
            f"{title:80} {row['tiles_per_second']:9.2f} {row['us_per_kept_pixel']:8.3f} {row['mm2_per_second']:8.4f} "
            f"{row['us_per_kept_pixel'] / first_us[row['network']]:8.2f}"
        )
    return {"device": device_name(arguments.device), "ways": rows}


def in_a_row(predictor: predict.Predictor, tiles: NDArray[np.uint8], count: int) -> float:
    """Return the seconds per batch of `count` batches in flight, from one result to the last."""
    results = in_flight(((n, list(tiles)) for n in range(count + 1)), predictor.submit)
    clocks = []
    for _, pending in results:
        pending.result()
        clocks.append(time.perf_counter())
    return (clocks[-1] - clocks[0]) / count


def slide(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print the throughput of `segment` on a synthetic slide; return it as JSON values.

    `arguments`: of the command `slide`, as parsed by `main`.
    """
    from tests.synthetic_slide import write_synthetic_slide

    with tempfile.TemporaryDirectory() as name:
        path, out = Path(name) / "slide.tif", Path(name) / "out"
        write_synthetic_slide(path, (arguments.side, arguments.side), MPP, TISSUE)
        command = [sys.executable, "-c", "from hover_batch.cli import app; app()", "segment", str(path), "-o", str(out)]
        started = time.monotonic()
        subprocess.run([*command, *arguments.flags], check=True)
        process_s = time.monotonic() - started
        with (out / "summary.csv").open() as f:
            row = next(row for row in csv.DictReader(f) if row["level"] == "cohort")
        timings = json.loads((out / "slides" / "slide" / "timings.json").read_text())
        slide_json = json.loads((out / "slides" / "slide" / "slide.json").read_text())
    mm2 = float(row["tissue_mm2"])
    found = {
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "side": arguments.side,
        "flags": arguments.flags,
        "tissue_mm2": mm2,
        "nuclei": slide_json["nuclei"],
        "process_seconds": process_s,
        "seconds_per_mm2": process_s / mm2,
        "model_busy": float(row["model_busy"]),
        "timings": timings,
    }
    print(
        f"{mm2:.1f} mm² of tissue, {slide_json['nuclei']} nuclei: {found['seconds_per_mm2']:.2f} s per mm² in all, "
        f"networks busy {found['model_busy']:.0%}"
    )
    return found


def device_name(device: str) -> str:
    """Return the name of the GPU, or the number of CPU threads."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"


def main() -> None:
    """Run one of the benchmarks and print its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    commands = parser.add_subparsers(required=True)
    cuda = torch.cuda.is_available()
    of_network = commands.add_parser("network")
    of_network.set_defaults(run=network)
    of_network.add_argument("--device", default="cuda" if cuda else "cpu")
    of_network.add_argument("--networks", type=_words, default=["starter", "hovernet-fast"])
    of_network.add_argument("--batches", type=_numbers, default=[1, 4, 16, 64] if cuda else [8])
    of_network.add_argument("--precisions", type=_words, default=["fp32", "fp16", "bf16"] if cuda else ["fp32", "bf16"])
    of_network.add_argument("--runtimes", type=_words, default=["compile"] if cuda else ["openvino", "compile"])
    of_network.add_argument("--tiles", type=_numbers, default=[576, 1088])
    of_network.add_argument("--repeats", type=int, default=5)
    of_network.add_argument("--in-a-row", type=int, default=20 if cuda else 1, help="batches per measurement")
    of_slide = commands.add_parser("slide")
    of_slide.set_defaults(run=slide)
    of_slide.add_argument("--side", type=int, default=20_000)
    of_slide.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    found = arguments.run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


if __name__ == "__main__":
    main()
