"""Add a run's slides to a data set, or replace them, in steps of which each is done completely or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hover_batch.cohort.record import Url
from hover_batch.cohort.run_folder import COMPLETING, estimate_of, why_not_done
from hover_batch.dataset.layout import DatasetLayout
from hover_batch.dataset.nuclei_file import sorted_pieces, stored_pieces, write_files
from hover_batch.dataset.slides import FIXED, SlideEntry, rows_table, with_rows
from hover_batch.dataset.source import RunSource, taxonomy_json
from hover_batch.dataset.writer import DatasetWriter, open_writer
from hover_batch.errors import InputError, SlideError, exit_code
from hover_batch.export.read import NucleiTable
from hover_batch.export.summary import summary_schema
from hover_batch.formatting import counted, listed
from hover_batch.nuclei.table import table_schema
from hover_batch.taxonomy import Taxonomy

Notify = Callable[[str], None]

SHARED_ROWS = 200_000
"""Slides with fewer nuclei share a file, which is full when it has this number of rows."""


@dataclass
class Added:
    """Result of adding a run to a data set."""

    added: list[str] = field(default_factory=list)
    """slide_ids that were added or replaced, in order."""
    unchanged: list[str] = field(default_factory=list)
    """slide_ids that the data set held already."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Reason why a slide was skipped, by slide_id."""

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0 if the data set has all slides, 3 if some were skipped, 4 if it has none."""
        return exit_code(len(self.added) + len(self.unchanged), len(self.skipped))


def add_run(folder: Path, dataset: Path | Url, slide_ids: Sequence[str], notify: Notify, flag: str = "-o") -> Added:
    """Add the finished slides of the run in `folder` to the data set, which is created if it does not exist.

    Tables of slides that the data set already holds are not read again, but the rows of these slides in slides.parquet
    are updated, for example with new patients and flags. A slide whose table has changed since it was added is
    replaced. Slides that are not done, or whose table cannot be read, are skipped. If the command is interrupted,
    repeat it: slides that were added stay.

    `dataset`: folder or URL of the data set. `slide_ids`: the slides to add; empty for all. `notify`: function that is
    called with a line about each slide that is added, skipped or a copy of another, and at the end about those that are
    missing. `flag`: option that named the data set, for messages.

    InputError if `folder` holds no run or a corrupted one, a slide is not in it, or `dataset` is not a data set, is
    being written or cannot be written. Also InputError if it holds nuclei of this model with other classes, or a slide
    of the same name from another run with another file or pixel size. OSError if the disk is full or a file cannot be
    read or written, UploadError if a bucket cannot be reached.
    """
    source = RunSource.open(folder)
    chosen = source.chosen(slide_ids)
    if not chosen:
        notify(f"{source.layout.slides_csv}: is missing or lists no slide; repeat the segment command, which writes it")
    with open_writer(dataset, flag) as writer:
        update = _Update(source, writer, notify)
        update.run(chosen)
    if missing := update.result.skipped:
        estimated = any(estimate_of(source.layout.slide(slide_id)) for slide_id in missing)
        command = f"`{source.command}`" + f" {COMPLETING}" * estimated
        notify(
            f"{len(chosen) - len(missing):,} of {counted(len(chosen), 'slide')} are in the data set; missing: "
            f"{listed(missing)}. To add them, complete the run with {command}, and repeat this command"
        )
    return update.result


class _SlideFailed(Exception):
    """The table of the slide `slide_id` cannot be read, for `reason`."""

    def __init__(self, slide_id: str, reason: str) -> None:
        super().__init__(slide_id, reason)
        self.slide_id, self.reason = slide_id, reason


class _Update:
    """Addition of one run's slides to a data set."""

    def __init__(self, source: RunSource, writer: DatasetWriter, notify: Notify) -> None:
        self.result = Added()
        self._source = source
        self._writer = writer
        self._notify = notify
        self._folder = DatasetLayout(writer.root).model_folder(source.model)
        self._total = 0
        self._classes: tuple[str, str] | None = None
        """Value of the column `taxonomy` of the model's slides, and the run of one of them."""

    def run(self, chosen: Sequence[str]) -> None:
        """Add the slides `chosen`, in order; those that replace others first."""
        held = self._writer.entries(self._source.model)
        self._classes = next(((entry.taxonomy, entry.run) for entry in held.values()), None)
        changed = []
        for slide_id in chosen:
            done, entry = self._source.done.get(slide_id), held.get(slide_id)
            if done is None:
                self._skip(slide_id, why_not_done(self._source.layout.slide(slide_id)))
            elif entry is not None and self._is_current(entry):
                self.result.unchanged.append(slide_id)
            else:
                changed.append(slide_id)
        self._refuse_other_slides([held[slide_id] for slide_id in changed if slide_id in held])
        if self.result.unchanged:
            self._notify(f"{counted(len(self.result.unchanged), 'slide')} already in the data set")
            self._refresh([held[slide_id] for slide_id in self.result.unchanged])
        self._total = len(changed)
        if changed:
            self._folder.mkdir(parents=True, exist_ok=True)
        has_rows = {slide_id for slide_id in changed if slide_id in held and held[slide_id].nuclei_files}
        self._replace([held[slide_id] for slide_id in changed if slide_id in has_rows], list(held.values()))
        self._append([slide_id for slide_id in changed if slide_id not in has_rows])
        self._warn_of_copies()

    def _warn_of_copies(self) -> None:
        """Give a line about each added slide that is in the data set under another slide_id, too.

        Rows of one slide with different masks are not copies.
        """
        same: dict[tuple[str, str | None], list[str]] = {}
        for row in self._writer.table.select(["slide_id", "model", "fingerprint", "mask_path"]).to_pylist():
            if row["model"] == self._source.model:
                same.setdefault((row["fingerprint"], row["mask_path"]), []).append(row["slide_id"])
        for slide_ids in same.values():
            if len(slide_ids) > 1 and not set(slide_ids).isdisjoint(self.result.added):
                self._notify(
                    f"{listed(slide_ids)}: are the same slide, whose nuclei are therefore counted {len(slide_ids)} "
                    "times; if it was renamed or copied, make the data set again from runs that have it once"
                )

    def _is_current(self, entry: SlideEntry) -> bool:
        """Return whether the data set has the slide's present table, and its files are there."""
        is_same = entry.nuclei_sha256 == self._source.done[entry.slide_id].get("nuclei_sha256")
        return is_same and self._writer.holds(entry)

    def _skip(self, slide_id: str, reason: str) -> None:
        self.result.skipped[slide_id] = reason
        self._notify(f"{slide_id}: skipped: {reason}")

    def _refuse_other_slides(self, replaced: Sequence[SlideEntry]) -> None:
        """InputError if the data set has other slides of the same names, from another run."""
        root = self._source.layout.root
        others = []
        for entry in replaced:
            try:
                is_same = entry.run == str(root) or self._source.fingerprint(entry.slide_id) == entry.fingerprint
            except SlideError:
                continue  # it is skipped below, with its reason
            if not is_same:
                others.append(entry)
        if others:
            names = [entry.slide_id for entry in others]
            raise InputError(
                f"{self._writer.where}: {listed(names)}: {'is' if len(names) == 1 else 'are'} there from the run "
                f"{others[0].run}, of the same model but another file or mpp than in {root}; give these slides another "
                "slide_id in the cohort of one of the runs, or add this run to another data set"
            )

    def _refuse_other_classes(self, table: NucleiTable) -> None:
        """InputError if the data set holds tables of this model with other classes."""
        classes = taxonomy_json(table.taxonomy)
        self._classes = self._classes or (classes, str(self._source.layout.root))
        if classes != self._classes[0]:
            raise InputError(
                f"{self._writer.where}: holds nuclei of the model {self._source.model_name} with other classes, "
                f"from the run {self._classes[1]}, since one of the runs has another --class-map; add this run to "
                "another data set"
            )

    def _refresh(self, entries: Sequence[SlideEntry]) -> None:
        """Update what slides.parquet says of slides whose nuclei have not changed: patients, flags, …"""
        taxonomy = Taxonomy.from_json(json.loads(entries[0].taxonomy))
        stored = self._rows_of(entries).select(FIXED.names).to_pylist()
        rows = [row | self._source.row(row["slide_id"], taxonomy) for row in stored]
        self._note_changes(self._rows_of(entries).to_pylist(), rows, taxonomy)
        self._writer.commit(rows_table(rows, self._source.measured(taxonomy)))

    def _note_changes(
        self, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], taxonomy: Taxonomy
    ) -> None:
        """Report, by column of the cohort CSV, the values that are replaced for slides already in the data set."""
        own = {*FIXED.names, *summary_schema(taxonomy).names, "flags"} - {"patient_id", "group"}
        for name in before[0]:
            changed = [
                f"{old['slide_id']}: {old[name]} → {new.get(name) or 'empty'}"
                for old, new in zip(before, after, strict=True)
                if isinstance(old[name], str) and old[name] and name not in own and old[name] != new.get(name)
            ]
            if changed:
                self._notify(
                    f"{name}: replaced by the cohort's value for {counted(len(changed), 'slide')} already in the data "
                    f"set ({listed(changed)})"
                )

    def _rows_of(self, entries: Sequence[SlideEntry]) -> pa.Table:
        """Return the rows of slides in slides.parquet."""
        table = self._writer.table
        is_model = pc.equal(table["model"], self._source.model)
        is_slide = pc.is_in(table["slide_id"], value_set=pa.array([entry.slide_id for entry in entries]))
        return table.filter(pc.and_(is_model, is_slide))

    def _replace(self, replaced: Sequence[SlideEntry], held: Sequence[SlideEntry]) -> None:
        """Replace slides, with the files that they are in; the rows of the other slides `held` there are copied."""
        by_files: dict[tuple[str, ...], list[SlideEntry]] = {entry.nuclei_files: [] for entry in replaced}
        for entry in held:
            if entry.nuclei_files in by_files:
                by_files[entry.nuclei_files].append(entry)
        changed = {entry.slide_id for entry in replaced}
        for there in by_files.values():
            self._write(there, self._opened([entry.slide_id for entry in there if entry.slide_id in changed]))

    def _append(self, slide_ids: Sequence[str]) -> None:
        """Add new slides: large ones each in a file, small ones to the file that is not full."""
        small: list[NucleiTable] = []
        rows = 0
        tail = self._not_full()
        for slide_id in slide_ids:
            for table in self._opened([slide_id]):
                if table.rows >= SHARED_ROWS:
                    self._write([], [table])
                    continue
                small.append(table)
                rows += table.rows
                if rows + sum(entry.nuclei_rows for entry in tail) >= SHARED_ROWS:
                    self._write(tail, small)
                    small, rows, tail = [], 0, []
        if small:
            self._write(tail, small)

    def _not_full(self) -> list[SlideEntry]:
        """Return the slides in the smallest shared file that is not full; empty if there is none."""
        by_file: dict[tuple[str, ...], list[SlideEntry]] = {}
        for entry in self._writer.entries(self._source.model).values():
            if entry.nuclei_files:
                by_file.setdefault(entry.nuclei_files, []).append(entry)
        smallest = min(by_file.values(), key=_rows, default=[])
        return smallest if _rows(smallest) < SHARED_ROWS else []

    def _opened(self, slide_ids: Sequence[str]) -> list[NucleiTable]:
        """Return the tables of slides without those that cannot be read. InputError as in `_refuse_other_classes`."""
        tables = []
        for slide_id in slide_ids:
            try:
                table = self._source.open_table(slide_id)
                self._source.fingerprint(slide_id)
                if table.schema != table_schema(table.taxonomy, table.calibrated):
                    raise SlideError(f"{table.path}: another version of hover-batch wrote it; run the slide again")
            except SlideError as error:
                self._skip(slide_id, str(error))
                continue
            self._refuse_other_classes(table)
            tables.append(table)
        return tables

    def _write(self, there: Sequence[SlideEntry], tables: Sequence[NucleiTable]) -> None:
        """Write slides to new files, and change slides.parquet in one step.

        `there`: all slides of a file that is in the data set; it is removed then, and the rows of those that `tables`
        does not replace are copied. Tables that turn out to be corrupted are skipped.
        """
        while tables:
            new = {table.slide_id for table in tables}
            try:
                rows = self._written([entry for entry in there if entry.slide_id not in new], tables)
                break
            except _SlideFailed as error:
                self._skip(error.slide_id, error.reason)
                tables = [table for table in tables if table.slide_id != error.slide_id]
        else:
            return
        self._writer.commit(rows)
        for table in tables:
            self.result.added.append(table.slide_id)
            number = len(self.result.added)
            self._notify(f"[{number}/{self._total}] {table.slide_id}: {table.rows:,} nuclei")

    def _written(self, stored: Sequence[SlideEntry], tables: Sequence[NucleiTable]) -> pa.Table:
        """Write the files and return the rows of slides.parquet. _SlideFailed if a table is corrupted.

        `stored`: slides whose rows are copied from their file in the data set.
        """
        source, taxonomy = self._source, tables[0].taxonomy
        metadata = source.file_metadata(taxonomy)
        files: dict[str, list[str]] = {}

        def write(members: Sequence[tuple[str, str]], pieces: Iterator[pa.Table]) -> None:
            paths = write_files(self._folder, members, pieces, metadata)
            names = [path.relative_to(self._writer.root).as_posix() for path in paths]
            files.update({slide_id: names for slide_id, _ in members})

        small = [table for table in tables if 0 < table.rows < SHARED_ROWS]
        for table in tables:
            if table.rows >= SHARED_ROWS:
                write([self._member(table)], self._pieces(table))
        kept = [(entry.slide_id, entry.nuclei_sha256) for entry in stored]
        old = stored_pieces(self._writer.files_of(stored[0]), [slide_id for slide_id, _ in kept]) if stored else ()
        for group in _grouped(small, _rows(stored)):
            if kept or group:
                write([*kept, *map(self._member, group)], chain(old, *map(self._pieces, group)))
            kept, old = [], ()
        rows = [
            source.row(table.slide_id, taxonomy)
            | source.table_row(table)
            | {"nuclei_files": files.get(table.slide_id, [])}
            for table in tables
        ]
        new = rows_table(rows, source.measured(taxonomy))
        return with_rows(self._moved(stored, files), new) if stored else new

    def _moved(self, stored: Sequence[SlideEntry], files: dict[str, list[str]]) -> pa.Table:
        """Return the rows of slides that are in another file now."""
        rows = self._rows_of(stored)
        names = pa.array([files[slide_id] for slide_id in rows["slide_id"].to_pylist()], pa.list_(pa.string()))
        index = rows.schema.get_field_index("nuclei_files")
        return rows.set_column(index, rows.schema.field(index), names)

    def _member(self, table: NucleiTable) -> tuple[str, str]:
        return table.slide_id, str(self._source.done[table.slide_id]["nuclei_sha256"])

    def _pieces(self, table: NucleiTable) -> Iterator[pa.Table]:
        try:
            yield from sorted_pieces(table, self._folder)
            if not self._source.is_unchanged(table.slide_id):
                raise SlideError("was changed by its run while it was read; repeat the command when that run has ended")
        except SlideError as error:
            raise _SlideFailed(table.slide_id, str(error)) from error


def _rows(entries: Sequence[SlideEntry]) -> int:
    return sum(entry.nuclei_rows for entry in entries)


def _grouped(tables: Sequence[NucleiTable], rows: int) -> list[list[NucleiTable]]:
    """Distribute small tables over files that are full with SHARED_ROWS. `rows`: those in the first file so far."""
    groups: list[list[NucleiTable]] = [[]]
    for table in tables:
        if rows >= SHARED_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(table)
        rows += table.rows
    return groups
