"""Read a cohort from a CSV, a folder or a glob, and collect all faults of all rows.

Slides are not opened here: `hover_batch.plan` checks their headers.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.cohort.slide_id import fault_in, fold, suggest
from hover_batch.errors import InputError
from hover_batch.formatting import counted
from hover_batch.geometry import Mpp

COLUMNS = ("path", "slide_id", "mpp", "magnification", "mask_path", "patient_id", "group")
RUN_COLUMNS = ("row", "status")
"""Columns of slides.csv that a run adds to the cohort's own."""
_ALIASES = {"wsi": "path", "slide": "path", "sample": "slide_id", "slide_mpp": "mpp"}

_SLIDE_SUFFIXES = frozenset(
    ".svs .tif .tiff .ndpi .mrxs .scn .bif .svslide .vms .vmu .qptiff .png .jpg .jpeg".split()  # noqa: SIM905
)
_MASK_SUFFIXES = (".geojson", ".json", ".png")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class RowFault:
    """One fault of one row. `row`: line of the CSV (the header is line 1) or position in the listing."""

    row: int
    slide_id_or_path: str
    message: str


@dataclass(frozen=True)
class Cohort:
    """Slides of a source. `records`: the rows without a fault, in the source's order."""

    source: str
    records: tuple[SlideRecord, ...]
    faults: tuple[RowFault, ...]
    warnings: tuple[str, ...]


def read_cohort(source: str | Path) -> Cohort:
    """Read a CSV, a folder of slides, a glob, or a single slide.

    Faults of rows are collected, not raised. InputError where there are no rows: the source does not exist, is not a
    CSV, has a wrong or ambiguous header, or lists nothing.
    """
    if not str(source).strip():
        raise InputError("the cohort is an empty name: give a CSV, a folder of slides or a quoted glob")
    path = Path(source)
    try:
        if path.is_dir():
            rows, warnings = _list_folder(path)
        elif path.is_file() and path.suffix.lower() not in _SLIDE_SUFFIXES:
            rows, warnings = _parse_csv(path)
        elif path.exists() or glob.has_magic(str(source)):
            found = [path] if path.exists() else [Path(p) for p in glob.glob(str(source), recursive=True)]
            rows, warnings = _as_rows(found, str(source))
        else:
            raise InputError(f"{source}: no such CSV, folder or slide")
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from error
    base = path.parent if path.is_file() else Path()
    return _check(str(path.absolute()), rows, base.absolute(), warnings)


def one_slide(path: str | Path, mpp: float | None = None, slide_id: str | None = None) -> Cohort:
    """Return a cohort of one slide, checked like a row of a CSV. InputError where it has a fault."""
    cells = {"path": str(path), "mpp": "" if mpp is None else str(mpp), "slide_id": slide_id or ""}
    row = _Row(1, {name: cell for name, cell in cells.items() if cell})
    cohort = _check(str(path), [row], Path().absolute(), [])
    if cohort.faults:
        raise InputError("; ".join(fault.message for fault in cohort.faults))
    return cohort


def raise_if_faulty(cohort: Cohort) -> None:
    """Raise InputError if there are faults, with a line for each and the remedy."""
    if not cohort.faults:
        return
    lines = [f"{cohort.source}: {counted(len(cohort.faults), 'fault')}, nothing was run"]
    lines += [
        f"  row {fault.row}{f' ({fault.slide_id_or_path})' if fault.slide_id_or_path else ''}: {fault.message}"
        for fault in cohort.faults
    ]
    lines.append(
        "Correct these rows (for a folder or glob: list its slides in a CSV), or leave them out with --skip-invalid."
    )
    raise InputError("\n".join(lines))


@dataclass(frozen=True)
class _Row:
    """Cells as written, under the names in COLUMNS; empty cells are left out."""

    number: int
    cells: Mapping[str, str]
    extra: Mapping[str, str] = field(default_factory=dict)
    surplus: int = 0
    """Filled cells beyond the header's last column."""

    @property
    def label(self) -> str:
        path = self.cells.get("path", "")
        return self.cells.get("slide_id") or str(Url.of(path) or path)


# Folders and globs


def _list_folder(folder: Path) -> tuple[list[_Row], list[str]]:
    entries = list(folder.iterdir())
    if not any(_looks_like_slide(entry) for entry in entries) and _is_dicom_folder(folder):
        entries = [folder]
    return _as_rows(entries, str(folder))


