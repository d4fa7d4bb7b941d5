"""What can be known before a run: faults of rows and headers, tiles, disk and time. Needs neither torch nor weights.

`plan` and `segment` both begin here, so that the dry run and the run refuse the same things.
"""

from __future__ import annotations

from dataclasses import dataclass

from hover_batch.cohort.manifest import Cohort, Fault
from hover_batch.cohort.record import SlideRecord
from hover_batch.errors import InputError, SlideError
from hover_batch.geometry import Grid
from hover_batch.model.package import Card
from hover_batch.slide.reader import SlideInfo, peek
from hover_batch.slide.tissue import check_mask

STORE_BYTES_PER_PIXEL = 2.0
"""Compressed size of all planes per predicted pixel of dense tissue."""
TILE_SECONDS = {"cpu": 0.06, "cuda": 0.001}
"""Rough network time per 256² pixels kept, for the estimate only."""


@dataclass(frozen=True)
class PlannedSlide:
    """A slide whose header could be read: the whole canvas is the upper bound of what will be predicted."""

    record: SlideRecord
    info: SlideInfo
    grid: Grid
    tiles: int

    @property
    def pixels(self) -> int:
        return self.grid.size.pixels


@dataclass(frozen=True)
class Plan:
    """`faults` can be mended by the user and stop the run; `unreadable` files become failures of the run."""

    slides: tuple[PlannedSlide, ...]
    unreadable: tuple[tuple[SlideRecord, str], ...]
    faults: tuple[Fault, ...]

    def raise_if_faulty(self) -> None:
        """One InputError that lists every fault of every row."""
        if self.faults:
            lines = [f"  row {f.row}, {f.subject}: {f.message}" for f in self.faults]
            raise InputError(
                f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''} in the cohort; nothing was run:\n"
                + "\n".join(lines)
                + "\nMend these rows, or give --skip-invalid to run the others and list these in failures.csv."
            )


def plan_cohort(cohort: Cohort, card: Card) -> Plan:
    """Read every header and mask, and collect all faults, those of the rows among them."""
    slides: list[PlannedSlide] = []
    unreadable: list[tuple[SlideRecord, str]] = []
    faults = list(cohort.faults)
    for record in cohort.records:
        try:
            if record.mask_path is not None:
                check_mask(record.mask_path)
            info = peek(record)
        except InputError as error:
            faults.append(Fault(record.row, record.slide_id, str(error)))
            continue
        except SlideError as error:
            unreadable.append((record, str(error)))
            continue
        grid = Grid.over(info.level0, info.mpp, card.mpp)
        tiles = sum(1 for _ in grid.size.box.cells(card.tile_out))
        slides.append(PlannedSlide(record, info, grid, tiles))
    return Plan(tuple(slides), tuple(unreadable), tuple(sorted(faults, key=lambda f: f.row)))
