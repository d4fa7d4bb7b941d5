"""Scores on images after each shift, beside those of the unchanged images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kd.data.classes import PARTIAL
from kd.data.datasets import Data
from kd.evaluation.scores import SourceScores, plain
from kd.evaluation.shifts import SHIFTS, Shift

COLLAPSE = 0.5
"""Share of the PQ of unchanged images at or below which a shift counts as a collapse."""
SCORES = ("pq", "dice", "f_d")


@dataclass(frozen=True)
class ShiftScores:
    """SCORES of one source after a shift, and their changes from those of the unchanged images; NaN if undefined."""

    source: str
    shift: str
    scores: dict[str, float]
    changes: dict[str, float]
    collapsed: bool

    @classmethod
    def of(cls, shift: Shift, before: SourceScores, after: SourceScores) -> ShiftScores:
        scores = {name: getattr(after, name) for name in SCORES}
        changes = {name: value - getattr(before, name) for name, value in scores.items()}
        collapsed = before.pq > 0 and after.pq <= COLLAPSE * before.pq
        return cls(before.source, shift.name, scores, changes, collapsed)

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None."""
        return {name: plain(value) for name, value in asdict(self).items()}


def score_shifts(
    scores_of: Callable[[Data, Shift], list[SourceScores]], data: Data, unchanged: Sequence[SourceScores]
) -> list[ShiftScores]:
    """Score `data` after each of SHIFTS; source by source, a row for each shift. Sources in PARTIAL have no such scores
    and no rows."""
    before = {scores.source: scores for scores in unchanged if scores.source not in PARTIAL}
    scored = Data(data.taxonomy, [sample for sample in data.samples if sample.source in before])
    after = [(shift, {scores.source: scores for scores in scores_of(scored, shift)}) for shift in SHIFTS]
    return [ShiftScores.of(shift, before[source], found[source]) for source in before for shift, found in after]
