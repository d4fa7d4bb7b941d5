"""A comparison from its two sides to its two files: compare.json, and compare.html to look at."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hover_batch.cohort.durable import to_json, write_atomically
from hover_batch.compare.agreement import Dispute, agreement, disputes
from hover_batch.compare.fields import Field
from hover_batch.compare.page import Panel, render
from hover_batch.compare.sides import Side
from hover_batch.compare.timing import Seen, Tell, latencies, see, warm
from hover_batch.errors import InputError
from hover_batch.model.cost import cost_of

PANELS = 8
"""Places of disagreement that the page shows."""

Judge = Callable[[Side], dict[str, Any]]
"""A side's scores on annotated images, by source, and what of these images it has seen."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for. `batches`: patches at once; `repeats`: of each measurement, of which the median is told;
    `timing_only`: nuclei are not compared."""

    batches: Sequence[int]
    repeats: int
    timing_only: bool = False


def compare(
    first: Side, second: Side, fields: Sequence[Field], wanted: Wanted, out: Path, tell: Tell, judge: Judge | None
) -> dict[str, Any]:
    """Measure `first`, the one that is to be replaced, and `second`, which is to replace it, and write both files to
    `out`. Returns what compare.json holds. InputError where no field has any tissue."""
    if not fields:
        raise InputError("no tissue was found in these slides; give others, or masks by the column mask_path")
    sides = (first, second)
    tell("warming up …")
    peaks = warm(sides, fields[0])
    by_batch = latencies(sides, wanted.batches, wanted.repeats, tell)
    pairs: list[tuple[Seen, Seen]] = []
    for number, field in enumerate(fields):
        tell(f"field {number + 1} of {len(fields)}: {field.slide_id} at {field.box.x0}, {field.box.y0} …")
        one, other = see(sides, field, wanted.repeats)
        pairs.append((one, other))
    rows = [_row(side, [pair[n] for pair in pairs], fields, by_batch[n], peaks[n]) for n, side in enumerate(sides)]
    told = not wanted.timing_only and not any(side.random for side in sides)
    found: dict[str, Any] = {
        "format": "hover-batch compare",
        "device": _device(first),
        "fields": [
            {"slide_id": f.slide_id, "x": f.box.x0, "y": f.box.y0, "shape": list(f.image.shape[:2]), "mpp": f.mpp}
            for f in fields
        ],
        "repeats": wanted.repeats,
        "sides": rows,
        "ratios": _ratios(*rows),
        "agreement": agreement(fields, pairs, [side.card.taxonomy for side in sides]) if told else None,
        "truth": [judge(side) for side in sides] if judge and told else None,
        "notes": _notes(sides, told),
    }
    panels = [_panel(d, fields, pairs, sides) for d in disputes(pairs, fields[0].mpp, PANELS)] if told else []
    write_atomically(out / "compare.json", to_json(found))
    write_atomically(out / "compare.html", render(found, panels))
    return found


def _row(
    side: Side, seen: Sequence[Seen], fields: Sequence[Field], by_batch: dict[int, float], peak: int | None
) -> dict[str, Any]:
    cost = cost_of(side.network, side.card)
    pixels = sum(field.pixels for field in fields)
    infer_s, post_s = sum(s.infer_s for s in seen), sum(s.post_s for s in seen)
    keep = side.card.tile_out
    tiles = sum(-(-f.image.shape[0] // keep) * -(-f.image.shape[1] // keep) for f in fields)
    mm2 = sum(field.mm2 for field in fields)
    return {
        "name": side.name,
        "architecture": f"{side.card.architecture} {side.card.encoder}".rstrip(),
        "random_weights": side.random,
        "precision": side.predictor.precision,
        "runtime": side.predictor.runtime,
        "batch": side.predictor.batch,
        **cost.to_json(),
        "seconds_per_patch": {str(batch): seconds for batch, seconds in by_batch.items()},
        "infer_seconds": infer_s,
        "post_seconds": post_s,
        "infer_us_per_pixel": infer_s / pixels * 1e6,
        "tiles_per_second": tiles / infer_s,
        "mm2_per_second": mm2 / infer_s,
        "mm2_per_second_with_post": mm2 / (infer_s + post_s),
        "peak_device_bytes": peak,
    }


def _ratios(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """How many times as much the first takes."""
    names = ("parameters", "macs_per_patch", "macs_per_kept_pixel", "infer_us_per_pixel", "post_seconds")
    ratios = {name: first[name] / second[name] for name in names}
    ratios["both_steps"] = second["mm2_per_second_with_post"] / first["mm2_per_second_with_post"]
    common = first["seconds_per_patch"].keys() & second["seconds_per_patch"].keys()
    ratios["seconds_per_patch"] = {
        batch: first["seconds_per_patch"][batch] / second["seconds_per_patch"][batch]
        for batch in sorted(common, key=int)
    }
    return ratios


def _device(side: Side) -> str:
    if side.predictor.device.type == "cuda":
        return torch.cuda.get_device_name(side.predictor.device)
    processor = platform.processor() or platform.machine()
    return f"CPU ({processor}, {torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def _notes(sides: Sequence[Side], told: bool) -> list[str]:
    notes = [f"{side.name}: times and costs are those of its architecture" for side in sides if side.random]
    if not told:
        notes.append("costs alone were compared: nothing here tells of quality")
    for side in sides:
        if seen := side.card.training.get("seen"):
            notes.append(f"{side.name} has seen: {seen}")
    return notes


def _panel(
    dispute: Dispute, fields: Sequence[Field], pairs: Sequence[tuple[Seen, Seen]], sides: Sequence[Side]
) -> Panel:
    return Panel.of(
        fields[dispute.field],
        dispute,
        [
            (seen.instances, seen.nuclei, side.card.taxonomy)
            for seen, side in zip(pairs[dispute.field], sides, strict=True)
        ],
    )
