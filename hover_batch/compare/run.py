"""Compare two networks and write the results to compare.json and, as a page, compare.html."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hover_batch.compare.agreement import Agreement, Dispute
from hover_batch.compare.budget import Options, Speed, announcement, fit_to_budget
from hover_batch.compare.fields import Field, Place
from hover_batch.compare.page import Panel, render
from hover_batch.compare.sides import Side
from hover_batch.compare.timing import Notify, SideResult, latencies, process_field, warm_up
from hover_batch.errors import InputError
from hover_batch.files import to_json, write_atomically
from hover_batch.model.cost import cost_of

PANELS = 8
"""Maximum number of disagreements that the page shows."""

Scorer = Callable[[Side], dict[str, Any]]
"""Function that returns a network's scores on annotated images by source, and which of them it was trained on."""


def compare(
    first: Side,
    second: Side,
    places: Sequence[Place],
    options: Options,
    out: Path,
    notify: Notify,
    scorer: Scorer | None,
) -> dict[str, Any]:
    """Compare two networks, and write compare.json and compare.html. Return the content of compare.json.

    Its keys are:

    - `format`; `device`, the name of the GPU or CPU; `repeats`; and `notes`, sentences for the reader;
    - `fields`: for each field `slide_id`, `x`, `y` and `shape` (y, x) in inference pixels, and `mpp`;
    - `sides`: for each network its name, settings, classes, costs (`Cost.to_json`), times and peak GPU memory;
    - `ratios`: the costs of `first` as multiples of the costs of `second`, the candidate to replace it;
    - `agreement`: `Agreement.to_json`; None if nuclei are not compared;
    - `truth`: the result of `scorer` for each network; None without a scorer.

    If the comparison would take longer than `options.budget_s`, less is measured. Nuclei are not compared if
    `options.timing_only` is set, or if a network has random weights. The networks of both sides may be moved to their
    devices, and settings of torch change in the whole process (see `Side.predictor`).

    `first`, `second`: networks of the same pixel size. `places`: fields to compare on. `options`: batch sizes,
    repetitions and time. `out`: existing folder for the files. `notify`: function that is called with lines about the
    progress. One of them says what is measured and about how long it takes. `scorer`: function that scores a network on
    annotated images; None to omit this.

    InputError if `places` is empty, a device or a runtime cannot be used, or the pixel size of a slide is unknown;
    PackageError if a network cannot be compiled; torch.OutOfMemoryError if a batch does not fit in the GPU's memory;
    SlideError if a field cannot be read; OSError if a file cannot be written. Errors of `scorer` propagate.
    """
    if not places:
        raise InputError(
            "no tissue was found in these slides; give other slides, or tissue masks in the column mask_path"
        )
    sides = (first, second)
    nuclei_compared = not options.timing_only and not any(side.random for side in sides)
    notify("timing one patch …")
    speeds = [Speed.of(side) for side in sides]
    requested = places, options
    places, options = fit_to_budget(speeds, places, options)
    if requested != (places, options):
        notify(f"reduced from {announcement(speeds, *requested)}; --minutes gives it more time")
    notify(announcement(speeds, places, options))
    notify("warming up …")
    peaks = warm_up(sides, places[0].read())
    truth = None
    if scorer:  # before the long measurements, since it fails if the images are missing
        notify("scores on annotated images …")
        truth = [scorer(side) for side in sides]
    seconds_by_batch = latencies(sides, options.batches, options.repeats, notify)
    agreement = Agreement([side.card.taxonomy for side in sides])
    panels: list[Panel] = []
    costs = [Costs(side.card.tile_out) for side in sides]
    for number, place in enumerate(places):
        notify(f"field {number + 1} of {len(places)}: {place.record.slide_id} at {place.box.x0}, {place.box.y0} …")
        field = place.read()
        results = process_field(sides, field, options.repeats)
        for cost, result in zip(costs, results, strict=True):
            cost.add(field, result)
        if nuclei_compared:
            disputes = agreement.add(results[0], results[1], field.mpp)
            panels += _panels(field, disputes, results, sides)
            panels = sorted(panels, key=lambda panel: -panel.alone)[:PANELS]
    rows = [_row(side, costs[n], seconds_by_batch[n], peaks[n]) for n, side in enumerate(sides)]
    content: dict[str, Any] = {
        "format": "hover-batch compare",
        "device": _device(first),
        "fields": [
            {"slide_id": p.record.slide_id, "x": p.box.x0, "y": p.box.y0, "shape": [p.box.height, p.box.width]}
            | {"mpp": p.mpp}
            for p in places
        ],
        "repeats": options.repeats,
        "sides": rows,
        "ratios": _ratios(*rows),
        "agreement": agreement.to_json() if nuclei_compared else None,
        "truth": truth,
        "notes": _notes(sides, nuclei_compared),
    }
    write_atomically(out / "compare.json", to_json(content))
    write_atomically(out / "compare.html", render(content, panels))
    return content


