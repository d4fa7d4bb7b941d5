"""Ready-made question: which share of the nuclei of one class has a nucleus of another class nearby.

Distances are between centroids, in µm, and exact. Nuclei are sorted into square cells as wide as the distance, so that
each is compared only with those in its own cell and the eight around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import duckdb

from hover_batch.dataset.questions import Subject
from hover_batch.dataset.quoting import identifier, text
from hover_batch.dataset.slides import SlideEntry
from hover_batch.errors import InputError

_Entries = list[SlideEntry]

_CTES = """positions AS (
  -- in µm; a pixel may be wider than high
  SELECT nuclei.slide_id, nuclei.nucleus_id, nuclei.type,
    nuclei.centroid_x * slides.mpp_x AS x, nuclei.centroid_y * slides.mpp_y AS y
  FROM nuclei JOIN slides USING (slide_id, model)
  WHERE {where}
),
cells AS (
  -- slightly wider than the distance, so that rounding cannot move a neighbour two cells away
  SELECT *, floor(x / ({within} * 1.000001)) AS cell_x, floor(y / ({within} * 1.000001)) AS cell_y
  FROM positions
),
others AS (
  SELECT slide_id, nucleus_id, x, y, cell_x + i AS cell_x, cell_y + j AS cell_y
  FROM cells, unnest([-1, 0, 1]) AS around_x(i), unnest([-1, 0, 1]) AS around_y(j)
  WHERE type = {to}
)"""
_NEAR = """SELECT a.slide_id, count(*) AS near
  FROM cells AS a SEMI JOIN others AS b
    ON a.slide_id = b.slide_id AND a.cell_x = b.cell_x AND a.cell_y = b.cell_y AND a.nucleus_id <> b.nucleus_id
    AND (a.x - b.x) ** 2 + (a.y - b.y) ** 2 <= {within} ** 2
  WHERE a.type = {of}
  GROUP BY a.slide_id"""


class NearQuestion:
    """Question for the share of the nuclei of class `of` that have one of class `to` at most `within` µm away.

    `by`: column of the slides or the clinical table; the answer has a row for each of its values. If both classes are
    the same, a nucleus is not near itself. InputError if there is no such column or class, or `within` is not above 0
    and at most 10,000.
    """

    def __init__(self, subject: Subject, of: str, to: str, within: float, by: str) -> None:
        subject.check_class("--of", of)
        subject.check_class("--to", to)
        if not 0 < within <= 10_000:
            raise InputError(f"--within {within:g}: must be a distance in µm, more than 0 and at most 10,000")
        self._subject = subject
        column, source = subject.column(by)
        where = [*subject.conditions, f"nuclei.type IN ({text(of)}, {text(to)})"]
        values = {"where": " AND ".join(where), "within": f"{within!r}", "of": text(of), "to": text(to)}
        self._ctes, self._near = _CTES.format(**values), _NEAR.format(**values)
        number = f"sum(slides.{identifier(f'n_{of}')})"
        self._answer = (
            f"SELECT\n  {column} AS {identifier(by)},\n  count(*) AS slides,\n  {number} AS nuclei,\n"
            f"  coalesce(sum(near.near), 0) AS near,\n  coalesce(sum(near.near), 0) / nullif({number}, 0) AS share\n"
            f"FROM {source} LEFT JOIN near ON near.slide_id = slides.slide_id{subject.where()}\n"
            f"GROUP BY {column}\nORDER BY {column}"
        )

    @property
    def sql(self) -> str:
        """The question as one SELECT statement in DuckDB's SQL. It gives the same result as `answer`."""
        return f"WITH {self._ctes},\nnear AS (\n  {self._near}\n)\n{self._answer}"

    def answer(self, track: Callable[[list[_Entries]], Iterable[_Entries]]) -> duckdb.DuckDBPyRelation:
        """Return the answer as a DuckDB relation, with one row for each value of the column `by`.

        Its columns are that column, `slides` (number of slides), `nuclei` (number of nuclei of the class `of`), `near`
        (how many of them have a nucleus of the class `to` within the distance) and `share` (near / nuclei; NULL without
        nuclei).

        The files are read one after the other, so that memory holds the positions of one slide, or of the small slides
        that share a file. The connection's temporary table `near` is replaced.

        `track`: function that yields the items of a list and shows the progress.

        InputError if a file cannot be read, KeyboardInterrupt if a signal interrupts a query.
        """
        dataset = self._subject.dataset
        dataset.execute("CREATE OR REPLACE TEMP TABLE near (slide_id VARCHAR, near BIGINT)")
        by_files: dict[tuple[str, ...], _Entries] = {}
        for entry in self._subject.entries:
            if entry.nuclei_files:
                by_files.setdefault(entry.nuclei_files, []).append(entry)
        for entries in track(list(by_files.values())):
            with dataset.narrowed(entries):
                dataset.execute(f"INSERT INTO near WITH {self._ctes} {self._near}")
        return dataset.select(self._answer)
