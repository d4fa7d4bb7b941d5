"""Open a data set for writing, and replace rows of it in single steps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.run_lock import lock
from hover_batch.dataset.layout import DatasetLayout
from hover_batch.dataset.slides import (
    FIXED,
    SlideEntry,
    entries_of,
    read_slides_table,
    with_rows,
    write_slides_table,
)
from hover_batch.errors import DISK_FULL, InputError
from hover_batch.files import remove_leftovers


def check_folder(layout: DatasetLayout, flag: str) -> None:
    """Check that a data set is in the folder or can be made there; nothing is written.

    InputError if the folder holds anything else, or a data set that this version cannot change.
    """
    if layout.slides_parquet.is_file():
        read_slides_table(layout, flag)
    elif layout.root.is_dir():
        # Hidden files do not count: our lock, leftovers of killed writes, or made by desktops.
        others = sorted(entry.name for entry in layout.root.iterdir() if not entry.name.startswith("."))
        if RunLayout(layout.root).run_json.name in others:
            raise InputError(f"{flag} {layout.root}: is the folder of a run; name a new folder for the data set")
        if others:
            raise InputError(
                f"{flag} {layout.root}: holds {others[0]} but no slides.parquet, so it is not a data set; name a new "
                "folder"
            )


class DatasetWriter:
    """Writer of a data set. Use it in a `with` block, which locks the folder until it ends.

    Entering it creates the data set if it does not exist, and removes files that slides.parquet does not name, which a
    killed writer left behind. `flag`: option that named the folder, for messages.

    InputError as in `check_folder`, or if another command is writing there or the folder cannot be written.
    """

    def __init__(self, layout: DatasetLayout, flag: str) -> None:
        self.layout = layout
        self._flag = flag
        self._lock: int | None = None
        self._table = FIXED.empty_table()

    def __enter__(self) -> Self:
        layout = self.layout
        check_folder(layout, self._flag)
        try:
            layout.root.mkdir(parents=True, exist_ok=True)
            self._lock = lock(layout.lock, self._flag)
            try:
                if layout.slides_parquet.is_file():
                    self._table = read_slides_table(layout, self._flag)
                else:  # the first file, so that the folder counts as a data set from now on
                    write_slides_table(layout, self._table)
                self._sweep()
            except BaseException:
                self._close()
                raise
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise InputError(
                f"{self._flag} {layout.root}: cannot be written ({error.strerror or error}); name another folder"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _sweep(self) -> None:
        """Remove files of nuclei that slides.parquet does not name, and temporary ones; a user's other files stay."""
        remove_leftovers(self.layout.slides_parquet)
        named = self._named()
        for folder in self.layout.nuclei.glob("model=*"):
            for path in [*folder.glob(".sort.*"), *folder.glob(".*.partial"), *folder.glob("*.parquet")]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path not in named:
                    path.unlink()

    def _named(self) -> set[Path]:
        """Return the files that slides.parquet names."""
        return {self.layout.root / name for names in self._table["nuclei_files"].to_pylist() for name in names}

    @property
    def table(self) -> pa.Table:
        """Content of slides.parquet."""
        return self._table

    def entries(self, model: str) -> dict[str, SlideEntry]:
        """Return the slides of a model by slide_id."""
        return {entry.slide_id: entry for entry in entries_of(self._table) if entry.model == model}

    def files_of(self, entry: SlideEntry) -> list[Path]:
        """Return the files with the nuclei of a slide."""
        return [self.layout.root / name for name in entry.nuclei_files]

    def commit(self, rows: pa.Table) -> None:
        """Add rows to slides.parquet, or replace those of the same slide and model, and remove files no longer named.

        The files that the rows name must be complete. All slides of a file must be replaced together, or none. Nothing
        is written if nothing changes. OSError if slides.parquet cannot be written; then the data set is unchanged.
        """
        before, table = self._named(), with_rows(self._table, rows)
        if table.equals(self._table):
            return
        write_slides_table(self.layout, table)
        self._table = table
        for path in before - self._named():
            path.unlink(missing_ok=True)
