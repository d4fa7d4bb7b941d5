"""Ready-made questions: the slides and classes that they are about, and the SQL of numbers and densities.

The SQL names only the views of `hover_batch.dataset.opened`, so that users can change it and run it themselves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from hover_batch.dataset.opened import Dataset, chosen_model
from hover_batch.dataset.quoting import identifier, text
from hover_batch.dataset.slides import SlideEntry
from hover_batch.errors import InputError
from hover_batch.formatting import counted, listed, suggestion
from hover_batch.taxonomy import Taxonomy

_UNFLAGGED = "coalesce(slides.flags, '') = ''"


@dataclass(frozen=True)
class Subject:
    """Slides of one model that a question is about. Slides with quality flags may be left out."""

    dataset: Dataset
    """Data set that is asked."""
    entries: tuple[SlideEntry, ...]
    """The slides."""
    conditions: tuple[str, ...]
    """Conditions in SQL that distinguish them from the other rows of `slides`."""
    classes: tuple[str, ...]
    """Names of the classes of their nuclei."""
    notes: tuple[str, ...]
    """What to know about the answer: slides with quality flags, patients without clinical data."""

    @classmethod
    def of(cls, dataset: Dataset, model: str | None, without_flagged: bool) -> Self:
        """Return the slides of a model as the subject of a question.

        `dataset`: the open data set. `model`: name of the model, with or without its hash; None if the data set holds
        only one. `without_flagged`: leave out slides with quality flags.

        InputError if `model` does not name exactly one model of the data set, or no slide is left.
        """
        model = chosen_model(dataset.entries, model)
        entries = [entry for entry in dataset.entries if entry.model == model]
        conditions = [f"slides.model = {text(model)}"] if len(entries) < len(dataset.entries) else []
        where = " AND ".join([*conditions, f"NOT {_UNFLAGGED}"])
        rows = dataset.select(f"SELECT slide_id, flags FROM slides WHERE {where} ORDER BY slide_id").fetchall()
        notes = list(dataset.notes)
        if rows:
            flagged = listed([f"{slide_id} ({flags.replace(';', ', ')})" for slide_id, flags in rows])
            what = "left out" if without_flagged else "counted; --without-flagged leaves them out"
            notes.append(f"quality flags on {len(rows):,} of {counted(len(entries), 'slide')}, {what}: {flagged}")
        if without_flagged:
            conditions.append(_UNFLAGGED)
            names = {slide_id for slide_id, _ in rows}
            entries = [entry for entry in entries if entry.slide_id not in names]
            if not entries:
                raise InputError("--without-flagged: all slides have quality flags, so none is left")
        taxonomy = Taxonomy.from_json(json.loads(entries[0].taxonomy))
        classes = tuple(c.name for c in taxonomy.nuclei)
        return cls(dataset, tuple(entries), tuple(conditions), classes, tuple(notes))

    def check_class(self, flag: str, name: str) -> None:
        """Raise InputError if `name` is not one of the classes of these nuclei.

        `flag`: option that gave the name, for the message.
        """
        if name not in self.classes:
            raise InputError(f"{flag} {name}: is not a class of these nuclei; their classes: {', '.join(self.classes)}")

    def column(self, name: str) -> tuple[str, str]:
        """Return the column `name` of the slides or the clinical table as SQL, and the tables that have it.

        The tables are what follows FROM, such as `slides` or `slides LEFT JOIN clinical USING ("patient_id")`. A column
        that is empty in these slides, such as `group` without groups in the cohort CSV, is not used if the clinical
        table has it, too.

        InputError if there is no such column, or both tables have values in it.
        """
        slides = self.dataset.select("FROM slides").columns
        clinical = self.dataset.select("FROM clinical").columns if self.dataset.on else []
        in_both = name in slides and name in clinical and name != self.dataset.on
        if in_both and self._has_values(name):
            raise InputError(
                f"--by {name}: is a column of the slides and of the clinical table; rename it in the clinical table"
            )
        if name in slides and not in_both:
            return f"slides.{identifier(name)}", "slides"
        if name in clinical:
            using = identifier(str(self.dataset.on))
            return f"clinical.{identifier(name)}", f"slides LEFT JOIN clinical USING ({using})"
        where = "the slides or the clinical table" if clinical else "the slides"
        raise InputError(
            f"--by {name}: is not a column of {where}; columns: {', '.join((*slides, *clinical))}"
            + ("" if clinical else "; a column of another table needs --join FILE")
            + suggestion(name, (*slides, *clinical))
        )

    def _has_values(self, name: str) -> bool:
        """Return whether the column `name` of these slides has a value."""
        [(count,)] = self.dataset.select(f"SELECT count({identifier(name)}) FROM slides{self.where()}").fetchall()
        return bool(count)

    def where(self, *more: str) -> str:
        """Return the SQL WHERE clause that selects the slides, after a line break; "" if there is no condition.

        `more`: further conditions in SQL, which are joined with AND.
        """
        conditions = (*self.conditions, *more)
        return f"\nWHERE {' AND '.join(conditions)}" if conditions else ""


def counts_sql(subject: Subject, by: str, of: str | None = None) -> str:
    """Return the SQL that counts nuclei, and gives their density per mm² of tissue, for all nuclei and by class.

    The result has a row for each value of `by`. The density over several slides is the sum of their nuclei divided by
    the sum of their mm² of tissue.

    `subject`: slides that the question is about. `by`: column of the slides or the clinical table. `of`: the only class
    that is counted; None for all nuclei and each class.

    InputError if there is no such column or class.
    """
    column, source = subject.column(by)
    columns = [f"{column} AS {identifier(by)}"]
    if by not in ("slide_id", "patient_id"):
        columns.append("count(DISTINCT slides.patient_id) AS patients")
    columns += ["count(*) AS slides", "sum(slides.tissue_mm2) AS tissue_mm2"]
    for number, density in measures(subject, of):
        columns += [f"sum(slides.{number}) AS {number}", f"{density_sql(number)} AS {density}"]
    listing = ",\n  ".join(columns)
    return f"SELECT\n  {listing}\nFROM {source}{subject.where()}\nGROUP BY {column}\nORDER BY {column}"


def measures(subject: Subject, of: str | None) -> list[tuple[str, str]]:
    """Return pairs of SQL names: a column with a number of nuclei, and the name of its density.

    Each number is a column of slides.parquet, such as nuclei or "n_epithelial"; the densities are nuclei_per_mm2 and
    "epithelial_per_mm2". There is a pair for all nuclei and one for each class, or only one for the class `of`.

    `subject`: slides that the question is about. `of`: the only class; None for all. InputError if it is not a class.
    """
    if of is not None:
        subject.check_class("--of", of)
    names: Sequence[str] = subject.classes if of is None else [of]
    each = [(identifier(f"n_{name}"), identifier(f"{name}_per_mm2")) for name in names]
    return each if of is not None else [("nuclei", "nuclei_per_mm2"), *each]


def density_sql(number: str) -> str:
    """Return the SQL expression of the density over several slides, in nuclei per mm² of tissue; NULL without tissue.

    `number`: column of slides.parquet with the number of nuclei, as SQL.
    """
    return f"sum(slides.{number}) / nullif(sum(slides.tissue_mm2), 0)"
