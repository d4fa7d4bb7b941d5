"""Data set in a folder that is open for writing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa

from hover_batch.cohort.run_lock import locked
from hover_batch.dataset.layout import DatasetLayout
from hover_batch.dataset.slides import FIXED, named_files, read_slides_table, refuse_other_files, write_slides_table
from hover_batch.errors import DISK_FULL, InputError
from hover_batch.files import nearest_existing, remove_leftovers


def check_folder(folder: Path, flag: str) -> None:
    """Check, without writing, that the folder has a data set, or that one can be created.

    `flag`: option or argument that the message names.

    InputError if the folder holds files but no data set, has a data set that this version cannot change, or cannot be
    created or written; OSError if it cannot be read.
    """
    layout = DatasetLayout(folder)
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise InputError(f"{flag} {folder}: {existing} is not a folder; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"{flag} {folder}: {existing} cannot be written; name another folder, or change its permissions"
        )
    if layout.slides_parquet.is_file():
        read_slides_table(folder, flag)
    elif layout.root.is_dir():
        refuse_other_files(folder, flag, [entry.name for entry in layout.root.iterdir()])


@contextmanager
def open_folder(folder: Path, flag: str) -> Iterator[FolderStorage]:
    """Open the data set in a folder, or create it, and lock it for the duration of the block.

    Files of nuclei that slides.parquet does not name, and temporary files, are removed.

    `folder`: folder of the data set. `flag`: option or argument that named it, for messages.

    InputError if the folder holds files but no data set, has a data set that this version cannot change, cannot be
    written, or is locked by another command; OSError if the disk is full or the folder cannot be read.
    """
    check_folder(folder, flag)
    layout = DatasetLayout(folder)
    with ExitStack() as lock:
        try:
            layout.root.mkdir(parents=True, exist_ok=True)
            lock.enter_context(locked(layout.lock, flag))
            if not layout.slides_parquet.is_file():
                # The first file, which marks the folder as a data set.
                write_slides_table(layout, FIXED.empty_table())
            storage = FolderStorage(layout, read_slides_table(folder, flag))
            storage.sweep()
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise InputError(
                f"{flag} {layout.root}: cannot be written ({error.strerror or error}); name another folder"
            ) from error
        yield storage


class FolderStorage:
    """Folder of a data set that is open for writing (see `hover_batch.dataset.writer.Storage`)."""

    def __init__(self, layout: DatasetLayout, table: pa.Table) -> None:
        self._layout = layout
        self.where = self.root = layout.root
        self.table = table

    def sweep(self) -> None:
        """Remove temporary files, and files of nuclei that slides.parquet does not name; the user's other files stay.

        OSError if a file cannot be removed.
        """
        remove_leftovers(self._layout.slides_parquet)
        named = {self.root / name for name in named_files(self.table)}
        for folder in self._layout.nuclei.glob("model=*"):
            for path in [*folder.glob(".sort.*"), *folder.glob(".*.partial"), *folder.glob("*.parquet")]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path not in named:
                    path.unlink()

    def holds(self, names: Collection[str]) -> bool:
        """Return whether all files in `names`, which are relative to the data set, exist."""
        return all((self.root / name).is_file() for name in names)

    def fetch(self, names: Collection[str]) -> list[Path]:
        """Return the paths of the files `names`, which are relative to the data set, in order."""
        return [self.root / name for name in names]

    def add(self, names: Collection[str]) -> None:
        """Do nothing, because new files are written directly to the folder of the data set."""

    def replace_table(self, table: pa.Table) -> None:
        """Replace slides.parquet by `table` in one step. OSError if it cannot be written."""
        write_slides_table(self._layout, table)

    def remove(self, names: Collection[str]) -> None:
        """Remove the files `names`; files that do not exist are ignored. OSError if one cannot be removed."""
        for name in names:
            (self.root / name).unlink(missing_ok=True)
