"""Open a data set for questions in SQL, with a DuckDB connection that reads its files and no others.

Of a data set in a bucket, only the ranges of bytes that a query needs are read.

A query can neither write a file, load an extension nor change a setting.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import duckdb
import pyarrow as pa
import shapely

from hover_batch.bucket import BucketFolder
from hover_batch.cohort.record import Url
from hover_batch.dataset.bucket_files import BucketFiles
from hover_batch.dataset.clinical import load_clinical
from hover_batch.dataset.quoting import identifier, text, text_list
from hover_batch.dataset.slides import SlideEntry, entries_of, read_slides_table
from hover_batch.errors import DISK_FULL, HoverBatchError, InputError
from hover_batch.formatting import listed
from hover_batch.geometry import Box
from hover_batch.nuclei.table import table_schema
from hover_batch.taxonomy import Taxonomy

if TYPE_CHECKING:
    import pandas as pd


PATIENT = "patient_id"
"""Column by which a clinical table is joined if no other is given."""


@contextlib.contextmanager
def query_errors() -> Iterator[None]:
    """Convert DuckDB's errors in the block to InputError with the reason.

    If a signal interrupted a query, KeyboardInterrupt is raised instead. Other exceptions pass through.
    """
    try:
        yield
    except duckdb.PermissionException as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the query failed: it can only read nuclei, slides and, with --join, clinical ({reason})"
        ) from error
    except duckdb.IOException as error:
        raise InputError(
            f"the query failed: {error}\nIf a command has changed the data set in the meantime, repeat this one; "
            "otherwise make the data set again with `hover-batch cohort OUT -o DATASET`"
        ) from error
    except (duckdb.Error, pa.ArrowException) as error:
        raise InputError(f"the query failed: {_reason(error)}") from error
    except RuntimeError as error:
        if "interrupted" not in str(error):
            raise
        raise KeyboardInterrupt from error


def _reason(error: Exception) -> str:
    """Return the message of an error, without the traceback that DuckDB adds to errors of `BucketFiles`."""
    if "Table with name clinical does not exist" in str(error):
        return "there is no table clinical; give one with --join FILE.csv (in Python, the argument `clinical`)"
    raised = str(error).rpartition(f"\n{HoverBatchError.__module__}.")[2]
    return raised.partition(": ")[2] if str(error).startswith("Traceback") else str(error)


class Dataset:
    """Data set that is open for questions. Use it in a `with` block, or call `close`.

    `connection`: DuckDB connection, which shows the data set as it was when it was opened, as

    - `nuclei`: one row per nucleus, with the columns of nuclei.parquet and `model`
    - `slides`: one row per slide and model, with the columns of slides.parquet
    - `clinical`: the rows of the table `clinical`, if one is given

    `entries`: slides, one entry per slide and model. `on`: column by which `clinical` is joined; None without it.
    `notes`: what to know about the answers, such as patients without a row in `clinical`.

    `root`: folder of the data set, or its URL in cloud storage. `clinical`: CSV or Parquet file with one row per value
    of its column `on`, a column of `slides`. InputError if `root` is not a data set or holds no slides, a file of
    nuclei on disk was removed, replaced or corrupted, `clinical` cannot be joined, or no temporary file can be written;
    OSError if a file may not be read; UploadError if a bucket cannot be reached.
    """

    def __init__(self, root: Path | Url, clinical: Path | None = None, on: str = PATIENT) -> None:
        if clinical is None and on != PATIENT:
            raise InputError(
                f"{on}: is the column to join a table by, and no table is given; add --join FILE, or leave out --on "
                "(in Python, the arguments `clinical` and `on`)"
            )
        self.root = root if isinstance(root, Url) else root.absolute()
        slides = read_slides_table(self.root)
        self.entries: list[SlideEntry] = entries_of(slides)
        if not self.entries:
            raise InputError(f"{root}: holds no slides yet; add a run with `hover-batch cohort OUT -o DATASET`")
        self.notes: list[str] = []
        self.on = None if clinical is None else on
        self._scratch = _scratch_folder()
        self.connection = duckdb.connect(
            config={
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "python_enable_replacements": False,
                "temp_directory": self._scratch.name,
            }
        )
        self._files = BucketFiles(BucketFolder(root)) if isinstance(root, Url) else None
        try:
            if self._files:
                self.connection.register_filesystem(self._files)
            self.create_table("slides", slides)
            self._check_files()
            self.execute(f"CREATE VIEW nuclei AS {self._nuclei(self.entries)}")
            if clinical is not None:
                self.notes += load_clinical(self.connection, clinical, on, slides)
            self._lock()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection to DuckDB, and remove its temporary files.

        Relations that `select` returned can no longer be read.
        """
        self.connection.close()
        self._scratch.cleanup()

    def sql(self, query: str) -> pd.DataFrame:
        """Run a SELECT and return its result as a DataFrame. Geometries become shapely polygons in level-0 pixels.

        Other statements, such as CREATE TEMP TABLE, can be run with `connection.execute`.

        InputError if `query` is not exactly one SELECT, names a table or column that does not exist, or fails;
        KeyboardInterrupt if a signal interrupts it.
        """
        with query_errors():
            return _frame(self.select(query))

    def select(self, query: str) -> duckdb.DuckDBPyRelation:
        """Return a SELECT as a DuckDB relation. The query runs each time that the relation is read.

        Sums of integers are BIGINT (64 bits), not DuckDB's HUGEINT (128 bits). Read the relation inside `query_errors`,
        which converts the errors of the query.

        InputError if `query` is not exactly one SELECT, or names a table or column that does not exist.
        """
        if not isinstance(query, str):
            raise InputError(f"query {query!r}: must be a str, not {type(query).__name__}")
        query = query.strip().rstrip(";")
        if not query.isascii() and any("\ud800" <= letter <= "\udfff" for letter in query):
            raise InputError("the query has bytes that are not UTF-8; write it in a UTF-8 terminal or file")
        with query_errors():
            kinds = [statement.type for statement in self.connection.extract_statements(query)]
            if kinds != [duckdb.StatementType.SELECT]:
                raise InputError(
                    "the query must be one SELECT, since a data set is only read; to write its result to a file, give "
                    "-o FILE.csv or -o FILE.parquet"
                )
            # In parentheses, DuckDB refuses a WITH clause that writes, such as WITH x AS (COPY … TO …).
            relation = self.connection.sql(f"FROM ({query}\n)")
        return cast(relation, {"HUGEINT": "BIGINT"}.get)

    def window(self, slide_id: str, box: Box | Sequence[float], model: str | None = None) -> pd.DataFrame:
        """Return the nuclei of a slide whose bounding boxes overlap `box`, ordered by nucleus_id.

        The result has the same columns as a table from `load_nuclei`, with `slide_id` and `type` as categories. Nuclei
        whose bounding boxes only touch the box are left out.

        `slide_id`: slide of the nuclei. `box`: (x0, y0, x1, y1) in level-0 pixels. `model`: model whose nuclei are
        returned, by its name with or without the hash; None if the data set holds only one.

        InputError if the slide is not in the data set, `box` is no box, `model` does not name exactly one model in the
        data set, or a file cannot be read; KeyboardInterrupt if a signal interrupts the query.
        """
        model = chosen_model(self.entries, model)
        entries = [entry for entry in self.entries if (entry.slide_id, entry.model) == (slide_id, model)]
        if not entries:
            known = [entry.slide_id for entry in self.entries if entry.model == model]
            raise InputError(f"{slide_id}: is not a slide of {self.root}; its slides: {listed(known)}")
        x0, y0, x1, y1 = (f"{text(value)}::DOUBLE" for value in _corners(box))
        with query_errors():
            frame = _frame(
                self.connection.sql(
                    f"SELECT * EXCLUDE (model, bbox) FROM ({self._nuclei(entries)}) WHERE slide_id = {text(slide_id)} "
                    f"AND bbox.xmax > {x0} AND bbox.xmin < {x1} AND bbox.ymax > {y0} AND bbox.ymin < {y1} "
                    "ORDER BY nucleus_id"
                )
            )
        return frame.astype(dict.fromkeys(("slide_id", "type"), "category"))

    @contextlib.contextmanager
    def narrowed(self, entries: Sequence[SlideEntry]) -> Iterator[None]:
        """Limit the view `nuclei` to the nuclei in the files of `entries` while the block runs.

        Other slides in the same files are included. Blocks cannot be nested.

        `entries`: rows of slides.parquet.

        InputError if a file cannot be read, KeyboardInterrupt if a signal interrupts the statement.
        """
        self.execute(f"CREATE TEMP VIEW nuclei AS {self._nuclei(entries)}")
        try:
            yield
        finally:
            self.execute("DROP VIEW temp.nuclei")

    def execute(self, statement: str) -> None:
        """Run an SQL statement that hover-batch generates and whose result is not needed.

        InputError if it fails, KeyboardInterrupt if a signal interrupts it.
        """
        with query_errors():
            self.connection.execute(statement).fetchall()

    def create_table(self, name: str, rows: pa.Table) -> None:
        """Create the table `name` from `rows` in memory. An existing table of this name is replaced.

        `name`: a plain SQL identifier, since it is not quoted. InputError if the table cannot be created.
        """
        self.connection.register("given", rows)
        self.execute(f"CREATE OR REPLACE TABLE {name} AS FROM given")
        self.connection.unregister("given")

    def _nuclei(self, entries: Sequence[SlideEntry]) -> str:
        """Return the SELECT of all nuclei in the files of `entries`."""
        files: dict[str, dict[str, None]] = {}
        for entry in entries:
            files.setdefault(entry.model, {}).update(dict.fromkeys(entry.nuclei_files))
        # All files of a model have the same columns, so DuckDB needs to read the schema of one only.
        parts = [
            f"SELECT {text(model)} AS model, * FROM read_parquet({text_list(map(self._path, names))}, "
            "hive_partitioning = false)"
            for model, names in files.items()
            if names
        ]
        if not parts:  # no slide has nuclei
            taxonomy = Taxonomy.from_json(json.loads(entries[0].taxonomy))
            self.create_table("no_nuclei", table_schema(taxonomy).empty_table())
            parts = [f"SELECT {text(entries[0].model)} AS model, * FROM no_nuclei"]
        return " UNION ALL BY NAME ".join(parts)

    def _path(self, name: str) -> str:
        """Return the path of a file of the data set for DuckDB."""
        return self._files.path(name) if self._files else f"{self.root}/{name}"

    def _check_files(self) -> None:
        """Raise InputError if files of nuclei on disk are corrupted, or do not have the rows of their slides.

        PermissionError if one may not be read.
        """
        if self._files or not self._paths:  # in a bucket, that would be a request for each file
            return
        described: Counter[tuple[str, ...]] = Counter()
        for entry in self.entries:
            described[entry.nuclei_files] += entry.nuclei_rows
        fault = None
        try:
            query = f"SELECT file_name, num_rows FROM parquet_file_metadata({self._paths})"
            rows_of = dict(self.connection.execute(query).fetchall())
        except duckdb.Error as error:
            fault = str(error).splitlines()[0]
            self._require_access()
        else:
            for names, rows in described.items():
                if (found := sum(rows_of.get(self._path(name), 0) for name in names)) != rows:
                    fault = f"{', '.join(names)}: has {found:,} nuclei instead of {rows:,}"
        if fault:
            raise InputError(
                f"{self.root}: a file of nuclei was removed or replaced ({fault}). If a command has changed the "
                "data set in the meantime, repeat this one; otherwise make the data set again with `hover-batch cohort "
                "OUT -o DATASET`"
            )

    def _require_access(self) -> None:
        """Raise PermissionError if a file of nuclei may not be read."""
        for entry in self.entries:
            for name in entry.nuclei_files:
                with contextlib.suppress(FileNotFoundError), open(self._path(name), "rb"):
                    pass

    @property
    def _paths(self) -> str:
        """All files of nuclei as a list in SQL; empty if there are none."""
        names = dict.fromkeys(name for entry in self.entries for name in entry.nuclei_files)
        return text_list(map(self._path, names)) if names else ""

    def _lock(self) -> None:
        """Deny access to all files but those of the data set, and changes of settings."""
        self.execute(f"SET allowed_paths = {self._paths or '[]'}")
        self.execute("SET enable_external_access = false")
        self.execute("SET lock_configuration = true")