def _as_rows(entries: Iterable[Path], source: str) -> tuple[list[_Row], list[str]]:
    # Hidden files are not reported: macOS leaves a "._a.svs" beside each a.svs on other file systems.
    entries = sorted(entry for entry in entries if not entry.name.startswith("."))
    slides = dict.fromkeys(entry for entry in entries if _looks_like_slide(entry))
    if not slides:
        raise InputError(
            f"{source}: no slide found; looked for {' '.join(sorted(_SLIDE_SUFFIXES))} and DICOM folders, "
            "not in deeper folders; other files can be listed in a CSV"
        )
    companions = {slide.with_suffix("") for slide in slides if slide.suffix.lower() == ".mrxs"}
    others = [entry for entry in entries if entry not in slides and entry not in companions]
    warnings = []
    if others:
        names = ", ".join(entry.name for entry in others[:3]) + (", …" if len(others) > 3 else "")
        warnings.append(f"{source}: left out {len(others)} that are no slides by their names: {names}")
    rows = [_Row(number, {"path": str(slide.absolute())}) for number, slide in enumerate(slides, start=1)]
    return rows, warnings


def _looks_like_slide(path: Path) -> bool:
    try:
        return _is_dicom_folder(path) if path.is_dir() else path.suffix.lower() in _SLIDE_SUFFIXES
    except PermissionError:  # a folder of another user, such as lost+found
        return False


def _is_dicom_folder(path: Path) -> bool:
    return any(entry.suffix.lower() == ".dcm" for entry in path.iterdir())


# CSV


def _parse_csv(path: Path) -> tuple[list[_Row], list[str]]:
    lines = _csv_records(path)
    _, header = next(lines, (0, []))
    if not header:
        raise InputError(f"{path}: is empty; its first line names the columns, at least path")
    names, warnings = _column_names(path, header)
    rows = []
    unnamed = False
    for number, cells in lines:
        surplus = sum(1 for cell in cells[len(names) :] if cell)
        filled = {name: cell for name, cell in zip(names, cells, strict=False) if cell}
        unnamed |= "" in filled
        known = {name: filled[name] for name in COLUMNS if name in filled}
        extra = {name: filled.get(name, "") for name in names if name and name not in COLUMNS}
        rows.append(_Row(number, known, extra, surplus))
    if not rows:
        raise InputError(f"{path}: has a header but no slides; add a line for each slide")
    if unnamed:
        warnings.append(f"{path}: a column without a name is left out")
    return rows, warnings


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, stripped cells) of each record; empty records are skipped."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fault = f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as CSV UTF-8"
        raise InputError(fault) from error
    if "\0" in text:
        raise InputError(f"{path}: is not a CSV, it holds zero bytes; save it as CSV UTF-8")
    # strict: else a stray quotation mark would swallow the rows after it.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        # A quoted cell may span lines, so the line where a record ends is not its row.
        number = reader.line_num + 1
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            fault = f"{path}: the record from line {number} on is not CSV ({error}); check its quotes"
            raise InputError(fault) from error
        if any(cells):
            yield number, cells


def _column_names(path: Path, header: list[str]) -> tuple[list[str], list[str]]:
    """Return the header with aliases resolved, extra columns as written and "" for unnamed ones; and warnings."""
    written: dict[str, str] = {}
    names, faults, warnings = [], [], []
    for cell in header:
        plain = "_".join(cell.lower().replace("-", " ").split())
        name = _ALIASES.get(plain, plain)
        if name in RUN_COLUMNS:
            name = f"cohort_{name}"
            warnings.append(f"{path}: column {cell} becomes {name}, since the run writes a column {cell} itself")
        if name and name in written:
            faults.append(f"columns {written[name]} and {cell} both mean {name}: keep one")
        written[name] = cell
        names.append(cell if name == plain and name not in COLUMNS else name)
    if "path" not in written:
        faults.append(f"no column path (or wsi, slide) among {', '.join(header)}")
        if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
            faults.append("columns must be separated by commas")
    if faults:
        raise InputError(f"{path}: " + "; ".join(faults))
    return names, warnings


# Rows


def _check(source: str, rows: list[_Row], base: Path, warnings: list[str]) -> Cohort:
    taken = {fold(slide_id) for row in rows if (slide_id := _slide_id(row, base))}
    first_with_id: dict[str, int] = {}
    first_with_file: dict[str, int] = {}
    records, faults = [], []
    for row in rows:
        messages: list[str] = []
        path = _location(row.cells["path"], base) if "path" in row.cells else None
        messages += [f"path {path}: {fault}" for fault in _faults_of_slide(path)] if path else ["path is empty"]
        slide_id = _slide_id(row, base)
        if slide_id:
            if fault := _fault_of_id(row, slide_id, first_with_id, taken):
                messages.append(fault)
            first_with_id.setdefault(fold(slide_id), row.number)
        mpp = _mpp(row, messages)
        magnification = _magnification(row, messages)
        mask_path = base / row.cells["mask_path"] if "mask_path" in row.cells else None
        if mask_path:
            messages += [f"mask_path {mask_path}: {fault}" for fault in _faults_of_mask(mask_path)]
        if row.surplus:
            messages.append(f"has {row.surplus} more cells than the header; a cell with a comma needs quotes")
        if messages or path is None:
            faults += [RowFault(row.number, row.label, message) for message in messages]
            continue
        place = path.text if isinstance(path, Url) else os.path.realpath(path)
        same = first_with_file.setdefault(place, row.number)
        if same != row.number:
            warnings.append(f"row {row.number} ({slide_id}) is the same slide as row {same}")
        records.append(
            SlideRecord(
                slide_id=slide_id,
                path=path,
                row=row.number,
                mpp=mpp,
                magnification=magnification,
                mask_path=mask_path,
                patient_id=row.cells.get("patient_id"),
                group=row.cells.get("group"),
                extra=MappingProxyType(dict(row.extra)),
            )
        )
    return Cohort(source, tuple(records), tuple(faults), tuple(warnings))


