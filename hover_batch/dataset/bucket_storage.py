"""Data set in a bucket that is open for writing.

New files are written to a temporary folder on disk, and uploaded before the slides.parquet that names them, which the
storage replaces in one step. Storage has no locks, so a second writer is detected only by its changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pyarrow as pa

from hover_batch.bucket import BucketFolder, retried, upload_tree
from hover_batch.cohort.record import Url
from hover_batch.dataset.layout import SLIDES_PARQUET, DatasetLayout
from hover_batch.dataset.slides import FIXED, named_files, parse_slides_table, refuse_other_files, write_slides_table
from hover_batch.errors import InputError

KEPT_FOR = timedelta(days=1)
"""Age above which files that slides.parquet does not name are removed; another command may be uploading newer ones."""


def check_bucket(url: Url, flag: str) -> None:
    """Check that the bucket has a data set at `url`, or that one can be created.

    A small test file is written and removed. `flag`: option or argument that the message names.

    InputError if the folder at `url` holds files but no data set, cannot be written, or has a data set that this
    version cannot change; UploadError if it cannot be read.
    """
    folder = BucketFolder(url)
    folder.check_writable()
    _stored(folder, flag)


@contextmanager
def open_bucket(url: Url, flag: str) -> Iterator[BucketStorage]:
    """Open the data set in a bucket, or create it, for the duration of the block.

    Files of nuclei that slides.parquet does not name, and that are older than KEPT_FOR, are removed. New files are
    first written to a temporary folder, which is removed when the block ends.

    `url`: folder of the data set. `flag`: option or argument that named it, for messages.

    InputError if the folder holds files but no data set, access is denied, or it has a data set that this version
    cannot change; UploadError if the bucket cannot be read or written.
    """
    folder = BucketFolder(url)
    with tempfile.TemporaryDirectory(prefix="hover-batch-upload-") as staging:
        storage = BucketStorage(folder, DatasetLayout(Path(staging)), _stored(folder, flag))
        storage.sweep()
        yield storage


def _stored(folder: BucketFolder, flag: str) -> bytes | None:
    """Return the content of slides.parquet; None if the folder is empty.

    InputError if the folder holds anything but a data set.
    """
    content = retried(lambda: folder.read([SLIDES_PARQUET])).get(SLIDES_PARQUET)
    if content is None:
        refuse_other_files(folder.url, flag, retried(folder.names))
    else:
        parse_slides_table(content, folder.url, flag)
    return content


class BucketStorage:
    """Bucket with a data set that is open for writing (see `hover_batch.dataset.writer.Storage`)."""

    def __init__(self, folder: BucketFolder, layout: DatasetLayout, content: bytes | None) -> None:
        """`layout`: paths in a temporary folder. `content`: that of slides.parquet; None to create the data set."""
        self._folder, self._layout, self._content = folder, layout, content
        self.where, self.root = folder.url, layout.root
        if content is None:  # the first file, which marks the folder as a data set
            content = self._put_table(FIXED.empty_table())
        self.table = parse_slides_table(content, folder.url)
        self._files: set[str] = set()
        """Names of the files of the data set that exist."""

    def sweep(self) -> None:
        """Read from the bucket which files of the data set exist, for `holds`, and remove old files that none needs.

        Those are files of nuclei that are older than KEPT_FOR and not named in slides.parquet. Call it before `holds`.

        InputError if access is denied, UploadError if the bucket cannot be read or changed.
        """
        found, named = set(retried(self._folder.names)), named_files(self.table)
        self._files = found & named
        others = [name for name in found - named if name.startswith("nuclei/model=") and name.endswith(".parquet")]
        limit = datetime.now(UTC) - KEPT_FOR
        self.remove([name for name in others if retried(partial(self._folder.modified, name)) < limit])

    def holds(self, names: Collection[str]) -> bool:
        """Return whether all files in `names`, which are relative to the data set, exist in the bucket.

        The answer comes from the list that `sweep` made and later changes through this object; the bucket is not asked.
        """
        return self._files.issuperset(names)

    def fetch(self, names: Collection[str]) -> list[Path]:
        """Download the files `names` of the data set to the temporary folder, and return their paths, in order.

        InputError if a file is missing or access is denied, UploadError if the bucket cannot be read, OSError if the
        disk is full.
        """
        paths = [self.root / name for name in names]
        for name, path in zip(names, paths, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            retried(partial(self._folder.fetch, name, path))
        return paths

    def add(self, names: Collection[str]) -> None:
        """Upload files from the temporary folder and remove them there. Files that the bucket already has are skipped.

        `names`: names relative to the data set and to the temporary folder.

        InputError if access is denied, UploadError if a file cannot be uploaded.
        """
        new = {name: self.root / name for name in names if name not in self._files}
        upload_tree(new, self._folder)
        self._files.update(new)
        for path in new.values():
            path.unlink()

    def replace_table(self, table: pa.Table) -> None:
        """Replace slides.parquet by `table` in one step. The new file is first written to the temporary folder.

        InputError if another command has changed slides.parquet since it was opened, or access is denied; UploadError
        if it cannot be read or written; OSError if the disk is full.
        """
        if retried(lambda: self._folder.read([SLIDES_PARQUET])).get(SLIDES_PARQUET) != self._content:
            raise InputError(
                f"{self.where}: another command has changed this data set; wait until it ends, and repeat this one"
            )
        self._put_table(table)

    def _put_table(self, table: pa.Table) -> bytes:
        """Write slides.parquet, and return its content."""
        path = self._layout.slides_parquet
        write_slides_table(self._layout, table)
        upload_tree({SLIDES_PARQUET: path}, self._folder)
        self._content = path.read_bytes()
        return self._content

    def remove(self, names: Collection[str]) -> None:
        """Remove the files `names` and their local copies; files that do not exist are ignored.

        InputError if access is denied, UploadError if the bucket cannot be changed.
        """
        retried(lambda: self._folder.remove(self._folder.entries(names)))
        self._files.difference_update(names)
        for name in names:
            (self.root / name).unlink(missing_ok=True)
