"""Ready-made question: by how much the densities of groups of patients differ.

A patient counts once, with the density over all their slides: nuclei of one patient, and slides, resemble each
other, and would make intervals much too narrow. Effect sizes are the difference in medians and Cliff's delta (Cliff
1993), which is 1 if all densities of the second group are above those of the first, -1 if all are below, and 0 without
a tendency.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, rankdata

from hover_batch.dataset.questions import Subject, density_sql, measures
from hover_batch.dataset.quoting import identifier
from hover_batch.errors import InputError
from hover_batch.export.summary import COUNT_ERROR, read_count_error
from hover_batch.formatting import counted, listed
from hover_batch.uncertainty import CountError

MIN_PATIENTS = 3
"""Smallest number of patients in a group. With two, a bootstrap interval would be the two values."""
FEW_PATIENTS = 10
"""Number of patients below which a bootstrap interval is known to be too narrow."""
ALL = "nuclei_per_mm2"
"""Density of all nuclei, the only one whose measuring error may be known."""
_MAX_GROUPS = 10
_RESAMPLES = 9999
_SEED = 0


@dataclass(frozen=True)
class Measured:
    """Intervals of a difference, (low, high) at 95 %, that carry both the patients' and the counts' error.

    The counts of a source (laboratory, stain, scanner, tissue) are all too high or too low by one factor, which is not
    known. The error that slides have of their own is part of the variation between patients.
    """

    one_source: tuple[float, float]
    """If both groups are from one source: the factor is the same, so it changes the size of the difference only."""
    two_sources: tuple[float, float]
    """If each group has a source of its own: the factors differ, which alone makes a difference."""


@dataclass(frozen=True)
class Effect:
    """Difference of one density between two groups of patients. Each interval is (low, high), at 95 %."""

    measure: str
    """Name of the density, in nuclei per mm² of tissue."""
    groups: tuple[str, str]
    """Names of the groups."""
    patients: tuple[int, int]
    """Number of patients in each group."""
    medians: tuple[float, float]
    """Median density of each group."""
    difference: float
    """Median of the second group minus that of the first."""
    difference_interval: tuple[float, float]
    """Interval of the difference."""
    cliffs_delta: float
    """Cliff's delta of the second group against the first."""
    cliffs_delta_interval: tuple[float, float]
    """Interval of Cliff's delta."""
    measured: Measured | None
    """The difference with the measuring error of counts; None if that was not measured."""

    def to_row(self) -> dict[str, Any]:
        """Return the fields as a row of the results, values by column.

        The columns are measure, first, second (names of the groups), patients_first, median_first, patients_second,
        median_second, difference and cliffs_delta. Each interval has two columns, such as difference_low and
        difference_high. The columns from difference_one_source_low to difference_two_sources_high have the intervals
        with the measuring error; they are None if it was not measured.
        """
        row: dict[str, Any] = {"measure": self.measure}
        for number, name in enumerate(("first", "second")):
            row[name] = self.groups[number]
            row[f"patients_{name}"] = self.patients[number]
            row[f"median_{name}"] = self.medians[number]
        for name in ("difference", "cliffs_delta"):
            row[name] = getattr(self, name)
            row[f"{name}_low"], row[f"{name}_high"] = getattr(self, f"{name}_interval")
        for name in ("one_source", "two_sources"):
            interval = (None, None) if self.measured is None else getattr(self.measured, name)
            row[f"difference_{name}_low"], row[f"difference_{name}_high"] = interval
        return row


@dataclass(frozen=True)
class Comparison:
    """Effects for every pair of patient groups and each density, and notes about them."""

    effects: list[Effect]
    """Effects, ordered by density, then by groups."""
    notes: list[str]
    """What to know about the answer."""