def _location(cell: str, base: Path) -> Path | Url:
    url = Url.of(cell)
    if url is None or url.protocol in ("file", "local"):
        return base / cell.split("://", 1)[-1]
    return url


def _slide_id(row: _Row, base: Path) -> str:
    """Return the slide_id as given; else the file's stem or the folder's name; "" where there is no path either."""
    if "slide_id" in row.cells:
        return row.cells["slide_id"]
    if "path" not in row.cells:
        return ""
    path = _location(row.cells["path"], base)
    if isinstance(path, Url):
        return path.stem
    try:
        return path.name if path.is_dir() else path.stem
    except OSError:  # reported as the path's own fault
        return path.stem


def _fault_of_id(row: _Row, slide_id: str, first_with_id: Mapping[str, int], taken: set[str]) -> str | None:
    """Return the fault of the id with a suggestion, which counts as taken from then on; None for a good id."""
    given = "slide_id" in row.cells
    if fault := fault_in(slide_id):
        reason, near = f"slide_id {slide_id!r} {fault}", slide_id
    elif (first := first_with_id.get(fold(slide_id))) is not None:
        reason = f"slide_id {slide_id!r} is also that of row {first} (upper and lower case count as the same)"
        # Slides of the same name are usually in folders of different names.
        near = slide_id if given else f"{Path(row.cells['path']).parent.name}-{slide_id}"
    else:
        return None
    remedy = suggest(near, taken)
    taken.add(fold(remedy))
    return f"{reason}; {'use' if given else 'give it a slide_id,'} for example {remedy}"


def _faults_of_slide(path: Path | Url) -> list[str]:
    if isinstance(path, Url):  # `plan` asks for all such slides at once whether they exist
        return ["chained URLs (::) are not read; name the slide itself"] if "::" in path.text else []
    try:
        str(path).encode()
        if path.is_dir():
            return [] if _is_dicom_folder(path) else ["is a folder without DICOM files (*.dcm)"]
        if path.exists() and not path.is_file():  # opening a pipe would block
            return ["is no file"]
        with open(path, "rb"):
            return []
    except UnicodeEncodeError:
        return ["its name is not UTF-8; rename it"]
    except FileNotFoundError:
        return ["no such file"]
    except OSError as error:
        return [f"cannot be read ({error.strerror})"]


def _faults_of_mask(path: Path) -> list[str]:
    """Return the faults of a mask: unreadable, or not of the kind of its suffix. Its content is checked later."""
    suffix = path.suffix.lower()
    if suffix not in _MASK_SUFFIXES:
        return [f"masks are {', '.join(_MASK_SUFFIXES)}"]
    try:
        if suffix == ".png":
            with open(path, "rb") as file:
                return [] if file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE else ["is no PNG image"]
        return [] if isinstance(json.loads(path.read_bytes()), dict | list) else ["is no GeoJSON"]
    except (ValueError, RecursionError):
        return ["is no JSON"]
    except FileNotFoundError:
        return ["no such file"]
    except OSError as error:
        return [f"cannot be read ({error.strerror})"]


def _mpp(row: _Row, messages: list[str]) -> Mpp | None:
    if "mpp" not in row.cells:
        return None
    value = _number(row.cells["mpp"])
    try:
        return Mpp(value, value)
    except ValueError:
        messages.append(f"mpp {row.cells['mpp']!r}: write the pixel size in µm as a number, for example 0.25")
        return None


def _magnification(row: _Row, messages: list[str]) -> float | None:
    if "magnification" not in row.cells:
        return None
    value = _number(row.cells["magnification"])
    if 0 < value < 1000:
        return value
    messages.append(f"magnification {row.cells['magnification']!r}: write the objective's power, for example 40")
    return None


def _number(text: str) -> float:
    """Parse a number as people write them; NaN for others: float would read 0_25 as 25."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
