"""Estimate how long a comparison takes, and reduce it to what fits into a given time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hover_batch.compare.fields import Place
from hover_batch.compare.sides import Side
from hover_batch.formatting import counted, duration
from hover_batch.geometry import Box
from hover_batch.model.cost import patch_side, seconds_per_patch
from hover_batch.model.prepare import on_device


@dataclass(frozen=True)
class Options:
    """Options of a comparison.

    `batches`: batch sizes to time, ascending. `repeats`: repetitions of each measurement, whose median is reported.
    `timing_only`: measure costs, and do not compare nuclei. `budget_s`: seconds that the comparison may take; None for
    any time.
    """

    batches: Sequence[int]
    repeats: int
    timing_only: bool = False
    budget_s: float | None = None


@dataclass(frozen=True)
class Speed:
    """Measured speed of one network: seconds per patch of `patch` pixels, and the tiles that it needs for a field."""

    seconds: float
    patch: int
    tile_in: int
    tile_out: int

    @classmethod
    def of(cls, side: Side) -> Speed:
        """Time one patch."""
        card, network = side.card, on_device(side.network, side.predictor.device)
        with side.predictor.autocast():
            seconds = seconds_per_patch(network, card, 1)
        return cls(seconds, patch_side(card), card.tile_in, card.tile_out)

    def field_seconds(self, box: Box) -> float:
        """Return the seconds of inference on a field."""
        tiles = -(-box.width // self.tile_out) * -(-box.height // self.tile_out)
        return tiles * self.seconds * (self.tile_in / self.patch) ** 2


def estimate(speeds: Sequence[Speed], places: Sequence[Place], options: Options) -> float:
    """Return the seconds that a comparison will take: the warm-up, the patches of each batch size, the fields."""
    patches = options.repeats * sum(1 + batch for batch in options.batches) * sum(speed.seconds for speed in speeds)
    fields = [sum(speed.field_seconds(place.box) for speed in speeds) for place in places]
    return fields[0] + patches + options.repeats * sum(fields)


def fit_to_budget(
    speeds: Sequence[Speed], places: Sequence[Place], options: Options
) -> tuple[Sequence[Place], Options]:
    """Return the places and options that fit into the budget: with fewer repetitions, then fewer fields, then without
    the largest batch sizes. One of each is always left."""
    while options.budget_s is not None and estimate(speeds, places, options) > options.budget_s:
        if options.repeats > 1:
            options = replace(options, repeats=options.repeats - 1)
        elif len(places) > 1:
            places = places[:-1]
        elif len(options.batches) > 1:
            options = replace(options, batches=options.batches[:-1])
        else:
            break
    return places, options


def announcement(speeds: Sequence[Speed], places: Sequence[Place], options: Options) -> str:
    """Return a line that says what will be measured, and about how long it takes."""
    return (
        f"{counted(len(places), 'field')}, batch sizes {', '.join(map(str, options.batches))}, "
        f"{counted(options.repeats, 'repetition')}: about {duration(estimate(speeds, places, options))}"
    )
