"""Score changed images, and compare the scores with those of the unchanged images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kd.data.classes import PARTIAL
from kd.data.datasets import Data
from kd.evaluation.scores import SourceScores, plain
from kd.evaluation.shifts import SHIFTS, Shift

COLLAPSE = 0.5
"""Fraction of the PQ on unchanged images at or below which the PQ on changed images has collapsed."""
SCORES = ("pq", "dice", "f_d")
"""Scores that are compared."""


@dataclass(frozen=True)
class ShiftScores:
    """Scores of one source after a shift; NaN if undefined."""

    source: str
    """Name of the source."""
    shift: str
    """Name of the shift."""
    scores: dict[str, float]
    """SCORES on the changed images."""
    changes: dict[str, float]
    """Differences from the scores on the unchanged images."""
    collapsed: bool
    """Whether PQ is at most COLLAPSE × the PQ on the unchanged images; False if that is 0, or either is undefined."""

    @classmethod
    def of(cls, shift: Shift, before: SourceScores, after: SourceScores) -> ShiftScores:
        """Return the scores of one source after a shift, compared with those before it.

        The scores are pq, dice and f_d. The change of a score is NaN if the score is undefined before or after the
        shift.

        `shift`: the shift. `before`, `after`: scores on the unchanged and on the changed images.
        """
        scores = {name: getattr(after, name) for name in SCORES}
        changes = {name: value - getattr(before, name) for name, value in scores.items()}
        collapsed = before.pq > 0 and after.pq <= COLLAPSE * before.pq
        return cls(before.source, shift.name, scores, changes, collapsed)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; NaN becomes None."""
        return {name: plain(value) for name, value in asdict(self).items()}


def score_shifts(
    scores_of: Callable[[Data, Shift], list[SourceScores]], data: Data, unchanged: Sequence[SourceScores]
) -> list[ShiftScores]:
    """Return the scores of `data` after each of SHIFTS, source by source in the order of `unchanged`.

    Sources in PARTIAL are left out, because they have no PQ.

    `scores_of`: function from data and a shift to the scores of each source after the shift; its errors propagate.
    `data`: annotated images. `unchanged`: scores on the unchanged images.
    """
    before = {scores.source: scores for scores in unchanged if scores.source not in PARTIAL}
    scored = Data(data.taxonomy, [sample for sample in data.samples if sample.source in before])
    after = {shift: {scores.source: scores for scores in scores_of(scored, shift)} for shift in SHIFTS}
    return [ShiftScores.of(shift, before[source], after[shift][source]) for source in before for shift in SHIFTS]
