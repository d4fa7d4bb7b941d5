"""Summarise the differences of all slides, and check them against a tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from scipy.special import stdtrit

from hover_batch.diff.runs import Missing
from hover_batch.diff.slide import ALL, SlideDiff

LEVEL = 0.95
"""Coverage of the intervals."""


@dataclass(frozen=True)
class MeanChange:
    """Mean relative change of an endpoint over slides or patients."""

    mean: float | None
    """Mean of the relative changes; None if no slide has one."""
    low: float | None
    """Lower end of the Student t interval with the coverage LEVEL; None for n < 2."""
    high: float | None
    """Upper end of the interval; None for n < 2."""
    n: int
    """Number of slides or patients."""
    undefined: int
    """Number of slides that are left out, since A has none of these nuclei and B has some."""

    @classmethod
    def of(cls, slides: Sequence[SlideDiff], endpoint: str, patients: Mapping[str, str]) -> MeanChange:
        """Return the mean relative change over patients, and its interval.

        A patient counts with the mean of their slides. A slide without a patient counts as a patient of its own. Slides
        whose change is undefined are left out and counted in `undefined`.

        `slides`: differences of the slides. `endpoint`: ALL or the name of a class. `patients`: patient by slide_id.
        """
        values: dict[tuple[str, str], list[float]] = {}
        undefined = 0
        for slide in slides:
            relative = slide.change(endpoint).relative
            if relative is None:
                undefined += 1
                continue
            patient = patients.get(slide.slide_id)
            unit = ("slide", slide.slide_id) if patient is None else ("patient", patient)
            values.setdefault(unit, []).append(relative)
        means = np.array([np.mean(v) for v in values.values()])
        n = len(means)
        mean = float(means.mean()) if n else None
        if n < 2 or mean is None:
            return cls(mean, None, None, n, undefined)
        half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * means.std(ddof=1) / math.sqrt(n))
        return cls(mean, mean - half, mean + half, n, undefined)


@dataclass(frozen=True)
class Limits:
    """Largest differences that a validation accepts."""

    endpoint: str = ALL
    """Endpoint that is checked: ALL or the name of a class."""
    tolerance: float | None = None
    """Largest absolute relative change; None to only report."""
    min_matched: float | None = None
    """Smallest share of matched nuclei of a slide (`SlideDiff.matched_share`); None for any."""

    @property
    def given(self) -> bool:
        """True if at least one limit is set."""
        return self.tolerance is not None or self.min_matched is not None

    def fault(self, slide: SlideDiff) -> str:
        """Return how `slide` exceeds the limits, as a phrase for messages; "" if it is within them."""
        relative = slide.change(self.endpoint).relative
        faults = []
        if self.tolerance is not None and (relative is None or abs(relative) > self.tolerance):
            shown = "only in B" if relative is None else f"{relative:+.2%}"
            faults.append(f"{self.endpoint} {shown}, more than ±{self.tolerance * 100:.4g}%")
        if self.min_matched is not None and slide.matched_share < self.min_matched:
            faults.append(f"{slide.matched_share:.2%} matched, less than {self.min_matched * 100:.4g}%")
        return "; ".join(faults)


@dataclass(frozen=True)
class CohortDiff:
    """Differences of all slides."""

    slides: Sequence[SlideDiff]
    """Slides that are compared, those with the largest differences first."""
    missing: Sequence[Missing]
    """Slides that are not compared."""
    patients: Mapping[str, str]
    """Patient by slide_id; empty if the cohorts give no patients."""
    limits: Limits
    """Limits of the validation."""

    @classmethod
    def of(
        cls, slides: Sequence[SlideDiff], missing: Sequence[Missing], patients: Mapping[str, str], limits: Limits
    ) -> CohortDiff:
        """Return the comparison of a cohort, with its slides sorted by the change of the endpoint in `limits`.

        Slides whose change is undefined come first, then those with the largest absolute relative change. If these are
        equal, the slide with the lower share of matched nuclei comes first.

        `slides`: slides that are compared. `missing`: slides that are not compared. `patients`: patient by slide_id.
        `limits`: limits to check, with the endpoint.
        """

        def size(slide: SlideDiff) -> tuple[float, float, str]:
            relative = slide.change(limits.endpoint).relative
            return (-math.inf if relative is None else -abs(relative)), slide.matched_share, slide.slide_id

        return cls(sorted(slides, key=size), missing, patients, limits)

    @property
    def unit(self) -> str:
        """What `MeanChange.n` counts: "patients", or "slides" if the cohorts give no patients."""
        return "patients" if self.patients else "slides"

    def mean_change(self, endpoint: str) -> MeanChange:
        """Return the mean relative change over patients or, if the cohorts give no patients, over slides.

        `endpoint`: ALL or the name of a class.
        """
        return MeanChange.of(self.slides, endpoint, self.patients)

    @property
    def confusion(self) -> Any:
        """Confusion table (`Confusion`) of all slides together; None if no slide is compared."""
        return reduce(add, (slide.confusion for slide in self.slides)) if self.slides else None

    @property
    def endpoints(self) -> list[str]:
        """Names of all endpoints: ALL, then the classes that any slide has in A or B."""
        return list(dict.fromkeys([ALL, *(name for slide in self.slides for name in slide.endpoints)]))

    @property
    def faults(self) -> list[str]:
        """Sentences about the limits that are exceeded; empty if no limits are set.

        There is one for each slide that exceeds them or is done in only one run, and one if the mean change of the
        cohort exceeds the tolerance.
        """
        limits = self.limits
        if not limits.given:
            return []
        faults = [f"{slide.slide_id}: {fault}" for slide in self.slides if (fault := limits.fault(slide))]
        faults += [
            f"{m.slide_id}: done in {m.done_in} only ({m.reason})" for m in self.missing if m.done_in in ("A", "B")
        ]
        mean = self.mean_change(limits.endpoint).mean
        if limits.tolerance is not None and mean is not None and abs(mean) > limits.tolerance:
            faults.append(f"cohort: {limits.endpoint} {mean:+.2%}, more than ±{limits.tolerance * 100:.4g}%")
        return faults

    @property
    def exit_code(self) -> int:
        """Exit code: 4 if no slide is compared, 3 if there are `faults` or a table cannot be read, otherwise 0."""
        if not self.slides:
            return 4
        return 3 if self.faults or any(m.done_in == "both" for m in self.missing) else 0