def densities_sql(subject: Subject, by: str, of: str | None = None) -> str:
    """Return the SQL that gives the densities, in nuclei per mm² of tissue, with one row per group and patient.

    Slides without a group or a patient are left out.

    `subject`: slides that the question is about. `by`: column with the group, of the slides or the clinical table.
    `of`: the only class whose density is included; None for all nuclei and each class.

    InputError if `by` is patient_id, or there is no such column or class.
    """
    if by == "patient_id":
        raise InputError(
            "--by patient_id: a patient alone is no group; give a column that divides the patients into groups, such "
            "as group, or see each patient's densities with `hover-batch cohort counts --by patient_id`"
        )
    column, source = subject.column(by)
    columns = [f"{column} AS {identifier(by)}", "slides.patient_id"]
    columns += [f"{density_sql(number)} AS {density}" for number, density in measures(subject, of)]
    listing = ",\n  ".join(columns)
    where = subject.where(f"{column} IS NOT NULL", "slides.patient_id IS NOT NULL")
    group_by = f"{column}, slides.patient_id"
    return f"SELECT\n  {listing}\nFROM {source}{where}\nGROUP BY {group_by}\nORDER BY {group_by}"


def compare_densities(subject: Subject, by: str, of: str | None = None) -> Comparison:
    """Compare the densities between every pair of patient groups. Return the effects, with notes for the user.

    Slides without a patient or a group are left out, and so are patients without tissue; the notes name them.

    `subject`: slides that the question is about. `by`: column with the group, of the slides or the clinical table.
    `of`: the only class whose density is compared; None for all nuclei and each class.

    InputError if `by` is patient_id, there is no such column or class, a group has fewer than MIN_PATIENTS patients, a
    patient is in several groups, or there are fewer than 2 or more than 10 groups.
    """
    relation = subject.dataset.select(densities_sql(subject, by, of))
    names, rows = relation.columns[2:], relation.fetchall()
    groups: dict[str, list[tuple[float, ...]]] = {}
    group_of: dict[str, list[str]] = {}
    without_tissue: list[str] = []
    for group, patient, *densities in rows:
        group_of.setdefault(patient, []).append(str(group))
        if None in densities:
            without_tissue.append(patient)
        else:
            groups.setdefault(str(group), []).append(tuple(densities))
    _check(by, groups, group_of)
    error = _count_error(subject)
    effects = []
    for index, name in enumerate(names):
        columns = {group: np.array(values)[:, index] for group, values in groups.items()}
        of_all = error if name == ALL else None
        effects += [_effect(name, (a, b), (columns[a], columns[b]), of_all) for a, b in combinations(columns, 2)]
    notes = list(_left_out(subject, by))
    if without_tissue:
        notes.append(f"patients without tissue are left out: {listed(without_tissue)}")
    if few := [f"{group} ({len(values)})" for group, values in groups.items() if len(values) < FEW_PATIENTS]:
        notes.append(
            f"fewer than {FEW_PATIENTS} patients in {listed(few)}: the intervals are too narrow; take them as a hint"
        )
    if len(effects) > 1:
        notes.append(f"{len(effects)} intervals, each at 95 %: of 20 such intervals, one misses the truth by chance")
    if error is None:
        notes.append("the measuring error of these counts is not known; the intervals are those of the patients alone")
    elif names != [ALL]:
        notes.append("the measuring error of classes is not known; their intervals are those of the patients alone")
    return Comparison(effects, notes)


def _check(by: str, groups: dict[str, list[tuple[float, ...]]], group_of: dict[str, list[str]]) -> None:
    if not group_of:
        raise InputError(
            f"--by {by}: no slide has both a patient_id and a {by}; give both columns in the cohort CSV, repeat "
            "`hover-batch segment` and `hover-batch cohort`, or give the groups of the patients with --join"
        )
    if several := [patient for patient, names in group_of.items() if len(names) > 1]:
        raise InputError(
            f"--by {by}: patients with slides in several groups: {listed(several)}; such groups are not independent: "
            "give each patient one group"
        )
    if not 2 <= len(groups) <= _MAX_GROUPS:
        raise InputError(
            f"--by {by}: has {counted(len(groups), 'group')} ({listed(groups)}); 2 to {_MAX_GROUPS} can be compared"
        )
    if small := [f"{name} ({len(values)})" for name, values in groups.items() if len(values) < MIN_PATIENTS]:
        raise InputError(
            f"--by {by}: groups of fewer than {MIN_PATIENTS} patients: {listed(small)}; so few say nothing about "
            "other patients, however many nuclei they have: add patients, or see their numbers with `cohort counts`"
        )