@dataclass
class Costs:
    """Amount of work in all fields, and the time that one network took for it."""

    tile_side: int
    """Side in pixels of the kept part of a tile's output."""
    pixels: int = 0
    """Number of inference pixels."""
    mm2: float = 0.0
    """Area in mm²."""
    tiles: int = 0
    """Number of tiles."""
    read_s: float = 0.0
    """Seconds of reading."""
    infer_s: float = 0.0
    """Seconds of inference."""
    post_s: float = 0.0
    """Seconds of post-processing."""

    def add(self, field: Field, result: SideResult) -> None:
        """Add the size and reading time of `field`, and the network's seconds on it, from `result`."""
        self.pixels += field.pixels
        self.mm2 += field.pixels * (field.mpp / 1000) ** 2
        self.tiles += -(-field.box.height // self.tile_side) * -(-field.box.width // self.tile_side)
        self.read_s += field.read_s
        self.infer_s += result.infer_s
        self.post_s += result.post_s


def _row(side: Side, spent: Costs, by_batch: dict[int, float], peak: int | None) -> dict[str, Any]:
    """Return one side's entry in compare.json. `by_batch`: seconds per patch. `peak`: bytes of device memory."""
    whole_s = spent.read_s + spent.infer_s + spent.post_s
    return {
        "name": side.name,
        "architecture": f"{side.card.architecture} {side.card.encoder}".rstrip(),
        "random_weights": side.random,
        "classes": {c.name: "#{:02x}{:02x}{:02x}".format(*c.color) for c in side.card.taxonomy.nuclei},
        "precision": side.predictor.precision,
        "runtime": side.predictor.runtime,
        "batch": side.predictor.batch,
        **cost_of(side.network, side.card).to_json(),
        "seconds_per_patch": {str(batch): seconds for batch, seconds in by_batch.items()},
        "read_seconds": spent.read_s,
        "infer_seconds": spent.infer_s,
        "post_seconds": spent.post_s,
        "end_to_end_seconds": whole_s,
        "infer_us_per_pixel": spent.infer_s / spent.pixels * 1e6,
        "tiles_per_second": spent.tiles / spent.infer_s,
        "mm2_per_second": spent.mm2 / spent.infer_s,
        "mm2_per_second_end_to_end": spent.mm2 / whole_s,
        "peak_device_bytes": peak,
    }


def _ratios(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the costs of the first side as multiples of those of the second."""
    names = ("parameters", "macs_per_patch", "macs_per_kept_pixel", "infer_us_per_pixel", "post_seconds")
    ratios = {name: first[name] / second[name] for name in (*names, "end_to_end_seconds")}
    common = first["seconds_per_patch"].keys() & second["seconds_per_patch"].keys()
    ratios["seconds_per_patch"] = {
        batch: first["seconds_per_patch"][batch] / second["seconds_per_patch"][batch]
        for batch in sorted(common, key=int)
    }
    return ratios


def _device(side: Side) -> str:
    """Return the name of the GPU, or the processor with its instruction set and number of threads."""
    if side.predictor.device.type == "cuda":
        return torch.cuda.get_device_name(side.predictor.device)
    processor = platform.processor() or platform.machine()
    return f"CPU ({processor}, {torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def _notes(sides: Sequence[Side], nuclei_compared: bool) -> list[str]:
    """Return the caveats that a reader of the comparison must know."""
    notes = [f"{side.name}: times and costs are those of its architecture" for side in sides if side.random]
    if not nuclei_compared:
        notes.append("only costs were compared: this says nothing about quality")
    for side in sides:
        trainings = side.card.training.get("mean_of")
        if isinstance(trainings, list) and trainings:
            notes.append(f"{side.name} is the mean of {len(trainings)} trainings")
        elif steps := side.card.training.get("steps"):
            notes.append(f"{side.name} was trained for {steps} steps")
        if seen := side.card.training.get("seen"):
            notes.append(f"{side.name} was trained on: {seen}")
    return notes


def _panels(field: Field, disputes: list[Dispute], seen: Sequence[SideResult], sides: Sequence[Side]) -> list[Panel]:
    """Draw the cells of a field in which the sides disagree most, at most PANELS."""
    most = sorted(disputes, key=lambda dispute: (-dispute.alone, dispute.y, dispute.x))[:PANELS]
    results = [(by.instances, by.nuclei, side.card.taxonomy) for by, side in zip(seen, sides, strict=True)]
    return [Panel.of(field, dispute, results) for dispute in most]
