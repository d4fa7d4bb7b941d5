"""Read a cohort from a CSV, a folder or a glob, and collect all faults of all rows.

Slides are not opened here: `hover_batch.plan` checks their headers.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hover_batch.cohort.csv_rows import MPP_COLUMNS, Row, read_rows
from hover_batch.cohort.near_name import near_name
from hover_batch.cohort.record import SLIDE_SUFFIXES, SlideRecord, Url, is_dicom_folder, looks_like_slide
from hover_batch.cohort.slide_id import fault_in, fold, suggest
from hover_batch.errors import InputError
from hover_batch.files import load_json
from hover_batch.formatting import counted, encoding_fault
from hover_batch.geometry import Mpp

_MASK_SUFFIXES = (".geojson", ".geojson.gz", ".json", ".json.gz", ".zip", ".png")
_DECIMAL_COMMA = re.compile(r"(?![1-9]\d{0,2},\d{3}$)\d+,\d+")
"""Digits on both sides of a comma that does not separate thousands."""
_LOCAL_URI = re.compile(r"(file|local)://(localhost(?=/))?", re.IGNORECASE)
"""Beginning of a URI that names a file on this machine."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class RowFault:
    """One fault of one row."""

    row: int
    """Line of the CSV (the header is line 1), or position in the listing of a folder or glob."""
    slide_id_or_path: str
    """Name of the slide in messages (see `Row.label`)."""
    message: str
    """What is wrong, and what to do."""


@dataclass(frozen=True)
class Cohort:
    """Slides of a CSV, folder or glob, and the faults of its rows."""

    source: str
    """Absolute path or glob that was read."""
    records: tuple[SlideRecord, ...]
    """Valid rows, in the source's order."""
    faults: tuple[RowFault, ...]
    """All faults of all rows."""
    warnings: tuple[str, ...]
    """Sentences for the user."""


def read_cohort(source: str | Path) -> Cohort:
    """Read the cohort in `source`: a CSV, a folder of slides, a glob pattern, or a single slide.

    Faults of rows are collected in the result, not raised. Relative paths in a CSV are relative to its folder. A slide
    on disk must be a readable file, or a folder with a DICOM file; its content is not checked. Slides at URLs are not
    checked. Masks must be JSON or PNG, as their suffixes say; they are not compared with their slides.

    InputError if no rows can be read: the source is an empty name or a URL, does not exist, cannot be read, is not a
    CSV, has an invalid or ambiguous header, or lists no slides.
    """
    if not str(source).strip():
        raise InputError("the cohort is an empty name: give a CSV, a folder of slides or a quoted glob")
    path = Path(source)
    try:
        if path.is_dir():
            rows, warnings = _list_folder(path)
        elif path.is_file() and path.suffix.lower() not in SLIDE_SUFFIXES:
            rows, warnings = read_rows(path)
        elif path.exists() or glob.has_magic(str(source)):
            entries = [path] if path.exists() else [Path(name) for name in glob.glob(str(source), recursive=True)]
            rows, warnings = _as_rows(entries, str(source))
        elif url := Url.of(str(source)):
            raise InputError(f"{url}: a URL is not read as a cohort; write it in the column path of a CSV")
        else:
            raise InputError(f"{source}: no such CSV, folder or slide{near_name(path.absolute(), Path().absolute())}")
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from error
    base = path.parent if path.is_file() else Path()  # paths in a CSV are relative to its folder
    return _check(str(path.absolute()), rows, base.absolute(), warnings)


def one_slide(path: str | Path, mpp: float | None = None, slide_id: str | None = None) -> Cohort:
    """Return a cohort of one slide, checked like a row of a CSV.

    `path`: path or URL of the slide; a relative path is relative to the working directory. `mpp`: pixel size of level 0
    in µm; None to use the file's. `slide_id`: id of the slide; None to use the stem of the file's name or the name of
    the folder.

    InputError if the slide has a fault; the message contains all its faults.
    """
    cells = {"path": str(path), "mpp": "" if mpp is None else str(mpp), "slide_id": slide_id or ""}
    row = Row(1, {name: cell for name, cell in cells.items() if cell})
    cohort = _check(str(path), [row], Path().absolute(), [])
    if cohort.faults:
        raise InputError("; ".join(fault.message for fault in cohort.faults))
    return cohort