def _left_out(subject: Subject, by: str) -> list[str]:
    """Return a note on the slides that are left out, if there are any."""
    column, source = subject.column(by)
    where = subject.where(f"({column} IS NULL OR slides.patient_id IS NULL)")
    rows = subject.dataset.select(f"SELECT slides.slide_id FROM {source}{where} ORDER BY ALL").fetchall()
    names = [name for (name,) in rows]
    return [f"{counted(len(names), 'slide')} without patient_id or {by} left out: {listed(names)}"] if names else []


def _count_error(subject: Subject) -> CountError | None:
    """Return the error of the number of nuclei; None unless all slides have the same one."""
    if COUNT_ERROR not in subject.dataset.select("FROM slides").columns:
        return None
    rows = subject.dataset.select(f"SELECT DISTINCT {COUNT_ERROR} FROM slides{subject.where()}").fetchall()
    return read_count_error(rows[0][0]) if len(rows) == 1 else None


def _effect(
    measure: str,
    groups: tuple[str, str],
    samples: tuple[NDArray[np.float64], NDArray[np.float64]],
    error: CountError | None,
) -> Effect:
    first, second = samples
    difference, delta = _difference(first, second), cliffs_delta(first, second)
    return Effect(
        measure,
        groups,
        (len(first), len(second)),
        (float(np.median(first)), float(np.median(second))),
        float(difference),
        _interval(samples, _difference),
        float(delta),
        _interval(samples, cliffs_delta),
        None if error is None else with_measuring_error(samples, error),
    )


def with_measuring_error(samples: tuple[NDArray[np.float64], NDArray[np.float64]], error: CountError) -> Measured:
    """Return 95 % intervals of the difference in medians that include both the patients' and the counts' error.

    The difference is the median of the second group minus that of the first. In each of 9999 draws, the patients of
    both groups are resampled, and the medians are multiplied by random factors: by the same factor if both groups are
    from one source, and by a factor for each group if they are from two.

    The logarithms of the factors follow the multivariate t distribution of `error`: all sources share the error of its
    mean, and have independent errors of their own. The seed is fixed, so the same arguments give the same result.

    `samples`: counted densities of the patients of both groups, (n,) and (m,). `error`: error of the number of nuclei.
    """
    random = np.random.default_rng(_SEED)
    medians = [np.median(random.choice(values, (_RESAMPLES, len(values))), axis=1) for values in samples]
    shared, *own = random.standard_normal((3, _RESAMPLES))
    heavier = np.sqrt(error.df / random.chisquare(error.df, _RESAMPLES))
    of_mean, of_source = math.sqrt(error.mean_variance), math.sqrt(error.source)
    first, second = (np.exp(error.mean + heavier * (of_mean * shared + of_source * each)) for each in own)
    differences = (first * (medians[1] - medians[0]), second * medians[1] - first * medians[0])
    one, two = ((float(low), float(high)) for low, high in (np.percentile(d, (2.5, 97.5)) for d in differences))
    return Measured(one, two)


def _difference(first: NDArray[np.float64], second: NDArray[np.float64], axis: int = -1) -> Any:
    return np.median(second, axis=axis) - np.median(first, axis=axis)


def cliffs_delta(first: NDArray[np.float64], second: NDArray[np.float64], axis: int = -1) -> Any:
    """Return Cliff's delta, P(second > first) - P(second < first), over all pairs of a value of each group.

    Pairs are formed along the last axis; the result has the shape of the other axes.

    `first` (…, n), `second` (…, m): values of the two groups. `axis`: ignored; it is there because scipy passes it.
    """
    n, m = first.shape[-1], second.shape[-1]
    ranks = rankdata(np.concatenate([first, second], axis=-1), axis=-1)
    u = ranks[..., n:].sum(axis=-1) - m * (m + 1) / 2
    return 2 * u / (n * m) - 1


def _interval(
    samples: tuple[NDArray[np.float64], NDArray[np.float64]], statistic: Callable[..., Any]
) -> tuple[float, float]:
    """Return the percentile bootstrap interval at 95 %, with patients resampled within each group."""
    found = bootstrap(
        samples,
        statistic,
        n_resamples=_RESAMPLES,
        batch=500,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)
