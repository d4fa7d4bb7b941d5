"""Compare the nuclei of one slide in two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hover_batch.diff.match import Matches, match_tables
from hover_batch.errors import SlideError
from hover_batch.export.read import NucleiTable

NONE = "none"
"""Name of the row and column of a confusion table for nuclei without a partner."""
ALL = "nuclei"
"""Name of the endpoint of all classes together; no class has it."""


@dataclass(frozen=True)
class Change:
    """Number or density of nuclei in A and B."""

    first: float
    """Value of A: nuclei per mm² of tissue, or nuclei if an area is unknown."""
    second: float
    """Value of B, in the same unit."""

    @property
    def relative(self) -> float | None:
        """Relative change, (B − A) / A; 0 if A and B are equal, None if A is 0 and B is not."""
        if self.first == self.second:
            return 0.0
        return (self.second - self.first) / self.first if self.first else None

    def to_json(self) -> dict[str, float | None]:
        """Return `a`, `b`, `difference` (B − A) and `relative` (None if undefined) as JSON values."""
        return {"a": self.first, "b": self.second, "difference": self.second - self.first, "relative": self.relative}


@dataclass(frozen=True)
class Confusion:
    """Number of nuclei by their class in A (rows) and in B (columns); the last row and column are `none`."""

    rows: tuple[str, ...]
    """Names of A's classes."""
    columns: tuple[str, ...]
    """Names of B's classes."""
    counts: NDArray[np.int64]
    """(rows + 1, columns + 1)."""

    @property
    def changed(self) -> int:
        """Number of matched pairs whose nuclei have classes of different names."""
        same = sum(int(self.counts[i, self.columns.index(n)]) for i, n in enumerate(self.rows) if n in self.columns)
        return int(self.counts[:-1, :-1].sum()) - same

    @property
    def only_in_rows(self) -> list[str]:
        """Names of the classes that only A has."""
        return [name for name in self.rows if name not in self.columns]

    @property
    def only_in_columns(self) -> list[str]:
        """Names of the classes that only B has."""
        return [name for name in self.columns if name not in self.rows]

    def __add__(self, other: Confusion) -> Confusion:
        """Return the sums, over all classes of both tables."""
        rows, columns = (
            tuple(dict.fromkeys([*a, *b])) for a, b in ((self.rows, other.rows), (self.columns, other.columns))
        )
        counts = np.zeros((len(rows) + 1, len(columns) + 1), np.int64)
        for part in (self, other):
            at = [*map(rows.index, part.rows), len(rows)], [*map(columns.index, part.columns), len(columns)]
            counts[np.ix_(*at)] += part.counts
        return Confusion(rows, columns, counts)

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON values by name.

        `rows` and `columns` are the class names, with NONE last; `counts` is a list of rows.
        """
        return {"rows": [*self.rows, NONE], "columns": [*self.columns, NONE], "counts": self.counts.tolist()}


@dataclass(frozen=True)
class SlideDiff:
    """Differences of one slide's nuclei in two runs."""

    slide_id: str
    """Id of the slide."""
    identical: bool
    """Whether the tables are the same file, so that nothing was matched."""
    confusion: Confusion
    """Classes of pairs, and of nuclei in one run only."""
    iou: Mapping[str, float | None]
    """Median and p5 of the IoU of pairs; None without pairs."""
    area_ratio: Mapping[str, float | None]
    """Median, p5 and p95 of the area in B divided by that in A; None without pairs."""
    tissue_mm2: tuple[float | None, float | None]
    """Area that was searched in A and in B in mm²; None if unknown."""
    disputed: NDArray[np.float64]
    """Centroids of nuclei that differ: (n, 2) of x, y in level-0 pixels."""
    kinds: NDArray[np.uint8]
    """Difference of each: 0 only in A, 1 only in B, 2 another class: (n,)."""

    @classmethod
    def of(cls, first: NucleiTable, second: NucleiTable, done: Sequence[Mapping[str, Any]]) -> Self:
        """Compare two tables of the same slide. Tables that slide.json shows to be identical are not matched.

        `first`, `second`: tables of A and B. `done`: content of slide.json of A and of B.

        SlideError if a table is corrupted, or the tables are of slides of different size or pixel size.
        """
        if (first.level0, first.mpp) != (second.level0, second.mpp):
            raise SlideError(
                f"{first.path} and {second.path}: are tables of slides of different size or pixel size; give runs on "
                "the same file, with the same mpp"
            )
        sums = [content.get("nuclei_sha256") for content in done]
        areas = [content.get("summary", {}).get("tissue_mm2") for content in done]
        tissue = areas[0], areas[1]
        if sums[0] is not None and sums[0] == sums[1]:
            return cls._identical(first, tissue)
        matches = match_tables(first, second)
        names = [tuple(c.name for c in table.taxonomy.nuclei) for table in (first, second)]
        confusion = _confusion(matches, first, second)
        a, b = matches.pairs.T
        of_a, of_b = (np.array([c.name for c in table.taxonomy.classes]) for table in (first, second))
        same_name = of_a[:, None] == of_b
        changed = a[~same_name[matches.first.type_id[a], matches.second.type_id[b]]]
        only = matches.unmatched()
        return cls(
            slide_id=first.slide_id,
            identical=False,
            confusion=Confusion(names[0], names[1], confusion),
            iou=_quantiles(matches.iou, {"median": 0.5, "p5": 0.05}),
            area_ratio=_quantiles(
                matches.second.area_um2[b] / matches.first.area_um2[a], {"median": 0.5, "p5": 0.05, "p95": 0.95}
            ),
            tissue_mm2=tissue,
            disputed=np.concatenate([matches.first.xy[only[0]], matches.second.xy[only[1]], matches.first.xy[changed]]),
            kinds=np.repeat(np.arange(3, dtype=np.uint8), [len(only[0]), len(only[1]), len(changed)]),
        )

    @classmethod
    def _identical(cls, table: NucleiTable, tissue: tuple[float | None, float | None]) -> Self:
        """Return the result for a table that both runs have."""
        classes = len(table.taxonomy.classes)
        counts = sum(
            (np.bincount(batch["type_id"].to_numpy(), minlength=classes) for batch in table.batches(["type_id"])),
            np.zeros(classes, np.int64),
        )[1:]
        names = tuple(c.name for c in table.taxonomy.nuclei)
        equal = 1.0 if counts.any() else None
        return cls(
            slide_id=table.slide_id,
            identical=True,
            confusion=Confusion(names, names, np.diag([*counts, 0])),
            iou={"median": equal, "p5": equal},
            area_ratio={"median": equal, "p5": equal, "p95": equal},
            tissue_mm2=tissue,
            disputed=np.empty((0, 2)),
            kinds=np.empty(0, np.uint8),
        )

    @property
    def counts(self) -> tuple[int, int]:
        """Number of nuclei in A and in B."""
        return int(self.confusion.counts[:-1].sum()), int(self.confusion.counts[:, :-1].sum())

    @property
    def matched(self) -> int:
        """Number of pairs of a nucleus in A and its partner in B, of the same or different classes."""
        return int(self.confusion.counts[:-1, :-1].sum())

    @property
    def matched_share(self) -> float:
        """Number of pairs divided by the mean number of nuclei in A and B. This is the F1 score of detection.

        The share is 1 if neither run has nuclei.
        """
        total = sum(self.counts)
        return 2 * self.matched / total if total else 1.0

    @property
    def per_mm2(self) -> bool:
        """True if `change` returns densities in nuclei per mm²: both areas of tissue are known and not 0."""
        return all(self.tissue_mm2)

    def change(self, endpoint: str) -> Change:
        """Return the densities of A and B in nuclei per mm² or, if `per_mm2` is False, their numbers of nuclei.

        `endpoint`: ALL or the name of a class. A run without this class has 0 such nuclei.
        """
        table = self.confusion
        if endpoint == ALL:
            values = self.counts
        else:
            values = (
                int(table.counts[table.rows.index(endpoint)].sum()) if endpoint in table.rows else 0,
                int(table.counts[:, table.columns.index(endpoint)].sum()) if endpoint in table.columns else 0,
            )
        a_mm2, b_mm2 = self.tissue_mm2
        return Change(values[0] / a_mm2, values[1] / b_mm2) if a_mm2 and b_mm2 else Change(*values)

    @property
    def endpoints(self) -> list[str]:
        """Names of all endpoints: ALL, then the classes of both runs."""
        return list(dict.fromkeys([ALL, *self.confusion.rows, *self.confusion.columns]))

    def to_json(self) -> dict[str, Any]:
        """Return the slide's entry in diff.json, as JSON values by name.

        The keys are `slide_id`, `identical`, `nuclei` and `tissue_mm2` (each with `a` and `b`), `matched`, `only_a`,
        `only_b`, `class_changed`, `matched_share`, `iou` (`median`, `p5`), `area_ratio` (`median`, `p5`, `p95`),
        `confusion` (see `Confusion.to_json`), `endpoints` (`Change.to_json` by endpoint) and `unit`, the unit of the
        endpoints.
        """
        (a, b), matched = self.counts, self.matched
        return {
            "slide_id": self.slide_id,
            "identical": self.identical,
            "nuclei": {"a": a, "b": b},
            "matched": matched,
            "only_a": a - matched,
            "only_b": b - matched,
            "class_changed": self.confusion.changed,
            "matched_share": self.matched_share,
            "iou": dict(self.iou),
            "area_ratio": dict(self.area_ratio),
            "tissue_mm2": {"a": self.tissue_mm2[0], "b": self.tissue_mm2[1]},
            "confusion": self.confusion.to_json(),
            "unit": "nuclei per mm2 of tissue" if self.per_mm2 else "nuclei",
            "endpoints": {name: self.change(name).to_json() for name in self.endpoints},
        }


def _confusion(matches: Matches, first: NucleiTable, second: NucleiTable) -> NDArray[np.int64]:
    """Return the counts of `Confusion`."""
    rows, columns = len(first.taxonomy.classes), len(second.taxonomy.classes)
    counts = np.zeros((rows, columns), np.int64)
    a, b = matches.pairs.T
    only_a, only_b = matches.unmatched()
    np.add.at(counts, (matches.first.type_id[a], matches.second.type_id[b]), 1)
    np.add.at(counts[:, 0], matches.first.type_id[only_a], 1)
    np.add.at(counts[0], matches.second.type_id[only_b], 1)
    return np.roll(counts, -1, axis=(0, 1))  # id 0 is no nucleus: its row and column become the last


def _quantiles(values: NDArray[np.floating], levels: Mapping[str, float]) -> dict[str, float | None]:
    """Return the quantiles at `levels` by their names; None without values."""
    return {name: float(np.quantile(values, level)) if len(values) else None for name, level in levels.items()}