def raise_if_faulty(cohort: Cohort) -> None:
    """Raise InputError if the cohort has faults.

    The message has a line for each fault and each warning, and the remedy.
    """
    if not cohort.faults:
        return
    lines = [f"{cohort.source}: {counted(len(cohort.faults), 'fault')}, nothing was run"]
    lines += [
        f"  row {fault.row}{f' ({fault.slide_id_or_path})' if fault.slide_id_or_path else ''}: {fault.message}"
        for fault in cohort.faults
    ]
    lines += [f"  warning: {warning}" for warning in cohort.warnings]
    lines.append(
        "Correct these rows (for a folder or glob: list its slides in a CSV), or skip them with --skip-invalid."
    )
    raise InputError("\n".join(lines))


# Folders and globs


def _list_folder(folder: Path) -> tuple[list[Row], list[str]]:
    entries = list(folder.iterdir())
    if not any(looks_like_slide(entry) for entry in entries) and is_dicom_folder(folder):
        entries = [folder]
    return _as_rows(entries, str(folder))


def _as_rows(entries: Iterable[Path], source: str) -> tuple[list[Row], list[str]]:
    # Hidden files are not reported: macOS leaves a "._a.svs" beside each a.svs on other file systems.
    entries = sorted(entry for entry in entries if not entry.name.startswith("."))
    slides = dict.fromkeys(entry for entry in entries if looks_like_slide(entry))
    if not slides:
        raise InputError(
            f"{source}: no slide found; looked for {' '.join(sorted(SLIDE_SUFFIXES))} and DICOM folders, "
            "not in subfolders; other files can be listed in a CSV"
        )
    companions = {slide.with_suffix("") for slide in slides if slide.suffix.lower() == ".mrxs"}
    others = [entry for entry in entries if entry not in slides and entry not in companions]
    warnings = []
    if others:
        names = ", ".join(entry.name for entry in others[:3]) + (", …" if len(others) > 3 else "")
        warnings.append(f"{source}: skipped {len(others)} that do not look like slides: {names}")
    rows = [Row(number, {"path": str(slide.absolute())}) for number, slide in enumerate(slides, start=1)]
    return rows, warnings


# Rows


def _check(source: str, rows: list[Row], base: Path, warnings: list[str]) -> Cohort:
    taken = {fold(slide_id) for row in rows if (slide_id := _slide_id(row, base))}
    first_with_id: dict[str, int] = {}
    first_with_file: dict[str, int] = {}
    records, faults = [], []
    for row in rows:
        messages: list[str] = []
        path = _location(row.cells["path"], base) if "path" in row.cells else None
        faults_of_path = (
            [f"path {path}: {fault}" for fault in _faults_of_slide(path, base)] if path else ["path is empty"]
        )
        messages += faults_of_path
        slide_id = _slide_id(row, base)
        # The id of a mistyped Windows path is as wrong as the path.
        if slide_id and ("slide_id" in row.cells or not (faults_of_path and "\\" in slide_id)):
            if fault := _fault_of_id(row, slide_id, first_with_id, taken):
                messages.append(fault)
            first_with_id.setdefault(fold(slide_id), row.number)
        mpp = _mpp(row, messages)
        magnification = _magnification(row, messages)
        mask_path = _location(row.cells["mask_path"], base) if "mask_path" in row.cells else None
        if isinstance(mask_path, Url):
            messages.append(
                f"mask_path {mask_path}: a mask is not read from a URL; copy it to a disk and give its path"
            )
        elif mask_path:
            messages += [f"mask_path {mask_path}: {fault}" for fault in _faults_of_mask(mask_path, base)]
        if row.surplus:
            messages.append(f"has {row.surplus} more cells than the header; a cell with a comma needs quotes")
        if messages or path is None or isinstance(mask_path, Url):
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
    if local := _LOCAL_URI.match(cell):
        return base / cell[local.end() :]
    return Url.of(cell) or base / cell


