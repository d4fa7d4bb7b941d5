"""Read the rows of a cohort's CSV: cells as text, by the known names of their columns."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hover_batch.cohort.record import Url
from hover_batch.errors import InputError

COLUMNS = ("path", "slide_id", "mpp", "magnification", "mask_path", "patient_id", "group")
RUN_COLUMNS = ("row", "status")
"""Columns that a run adds to the cohort's own in slides.csv."""
MPP_COLUMNS = ("mpp_x", "mpp_y")
"""Pixel sizes in µm along x and y, given instead of mpp if they differ. slides.csv has them as extra columns."""
MISSING = ("NA", "NaN", "nan", "#N/A", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!", "#NUM!", "#NULL!")
"""Cells that R, pandas and Excel write for missing values and failed formulas."""
_CHECKED = ("path", "slide_id", "mpp", "magnification", "mask_path", *MPP_COLUMNS)
"""Columns in which such a cell is a fault, since a value is checked and an empty cell has a meaning."""
_NEAR_MISSES = ("mpp", "mask")
"""Beginnings of extra columns that were probably meant for a known one."""
_DELIMITERS = ",;\t"
"""Excel writes semicolons where the comma is the decimal separator."""
_SEPARATOR_LINE = re.compile(rf'"?sep=[{_DELIMITERS}]?"?[{_DELIMITERS}]*(\r\n|\n|\r)', re.IGNORECASE)
"""First line that names the delimiter for Excel."""
_BLANK = r"[\s\u200b-\u200f\u202a-\u202e\u2060\ufeff]"
"""White space, and the invisible characters that come with paths and headers copied from Windows and web pages."""
_MARGINS = re.compile(f"^{_BLANK}+|{_BLANK}+$")
_ALIASES = {"wsi": "path", "slide": "path", "sample": "slide_id", "slide_mpp": "mpp"}


@dataclass(frozen=True)
class Row:
    """One row of a cohort."""

    number: int
    """Line of the CSV (the header is line 1), or position in the listing of a folder or glob."""
    cells: Mapping[str, str]
    """Filled cells by the names in COLUMNS and MPP_COLUMNS."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Cells of all columns that are not in COLUMNS, by name; "" for an empty one."""
    surplus: int = 0
    """Number of filled cells beyond the header's last column."""

    @property
    def label(self) -> str:
        """Name of the slide in messages: its slide_id or, if it has none, its path; "" if the row has neither.

        Credentials in a URL are redacted.
        """
        path = self.cells.get("path", "")
        return self.cells.get("slide_id") or str(Url.of(path) or path)


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """Return the rows of the CSV file `path`, in order, and warnings for the user.

    The first record is the header. The aliases wsi and slide stand for path, sample for slide_id, and slide_mpp for
    mpp. Columns named row or status become cohort_row and cohort_status, because a run writes columns of these names.
    Cells are separated by commas, semicolons or tabs. White space and invisible characters around them are removed.
    Rows without a filled cell are skipped. Cells in MISSING are read as empty, with a warning, except in _CHECKED:
    slides whose patient is missing are not slides of one patient named NA. The content of cells is not checked.

    InputError if the file is empty, is not UTF-8 or not CSV, has no column path, has two columns that mean the same, or
    has no rows; OSError if it cannot be read.
    """
    lines = _csv_records(path)
    _, header = next(lines, (0, []))
    if not header:
        raise InputError(f"{path}: is empty; the first line must name the columns, at least path")
    names, warnings = _column_names(path, header)
    rows = []
    unnamed_is_filled = False
    missing: dict[str, int] = {}
    marks: set[str] = set()
    for number, cells in lines:
        surplus = sum(1 for cell in cells[len(names) :] if cell)
        filled = {name: cell for name, cell in zip(names, cells, strict=False) if cell}
        for name in [name for name, cell in filled.items() if cell in MISSING and name not in _CHECKED]:
            marks.add(filled.pop(name))
            missing[name] = missing.get(name, 0) + 1
        unnamed_is_filled = unnamed_is_filled or "" in filled
        known = {name: filled[name] for name in (*COLUMNS, *MPP_COLUMNS) if name in filled}
        extra = {name: filled.get(name, "") for name in names if name and name not in COLUMNS}
        rows.append(Row(number, known, extra, surplus))
    if not rows:
        raise InputError(f"{path}: has a header but no slides; add a line for each slide")
    if unnamed_is_filled:
        warnings.append(f"{path}: a column without a name is ignored")
    if named := {name: count for name, count in missing.items() if name}:
        warnings.append(
            f"{path}: cells with {', '.join(sorted(marks))} are read as empty: "
            f"{', '.join(f'{count} in column {name}' for name, count in named.items())}; if this is a value, write it "
            "in another way"
        )
    return rows, warnings


def is_spreadsheet(content: bytes) -> bool:
    """Return whether `content`, the first bytes of a file, is of an Excel or LibreOffice workbook or a ZIP archive."""
    return content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0"))


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which it begins, stripped cells) of each record with a filled cell."""
    content = path.read_bytes()
    if is_spreadsheet(content):
        raise InputError(f"{path}: is a spreadsheet or an archive, not a CSV; save the table as CSV UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fault = (
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as CSV UTF-8 or, if it is a "
            "slide such as a DICOM file, give its folder"
        )
        raise InputError(fault) from error
    if "\0" in text:
        raise InputError(f"{path}: is not a CSV, it holds zero bytes; save it as CSV UTF-8")
    separator = _SEPARATOR_LINE.match(text)
    body = text[separator.end() :] if separator else text
    # strict: otherwise one stray quotation mark would swallow the rows that follow.
    reader = csv.reader(io.StringIO(body, newline=""), strict=True, delimiter=_delimiter(body))
    while True:
        # A quoted cell may span lines, so the line where a record ends is not its row.
        number = reader.line_num + (2 if separator else 1)
        try:
            cells = [_MARGINS.sub("", cell) for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            fault = f"{path}: the record from line {number} on is not CSV ({error}); check its quotes"
            raise InputError(fault) from error
        if any(cells):
            yield number, cells


def _delimiter(text: str) -> str:
    """Return the delimiter with which the header has a column `path`; a comma if none has it."""
    header = next((line for line in text.splitlines() if line.strip(_DELIMITERS)), "")
    names = {mark: [_plain(cell.strip('"')) for cell in header.split(mark)] for mark in _DELIMITERS}
    return next((mark for mark in _DELIMITERS if "path" in names[mark]), ",")


def _plain(cell: str) -> str:
    """Return the name of a column in lower case, with aliases resolved."""
    name = "_".join(cell.lower().replace("-", " ").split())
    return _ALIASES.get(name, name)


def _column_names(path: Path, header: list[str]) -> tuple[list[str], list[str]]:
    """Return the header with aliases resolved, extra columns as written, "" for unnamed ones; and warnings."""
    written: dict[str, str] = {}
    names, faults, warnings = [], [], []
    for cell in header:
        name = _plain(cell)
        renamed = name in RUN_COLUMNS
        if renamed:
            name = f"cohort_{name}"
            warnings.append(f"{path}: column {cell} becomes {name}, since the run writes a column {cell} itself")
        if name and name in written:
            faults.append(f"columns {written[name]} and {cell} both mean {name}: keep one")
        written[name] = cell
        known = renamed or name in COLUMNS or name in MPP_COLUMNS
        if not known and name.startswith(_NEAR_MISSES):
            near = [column for column in (*COLUMNS, *MPP_COLUMNS) if column[:3] == name[:3]]
            warnings.append(f"{path}: column {cell} is not used, only copied to results; known are {', '.join(near)}")
        names.append(name if known else cell)
    if "path" not in written:
        faults.append(f"no column path (or wsi, slide) among {', '.join(header)}")
        if len(header) == 1 and "|" in header[0]:
            faults.append("columns must be separated by commas, semicolons or tabs")
    if faults:
        raise InputError(f"{path}: " + "; ".join(faults))
    return names, warnings
