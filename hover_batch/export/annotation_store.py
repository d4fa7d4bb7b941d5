"""tiatoolbox's AnnotationStore: an SQLite file with a spatial index, for its viewer and its queries.

Written by tiatoolbox's own SQLiteStore. An annotation is a nucleus's polygon in level-0 pixels of the full canvas, as
tiatoolbox counts them; its properties are the table's columns, `type` among them. Its key is the nucleus's UUID.
"""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path
from typing import Any

from hover_batch.errors import InputError
from hover_batch.export.read import NucleiTable
from hover_batch.files import replacing

_CACHE_KB = 64_000


def write_annotation_store(nuclei: NucleiTable, path: Path) -> None:
    """Write `nuclei` to `path` (.db), as a stream. OSError where the disk is full or `path` cannot be written."""
    try:
        _write(nuclei, path)
    except sqlite3.OperationalError as error:  # as the writers of other formats say it
        full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def _write(nuclei: NucleiTable, path: Path) -> None:
    from tiatoolbox.annotation.storage import Annotation

    others = ["slide_id", "nucleus_id", "type_id", "type", "touches_border", "seam_uncertain"]
    with replacing(path) as temporary:
        store = sqlite_store()(temporary, auto_commit=False)
        store.commit()
        # The file has no name yet, so nothing is lost with it; and the index wants more than SQLite's 2 MB.
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
    """tiatoolbox's SQLiteStore, made fit for writing. InputError where this Python's SQLite cannot do it.

    Python may be built without loadable extensions. SQLiteStore loads none; it asks to be allowed to before it reads
    SQLite's compile options, and fails there. Here they are read without asking.
    """
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
            # The destructor closes once more, which would open a new file where the old one was renamed.
            if self.cons:
                super().close()

    return Store


def _compile_options() -> list[str]:
    connection = sqlite3.connect(":memory:")
    try:
        return [option for (option,) in connection.execute("PRAGMA compile_options")]
    finally:
        connection.close()