def _scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Create a folder for DuckDB's temporary files. InputError if none can be written."""
    try:
        return tempfile.TemporaryDirectory(prefix="hover-batch-query-")
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(
            f"temporary files of the query cannot be written ({error}); set TMPDIR to a folder that can be written"
        ) from error


def _corners(box: Box | Sequence[float]) -> tuple[float, float, float, float]:
    """Return (x0, y0, x1, y1). InputError if `box` is no box: a wrong one would hold no nuclei, without an error."""
    try:
        if isinstance(box, str):
            raise TypeError  # each letter would be a number
        x0, y0, x1, y1 = map(float, (box.x0, box.y0, box.x1, box.y1) if isinstance(box, Box) else box)
    except (TypeError, ValueError, OverflowError):
        x0 = y0 = x1 = y1 = math.nan
    if not (x0 < x1 and y0 < y1):
        raise InputError(
            f"box {box!r}: must be four numbers (x0, y0, x1, y1) in level-0 pixels, the upper left corner and the "
            "lower right one, with x0 < x1 and y0 < y1"
        )
    return x0, y0, x1, y1


def chosen_model(entries: Sequence[SlideEntry], model: str | None) -> str:
    """Return the value in the column `model` of the model that the user means.

    `entries`: rows of slides.parquet. `model`: value in the column, or the model's name without the hash; None if there
    is only one model.

    InputError if no model or more than one fits.
    """
    known = dict.fromkeys(entry.model for entry in entries)
    fits = [name for name in known if model in (None, name, name.rpartition("-")[0])]
    if len(fits) == 1:
        return fits[0]
    if model is None:
        what = "the data set holds nuclei of several models"
    else:
        what = f"model {model}: " + ("several models have this name" if fits else "is not one of the data set's models")
    raise InputError(f"{what}; give --model (in Python, the argument `model`), one of {listed(fits or known)}")


def cast(relation: duckdb.DuckDBPyRelation, new_type: Callable[[str], str | None]) -> duckdb.DuckDBPyRelation:
    """Return the relation with some of its columns cast to other types.

    `new_type`: function that returns the new SQL type of a column, given its present one, such as HUGEINT; None to keep
    it.
    """
    names = map(identifier, relation.columns)
    types = [new_type(str(kind)) for kind in relation.types]
    if not any(types):
        return relation
    columns = zip(names, types, strict=True)
    return relation.project(", ".join(f"CAST({name} AS {to}) AS {name}" if to else name for name, to in columns))


def _frame(relation: duckdb.DuckDBPyRelation) -> pd.DataFrame:
    frame: pd.DataFrame = relation.to_arrow_table().to_pandas()
    for name, kind in zip(relation.columns, relation.types, strict=True):
        if str(kind).startswith("GEOMETRY"):
            of_lists = str(kind).endswith("[]")
            frame[name] = frame[name].map(shapely.from_wkb) if of_lists else shapely.from_wkb(frame[name].to_numpy())
    return frame
