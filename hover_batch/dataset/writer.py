"""Open a data set for writing, in a folder or a bucket, and replace rows of it in single steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from hover_batch.cohort.record import Url
from hover_batch.dataset.bucket_storage import BucketStorage, check_bucket, open_bucket
from hover_batch.dataset.folder_storage import FolderStorage, check_folder, open_folder
from hover_batch.dataset.slides import SlideEntry, entries_of, named_files, with_rows

Storage = BucketStorage | FolderStorage
"""Place of a data set that is open for writing. Names of files are relative to the data set."""


def check_place(where: Path | Url, flag: str) -> None:
    """Check that the folder or bucket has a data set, or that one can be created.

    A small test file is written to a bucket and removed; nothing is written to a folder.

    `where`: the folder or URL. `flag`: option or argument that the message names.

    InputError if the place holds files but no data set, is a bucket that cannot be written, or has a data set that this
    version cannot change. If it cannot be read, OSError for a folder, UploadError for a bucket.
    """
    if isinstance(where, Url):
        check_bucket(where, flag)
    else:
        check_folder(where, flag)


@contextmanager
def open_writer(where: Path | Url, flag: str) -> Iterator[DatasetWriter]:
    """Open the data set in a folder or a bucket for writing while the block runs. A folder is locked meanwhile.

    The data set is created if it does not exist. Files of nuclei that slides.parquet does not name are removed, since a
    killed writer left them behind; in a bucket, only those older than a day.

    `where`: folder or URL of the data set. `flag`: option that named it, for messages.

    InputError if the place holds files but no data set, has a data set that this version cannot change, or cannot be
    written, or if another command is writing in the folder. OSError if the disk is full or the folder cannot be read,
    UploadError if the bucket cannot be reached.
    """
    with open_bucket(where, flag) if isinstance(where, Url) else open_folder(where, flag) as storage:
        yield DatasetWriter(storage)


class DatasetWriter:
    """Writer of a data set, from `open_writer`.

    `where`: folder or URL of the data set. `root`: folder on disk in which new files are written, under their names in
    the data set. `table`: content of slides.parquet as a table, one row per slide and model.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.where: Path | Url = storage.where
        self.root, self.table = storage.root, storage.table

    def entries(self, model: str) -> dict[str, SlideEntry]:
        """Return the rows of slides.parquet of one model, by slide_id. `model`: result of `model_key`."""
        return {entry.slide_id: entry for entry in entries_of(self.table) if entry.model == model}

    def holds(self, entry: SlideEntry) -> bool:
        """Return whether the data set has all files of nuclei of a slide. `entry`: its row of slides.parquet."""
        return self._storage.holds(entry.nuclei_files)

    def files_of(self, entry: SlideEntry) -> list[Path]:
        """Return the paths on disk of the files of nuclei of a slide, in order. Files in a bucket are downloaded first.

        `entry`: the slide's row of slides.parquet.

        InputError if a file in a bucket is missing or access is denied, UploadError if the bucket cannot be read,
        OSError if the disk is full.
        """
        return self._storage.fetch(entry.nuclei_files)

    def commit(self, rows: pa.Table) -> None:
        """Add rows to slides.parquet in one step, and remove files of nuclei that it no longer names.

        Rows of the same slide and model are replaced. The files that the rows name must be complete. All slides of a
        file must be replaced together, or none. If nothing changes, slides.parquet is not written. If it cannot be
        written, its content is unchanged.

        `rows`: rows of slides.parquet, from `rows_table`.

        In a folder, OSError if slides.parquet cannot be written or a file cannot be removed. In a bucket, UploadError
        if a request fails, InputError if access is denied or another command has changed the data set, OSError if the
        disk for temporary files is full.
        """
        before, table = named_files(self.table), with_rows(self.table, rows)
        self._storage.add(named_files(rows))
        if table.equals(self.table):
            return
        self._storage.replace_table(table)
        self.table = table
        self._storage.remove(before - named_files(table))
