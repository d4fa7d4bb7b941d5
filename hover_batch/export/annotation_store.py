"""Write tiatoolbox's AnnotationStore: an SQLite file with a spatial index, for its viewer and queries.

tiatoolbox's own SQLiteStore writes it. An annotation is the polygon of a nucleus, in level-0 pixels of the full canvas,
which tiatoolbox uses too; its properties are the table's columns, `type` among them, and its key the nucleus's UUID.
"""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path
from typing import Any

from hover_batch.errors import InputError
from hover_batch.export.read import NucleiTable
from hover_batch.files import replacing
from hover_batch.tiatoolbox_import import importing_tiatoolbox

_CACHE_KB = 64_000
"""Size in KB of SQLite's page cache while the store is written."""


def write_annotation_store(nuclei: NucleiTable, path: Path) -> None:
    """Write the table `nuclei` to `path` (.db) as tiatoolbox's AnnotationStore, batch by batch.

    Each nucleus is an annotation with its UUID as key and its polygon in level-0 pixels. Its properties are slide_id,
    nucleus_id, type_id, type, touches_border, seam_uncertain, and the finite values of the table's float32 columns. An
    existing file is replaced only when all is written.

    OSError if `path` cannot be written (`errno` is ENOSPC if the disk is full), SlideError if the table is corrupted,
    InputError if this Python's SQLite lacks the R*Tree index.
    """
    try:
        _write(nuclei, path)
    except sqlite3.OperationalError as error:  # the writers of other formats raise OSError, too
        disk_full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
        raise OSError(errno.ENOSPC if disk_full else errno.EIO, str(error)) from error


def _write(nuclei: NucleiTable, path: Path) -> None:
    """Write the store; sqlite3.OperationalError if the disk is full or the file cannot be written."""
    with importing_tiatoolbox():
        from tiatoolbox.annotation.storage import Annotation

    others = ["slide_id", "nucleus_id", "type_id", "type", "touches_border", "seam_uncertain"]
    with replacing(path) as temporary:
        store = sqlite_store()(temporary, auto_commit=False)
        store.commit()
        # The file is renamed only once it is complete, so it needs no journal; the index needs more cache than 2 MB.
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KB}"):
            store.con.execute(f"PRAGMA {setting}")
        for batch in nuclei.batches():
            properties = zip(batch.select(others).to_pylist(), nuclei.measurements(batch), strict=True)
            annotations = [
                Annotation(polygon, named | measured)
                for polygon, (named, measured) in zip(nuclei.polygons(batch), properties, strict=True)
            ]
            store.append_many(annotations, nuclei.uuids(batch))
        store.commit()
        store.close()


def sqlite_store() -> Any:
    """Return a subclass of tiatoolbox's SQLiteStore for writing.

    SQLiteStore enables loadable extensions before it reads SQLite's compile options, although it loads none. It
    therefore fails in a Python that was built without them. The subclass reads the options without enabling extensions,
    and may be closed twice.

    InputError if this Python's SQLite lacks the R*Tree index.
    """
    with importing_tiatoolbox():
        from tiatoolbox.annotation.storage import SQLiteStore

    options = _compile_options()
    if "ENABLE_RTREE" not in options:
        raise InputError(
            "--to annotation-store: this Python's SQLite has no R*Tree index; use a Python from conda or uv, or leave "
            "this format out"
        )

    class Store(SQLiteStore):  # type: ignore[misc]
        @staticmethod
        def compile_options() -> list[str]:
            return options

        def close(self) -> None:
            # The destructor closes again, which would create a new file under the temporary name.
            if self.cons:
                super().close()

    return Store


def _compile_options() -> list[str]:
    """Return the compile options of this Python's SQLite."""
    connection = sqlite3.connect(":memory:")
    try:
        return [option for (option,) in connection.execute("PRAGMA compile_options")]
    finally:
        connection.close()