def _slide_id(row: Row, base: Path) -> str:
    """Return the slide_id as given, else the file's stem or the folder's name; "" if there is no path either."""
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


def _fault_of_id(row: Row, slide_id: str, first_with_id: Mapping[str, int], taken: set[str]) -> str | None:
    """Return the fault of an id, with a suggestion that then counts as taken; None if the id is valid."""
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


def _faults_of_slide(path: Path | Url, base: Path) -> list[str]:
    if isinstance(path, Url):  # `plan` asks for all such slides at once whether they exist
        if "::" in path.text:
            return ["chained URLs (::) are not supported; name the slide itself"]
        if path.has_unsupported_query:
            return [f"has a ?, which {path.protocol}:// URLs may not have; remove the query, or rename the file"]
        return []
    if fault := encoding_fault(str(path)):
        return [fault]
    try:
        if path.is_dir():
            return [] if is_dicom_folder(path) else ["is a folder without DICOM files; give the slide's own file"]
        if path.exists() and not path.is_file():  # opening a pipe would block
            return ["is not a regular file"]
        with open(path, "rb"):
            return []
    except FileNotFoundError:
        return [f"no such file{near_name(path, base)}"]
    except OSError as error:
        return [f"cannot be read ({error.strerror})"]


def _faults_of_mask(path: Path, base: Path) -> list[str]:
    """Return the faults of a mask: unreadable, or not of the kind that its suffix says. `plan` checks its content."""
    name = path.name.lower()
    if not name.endswith(_MASK_SUFFIXES):
        return [f"unknown kind of mask; known are {', '.join(_MASK_SUFFIXES)}"]
    try:
        if name.endswith(".png"):
            with open(path, "rb") as file:
                return (
                    []
                    if file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE
                    else ["is not a PNG image; save it again as PNG"]
                )
        return [] if isinstance(load_json(path), dict | list) else ["is not GeoJSON; export it again"]
    except (ValueError, RecursionError) as error:
        return [f"is not JSON ({error}); export it again as GeoJSON"]
    except FileNotFoundError:
        return [f"no such file{near_name(path, base)}"]
    except OSError as error:
        return [f"cannot be read ({error.strerror})"]


def _mpp(row: Row, messages: list[str]) -> Mpp | None:
    """Return the pixel size in the column mpp, or in mpp_x and mpp_y together."""
    both = [name for name in MPP_COLUMNS if name in row.cells]
    sizes = [_size(row, name, messages) for name in (["mpp"] if "mpp" in row.cells else []) + both]
    if len(both) == 1:
        messages.append(f"{both[0]} is given alone: fill mpp_x and mpp_y, or mpp")
        return None
    found = [size for size in sizes if size is not None]
    if len(found) < len(sizes) or not found:
        return None
    if len(found) == 3 and len(set(found)) > 1:
        messages.append(
            f"mpp {found[0]:g} and mpp_x, mpp_y {found[1]:g}, {found[2]:g} differ: keep mpp, or both others"
        )
        return None
    return Mpp(found[-2] if both else found[0], found[-1])


def _size(row: Row, name: str, messages: list[str]) -> float | None:
    value = _number(row.cells[name])
    try:
        return Mpp(value, value).x
    except ValueError:
        messages.append(f"{name} {row.cells[name]!r}: write the pixel size in µm as a number, for example 0.25")
        return None


def _magnification(row: Row, messages: list[str]) -> float | None:
    if "magnification" not in row.cells:
        return None
    value = _number(row.cells["magnification"])
    if 0 < value < 1000:
        return value
    messages.append(f"magnification {row.cells['magnification']!r}: write the objective's power, for example 40")
    return None


def _number(text: str) -> float:
    """Parse a number with a decimal point or comma.

    NaN if it is not a number, is ambiguous such as 1,250, or is written as 0_25, which float would read as 25.
    """
    if _DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
