"""Read and write slides.parquet: one row per slide and model, which says what a data set holds and where."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hover_batch.bucket import BucketFolder, instead_of_url
from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.record import Url
from hover_batch.dataset.layout import SLIDES_PARQUET, DatasetLayout
from hover_batch.errors import InputError
from hover_batch.files import read_file, replacing
from hover_batch.version import __version__

VERSION = 1
"""Version of the layout and of the FIXED columns."""

_KEY = b"hover_batch_dataset"
"""Entry of the metadata that distinguishes slides.parquet from files of that name by other programs."""

FIXED = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        ("patient_id", pa.string()),
        ("group", pa.string()),
        pa.field("nuclei_files", pa.list_(pa.string()), nullable=False),
        pa.field("nuclei_rows", pa.int64(), nullable=False),
        pa.field("nuclei_sha256", pa.string(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("mpp_x", pa.float64(), nullable=False),
        pa.field("mpp_y", pa.float64(), nullable=False),
        pa.field("level0_width", pa.int64(), nullable=False),
        pa.field("level0_height", pa.int64(), nullable=False),
        pa.field("model_name", pa.string(), nullable=False),
        pa.field("model_sha256", pa.string(), nullable=False),
        pa.field("taxonomy", pa.string(), nullable=False),
        pa.field("run", pa.string(), nullable=False),
        ("run_key", pa.string()),
        pa.field("software", pa.string(), nullable=False),
        ("path", pa.string()),
        ("mask_path", pa.string()),
        ("magnification", pa.float64()),
    ]
)
"""Columns that every data set has. They are followed by those of the runs' summaries, and of their cohort CSVs as
text."""

Key = tuple[str, str]
"""slide_id and model of a row."""


@dataclass(frozen=True)
class SlideEntry:
    """Row of slides.parquet, as far as readers of the nuclei need it."""

    slide_id: str
    """Id of the slide."""
    model: str
    """Name and hash of the model, as in the folder of its nuclei."""
    patient_id: str | None
    """Patient; None if the cohort gives none."""
    group: str | None
    """Group; None if the cohort gives none."""
    nuclei_files: tuple[str, ...]
    """Paths of the files with its nuclei, relative to the data set; other slides may be in the same file. Several for a
    slide of millions of nuclei, none for one without nuclei."""
    nuclei_rows: int
    """Number of its nuclei."""
    nuclei_sha256: str
    """Hash of the run's nuclei.parquet, in hex."""
    fingerprint: str
    """Hash of the slide's content (see `hover_batch.slide.fingerprint`)."""
    mpp_x: float
    """Width of a level-0 pixel in µm."""
    mpp_y: float
    """Height of a level-0 pixel in µm."""
    level0_width: int
    """Width of the slide in level-0 pixels."""
    level0_height: int
    """Height of the slide in level-0 pixels."""
    taxonomy: str
    """Classes of the nuclei as JSON, for `Taxonomy.from_json`."""
    run: str
    """Folder of the run, absolute."""

    @property
    def key(self) -> Key:
        """Key (slide_id, model) of the row, unique in slides.parquet."""
        return self.slide_id, self.model


_ENTRY = list(SlideEntry.__dataclass_fields__)


def read_slides_table(where: Path | Url, flag: str = "") -> pa.Table:
    """Return the content of slides.parquet of a data set as a table with all its columns.

    `where`: folder or URL of the data set. `flag`: option that named it, for the message; empty if there is none.

    InputError if `where` is not a data set, the file is corrupted, or a newer version of hover-batch wrote it. If it
    cannot be read, OSError for a folder; for a bucket, InputError if access is denied, otherwise UploadError.
    """
    if isinstance(where, Url):
        content = BucketFolder(where).read([SLIDES_PARQUET]).get(SLIDES_PARQUET)
    else:
        content = read_file(where / SLIDES_PARQUET)
    if content is None:
        message = f"{flag} {where}: is not a data set; make one from a run with `hover-batch cohort OUT -o DATASET`"
        if isinstance(where, Url):
            message += f"; {instead_of_url(where)}"
        raise InputError(message.lstrip())
    return parse_slides_table(content, where, flag)


def parse_slides_table(content: bytes, where: Path | Url, flag: str = "") -> pa.Table:
    """Return `content`, the bytes of a slides.parquet, as a table without schema metadata.

    `where`: folder or URL of the data set, for messages. `flag`: option that named it; empty if there is none.

    InputError if the file is corrupted, or was written by another program or a newer version of hover-batch.
    """
    named = f"{flag} {where}".lstrip()
    try:
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            metadata = json.loads((file.schema_arrow.metadata or {}).get(_KEY, b"null"))
            if metadata is None:
                raise InputError(
                    f"{named}: its slides.parquet was written by another program; name the folder of a data set, which "
                    "`hover-batch cohort OUT -o DATASET` makes from a run"
                )
            if int(metadata["version"]) > VERSION:
                raise InputError(
                    f"{named}: is a data set of version {metadata['version']}, written by hover-batch "
                    f"{metadata['software']}; this is {__version__}, which reads version {VERSION}: update hover-batch"
                )
            table = file.read()
            if missing := [field.name for field in FIXED if field not in list(table.schema)]:
                raise ValueError(f"no column {missing[0]} of the right type")
            return table.replace_schema_metadata(None)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{named}: its slides.parquet is corrupted ({error}); remove the data set and make it again from its runs "
            "with `hover-batch cohort OUT -o DATASET`"
        ) from error


