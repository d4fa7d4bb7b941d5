"""Write the files of nuclei of a data set, in bounded memory.

A slide's nuclei are sorted along a Hilbert curve, so that those of a field are in few row groups. The sort needs four
bytes per nucleus; the rows are distributed to one temporary file per row group, and each is then sorted by itself.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hover_batch.dataset.hilbert import hilbert_index
from hover_batch.errors import InputError
from hover_batch.export.read import NucleiTable
from hover_batch.files import replacing
from hover_batch.nuclei.geoparquet import WriteGroup, geoparquet_writer

ROW_GROUP = 50_000
"""Maximum number of rows per row group. Larger ones make readers of a window read more rows that they do not need;
smaller ones save little on disk and cost DuckDB more time per group."""

FILE_ROWS = 4_000_000
"""Maximum number of rows per file, less than 1 GB."""


def sorted_pieces(table: NucleiTable, scratch: Path) -> Iterator[pa.Table]:
    """Yield a slide's nuclei along a Hilbert curve, in tables of about equal length and at most about ROW_GROUP rows.

    If the slide has more nuclei than ROW_GROUP, they are first distributed to temporary files, which are removed at the
    end.

    `table`: table of the slide. `scratch`: folder for the temporary files. Its disk needs space for the uncompressed
    table.

    SlideError if the table is corrupted, OSError if a temporary file cannot be written.
    """
    count = -(-table.rows // ROW_GROUP)
    if count <= 1:
        batches = list(table.batches())
        if batches:
            yield _sorted(pa.Table.from_batches(batches), table)
        return
    indices = np.empty(table.rows, np.uint32)
    at = 0
    for batch in table.batches(["centroid_x", "centroid_y"]):
        indices[at : at + len(batch)] = _indices(batch, table)
        at += len(batch)
    indices.sort()
    # The first index of each piece but the first; nuclei with equal indices are in the same piece.
    starts = indices[np.linspace(0, table.rows, count + 1)[1:-1].astype(np.int64)]
    del indices
    with tempfile.TemporaryDirectory(prefix=".sort.", dir=scratch) as folder:
        paths = [Path(folder) / str(number) for number in range(count)]
        with ExitStack() as files:
            schema = table.schema
            writers = [files.enter_context(pa.ipc.new_file(str(path), schema)) for path in paths]
            for batch in table.batches():
                piece_of = np.searchsorted(starts, _indices(batch, table), side="right")
                for piece in np.unique(piece_of):
                    writers[piece].write_batch(batch.filter(pa.array(piece_of == piece)))
        for path in paths:
            with pa.ipc.open_file(str(path)) as file:
                rows = file.read_all()
            path.unlink()
            if len(rows):
                yield _sorted(rows, table)


def _indices(rows: pa.RecordBatch | pa.Table, table: NucleiTable) -> NDArray[np.uint32]:
    x, y = (rows[name].to_numpy() for name in ("centroid_x", "centroid_y"))
    return hilbert_index(x, y, table.level0.width, table.level0.height)


def _sorted(rows: pa.Table, table: NucleiTable) -> pa.Table:
    """Return the rows along the Hilbert curve; those with equal indices stay in order of nucleus_id."""
    return rows.take(pa.array(np.argsort(_indices(rows, table), kind="stable"))).combine_chunks()


def stored_pieces(paths: Iterable[Path], slide_ids: Iterable[str]) -> Iterator[pa.Table]:
    """Yield the rows of some slides from files of nuclei, one row group at a time and in order.

    `paths`: files of nuclei of a data set. `slide_ids`: slides whose rows are wanted.

    InputError if a file is missing or corrupted.
    """
    wanted = pa.array(list(slide_ids), pa.string())
    for path in paths:
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                for number in range(file.num_row_groups):
                    rows = file.read_row_group(number)
                    rows = rows.filter(pc.is_in(rows["slide_id"], value_set=wanted)).combine_chunks()
                    if len(rows):
                        yield rows.replace_schema_metadata(None)
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{path}: is missing or corrupted ({error}); remove the data set and make it again from its runs"
            ) from error


def write_files(
    folder: Path, members: Sequence[tuple[str, str]], pieces: Iterable[pa.Table], metadata: dict[str, Any]
) -> list[Path]:
    """Write tables to one file, or to several if there are more than FILE_ROWS rows. Return their paths.

    Existing files of the same names are replaced.

    `folder`: folder of the model. `members`: slide_id and hash of the table of each slide in the file. They determine
    the name, so that files with other nuclei have other names. `pieces`: tables of at most about ROW_GROUP rows, in the
    order in which they are written; short ones share a row group. `metadata`: JSON values for the entry `hover_batch`
    of the file's metadata.

    OSError if a file cannot be written; errors of `pieces` propagate. In both cases, complete files may stay behind.
    """
    digest = hashlib.sha256("\n".join(f"{slide_id} {sha256}" for slide_id, sha256 in members).encode()).hexdigest()
    stem = f"{members[0][0]}-{digest[:16]}"
    paths: list[Path] = []
    rows = 0
    with ExitStack() as file:
        write: WriteGroup | None = None
        for group in _groups(pieces):
            if write is None or rows + len(group) > FILE_ROWS:
                file.close()
                paths.append(folder / (f"{stem}.parquet" if not paths else f"{stem}-{len(paths) + 1}.parquet"))
                temporary = file.enter_context(replacing(paths[-1]))
                write = file.enter_context(geoparquet_writer(temporary, group.schema, metadata))
                rows = 0
            write(group)
            rows += len(group)
    return paths


def _groups(pieces: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join consecutive pieces to row groups of at most ROW_GROUP rows, with one chunk per column."""
    waiting: list[pa.Table] = []
    count = 0
    for piece in pieces:
        if waiting and count + len(piece) > ROW_GROUP:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting, count = [], 0
        waiting.append(piece)
        count += len(piece)
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()
