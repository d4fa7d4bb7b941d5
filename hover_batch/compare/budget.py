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
    """Options of a comparison."""

    batches: Sequence[int]
    """Batch sizes to time, ascending."""
    repeats: int
    """Repetitions of each measurement, whose median is reported."""
    timing_only: bool = False
    """Whether to measure only costs, and not to compare nuclei."""
    budget_s: float | None = None
    """Seconds that the comparison may take; None for no limit."""


@dataclass(frozen=True)
class Speed:
    """Measured speed of one network, for estimates."""

    seconds: float
    """Seconds per patch, at a batch size of 1."""
    patch: int
    """Side of a patch in pixels."""
    tile_in: int
    """Side of a tile in pixels."""
    tile_out: int
    """Side in pixels of the kept part of a tile's output."""

    @classmethod
    def of(cls, side: Side) -> Speed:
        """Measure the speed of a network on one patch, on its device and in its precision.

        `side`: the network. Its predictor is loaded (see `Side.predictor`). Its network is set to evaluation mode, and
        may be moved to the predictor's device.

        InputError if the device or the runtime cannot be used, PackageError if the network cannot be compiled,
        torch.OutOfMemoryError if a patch does not fit in the GPU's memory.
        """
        card = side.card
        network = on_device(side.network, side.predictor.device)
        with side.predictor.autocast():
            seconds = seconds_per_patch(network, card, batch=1)
        return cls(seconds, patch_side(card), card.tile_in, card.tile_out)

    def field_seconds(self, box: Box) -> float:
        """Return the estimated seconds of inference on one field, as its number of tiles times the time of a tile.

        `box`: the field, in inference pixels.
        """
        tiles = -(-box.width // self.tile_out) * -(-box.height // self.tile_out)
        return tiles * self.seconds * (self.tile_in / self.patch) ** 2


def estimate(speeds: Sequence[Speed], places: Sequence[Place], options: Options) -> float:
    """Return the estimated seconds of a comparison: the warm-up, the patches of each batch size, and all fields.

    `speeds`: speeds of the two networks. `places`: fields to compare on, at least one. `options`: batch sizes and
    number of repetitions.
    """
    batches_s = sum(1 + batch for batch in options.batches) * sum(speed.seconds for speed in speeds)
    fields_s = [sum(speed.field_seconds(place.box) for speed in speeds) for place in places]
    warm_up_s = fields_s[0]
    return warm_up_s + options.repeats * (batches_s + sum(fields_s))


def fit_to_budget(
    speeds: Sequence[Speed], places: Sequence[Place], options: Options
) -> tuple[Sequence[Place], Options]:
    """Return fields and options that are reduced until the comparison fits into `options.budget_s`.

    They are unchanged if it fits already, or if `budget_s` is None. Repetitions are reduced first, then fields (from
    the last), then batch sizes (from the largest). At least one of each remains, even if the comparison then takes
    longer than `budget_s`.

    `speeds`: speeds of the two networks. `places`: fields to compare on, at least one. `options`: options to reduce.
    """
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
    """Return a line for the user that says what will be measured, and about how long it takes.

    `speeds`: speeds of the two networks. `places`: fields to compare on, at least one. `options`: batch sizes and
    number of repetitions.
    """
    return (
        f"{counted(len(places), 'field')}, batch sizes {', '.join(map(str, options.batches))}, "
        f"{counted(options.repeats, 'repetition')}: about {duration(estimate(speeds, places, options))}"
    )