def refuse_other_files(where: Path | Url, flag: str, names: Sequence[str]) -> None:
    """Raise InputError if a folder or bucket that has no slides.parquet holds other files.

    Hidden files are ignored, such as lock files, leftovers of killed writes, and files of the desktop.

    `where`: the folder or bucket, for the message. `flag`: option that named it. `names`: names of the files in it.
    """
    names = [name for name in names if not name.startswith(".")]
    if RunLayout(Path()).run_json.name in names:
        raise InputError(f"{flag} {where}: is the folder of a run; name a new folder for the data set")
    if names:
        raise InputError(
            f"{flag} {where}: holds {min(names)} but no {SLIDES_PARQUET}, so it is not a data set; name a new folder"
        )


def read_entries(where: Path | Url, flag: str = "") -> list[SlideEntry]:
    """Return the rows of slides.parquet, sorted by model and slide_id.

    `where`: folder or URL of the data set. `flag`: option that named it, for the message; empty if there is none.

    InputError if `where` is not a data set, the file is corrupted, or a newer version of hover-batch wrote it. If it
    cannot be read, OSError for a folder; for a bucket, InputError if access is denied, otherwise UploadError.
    """
    return entries_of(read_slides_table(where, flag))


def named_files(table: pa.Table) -> set[str]:
    """Return the names, relative to the data set, of all files of nuclei that slides.parquet lists.

    `table`: content of slides.parquet.
    """
    return {name for names in table["nuclei_files"].to_pylist() for name in names}


def entries_of(table: pa.Table) -> list[SlideEntry]:
    """Return the rows of `table`, the content of slides.parquet, in the same order."""
    rows = table.select(_ENTRY).to_pylist()
    return [SlideEntry(**(row | {"nuclei_files": tuple(row["nuclei_files"])})) for row in rows]


def write_slides_table(layout: DatasetLayout, table: pa.Table) -> None:
    """Replace the slides.parquet of a data set by `table` in one step. OSError if it cannot be written."""
    metadata = {_KEY: json.dumps({"version": VERSION, "software": __version__})}
    with replacing(layout.slides_parquet) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")


def rows_table(rows: Sequence[Mapping[str, Any]], measured: pa.Schema) -> pa.Table:
    """Return rows of slides.parquet as a table with the FIXED columns first.

    `rows`: values of each row, by column. `measured`: names and types of further columns. A further column that occurs
    in no row is left out. Columns that are neither FIXED nor in `measured` are text.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    kinds = {field.name: field for field in (*measured, *FIXED)}
    others = [kinds.get(name, pa.field(name, pa.string())) for name in names if name not in FIXED.names]
    return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema([*FIXED, *others]))


def with_rows(table: pa.Table, new: pa.Table) -> pa.Table:
    """Return `table` with the rows of `new` added, sorted by model and slide_id.

    A row of `new` replaces the row of the same slide and model. Columns that only one of the tables has are null in the
    rows of the other. Names that differ in upper and lower case only are one column, spelled as in `table`. If a column
    is a number in one table and text in the other, both are kept, and the text column gets the prefix extra_.

    `table`, `new`: rows of slides.parquet.
    """
    keys = [_key_column(each) for each in (table, new)]
    kept = table.filter(pc.invert(pc.is_in(keys[0], value_set=keys[1])))
    spelled = {name.casefold(): name for name in table.column_names}
    new = new.rename_columns([spelled.get(name.casefold(), name) for name in new.column_names])
    kept, new = _without_text(kept, new), _without_text(new, kept)
    joined = pa.concat_tables([kept, new], promote_options="default")
    return joined.sort_by([("model", "ascending"), ("slide_id", "ascending")]).combine_chunks()


def _key_column(table: pa.Table) -> pa.Array:
    # Neither name may contain a slash.
    joined = pc.binary_join_element_wise(table["model"], table["slide_id"], "/")
    return joined.combine_chunks()


def _without_text(table: pa.Table, other: pa.Table) -> pa.Table:
    """Return `table` with other names for the columns of text that are numbers in `other`."""
    kinds = {field.name: field.type for field in other.schema}
    taken = {*table.column_names, *kinds}
    names = []
    for field in table.schema:
        name = field.name
        if field.type == pa.string() != kinds.get(name, pa.string()):
            while name in taken:
                name = f"extra_{name}"
        names.append(name)
    return table.rename_columns(names)
