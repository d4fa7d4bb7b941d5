"""Export a run's tables of nuclei to the formats of other tools."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hover_batch.cohort.layout import Format, RunLayout, SlideLayout
from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.cohort.run_folder import nuclei_if_done, read_slides, require_run, why_not_done
from hover_batch.errors import DISK_FULL, InputError, SlideError, exit_code
from hover_batch.export.read import NucleiTable
from hover_batch.files import sweeping
from hover_batch.formatting import duration, listed
from hover_batch.slide.headers import peek
from hover_batch.slide.survey import read_info

Write = Callable[[NucleiTable, Path], None]
"""Writer of a format: it replaces the file or folder at the path atomically (`files.replacing`)."""
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    files: tuple[Path, ...]
    """Files that were written, in order."""
    skipped: dict[str, str]
    """Reason why a slide was skipped, by slide_id."""

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0 all exported, 3 some slides skipped, 4 nothing exported."""
        return exit_code(len(self.files), len(self.skipped))


def export_run(
    folder: Path, formats: Sequence[Format], output: Path | None, slide_ids: Sequence[str], notify: Notify
) -> Exported:
    """Export the tables of the run in `folder` to each of `formats`. Return the files written and the skipped slides.

    Existing files are replaced. Slides that are not done, or whose table cannot be read, are skipped.

    `output`: folder for files named SLIDE_ID.suffix, created if it does not exist; None writes each file next to its
    table. `slide_ids`: the slides to export; empty for all. `notify`: function that is called with a line about each
    file and each skipped slide.

    InputError if the folder holds no run, its run.json or slides.csv is corrupted, a slide is not in it, a format needs
    a package that is not installed, or a file cannot be written. OSError if the disk is full, or a file of the run
    cannot be read.
    """
    layout = RunLayout(folder)
    require_run(layout)
    slides = _chosen(layout, slide_ids)
    if not slides:
        notify(f"{layout.slides_csv}: no slide is listed yet; repeat the segment command")
    writers = {format: writer(format) for format in dict.fromkeys(formats)}
    files: list[Path] = []
    skipped: dict[str, str] = {}
    for number, record in enumerate(slides, start=1):
        label = f"[{number}/{len(slides)}] {record.slide_id}"
        try:
            for line in _export_slide(record, layout.slide(record.slide_id), writers, output, files):
                notify(f"{label}: {line}")
        except SlideError as error:
            skipped[record.slide_id] = str(error)
            notify(f"{label}: skipped: {error}")
    return Exported(tuple(files), skipped)


def _export_slide(
    record: SlideRecord,
    slide: SlideLayout,
    writers: Mapping[Format, Write],
    output: Path | None,
    files: list[Path],
) -> Iterator[str]:
    """Write one slide's files, add each to `files` and yield a line about it.

    SlideError if its table cannot be read.
    """
    if nuclei_if_done(slide) is None:
        raise SlideError(why_not_done(slide))
    nuclei = NucleiTable.open(slide.nuclei_parquet, _dicom_folder(record, slide))
    for format, write in writers.items():
        path = slide.exported(format) if output is None else output / f"{slide.slide_id}.{format.suffix}"
        started = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with sweeping(path):
                write(nuclei, path)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            why = error.strerror or error
            raise InputError(f"{path}: cannot be written ({why}); give another folder with -o") from error
        files.append(path)
        yield f"{nuclei.rows:,} nuclei to {format} in {duration(time.monotonic() - started)}"


def _dicom_folder(record: SlideRecord, slide: SlideLayout) -> Path | None:
    """Return the folder of a DICOM slide if it still holds what was segmented; None otherwise."""
    if isinstance(record.path, Url) or not record.path.is_dir():
        return None
    with suppress(OSError, SlideError):  # survey.json may be missing, or the slide unreadable by now
        if peek(record).fingerprint == read_info(slide.survey_json).fingerprint:
            return record.path
    return None


def _chosen(layout: RunLayout, slide_ids: Sequence[str]) -> list[SlideRecord]:
    """Return the slides `slide_ids`, or all if it is empty. InputError for an unknown one."""
    slides = {record.slide_id: record for record in read_slides(layout) or ()}
    if unknown := [name for name in slide_ids if name not in slides]:
        raise InputError(
            f"--slide {unknown[0]}: is not a slide of this run; {layout.slides_csv} lists its slides: {listed(slides)}"
        )
    return [slides[name] for name in dict.fromkeys(slide_ids)] if slide_ids else list(slides.values())


def writer(format: Format) -> Write:
    """Return the function that writes a file of `format`. Its arguments are the table and the path of the file.

    InputError if a package or library that the format needs is not installed or cannot be used. It is checked here,
    before anything is written.
    """
    match format:
        case Format.qupath:
            from hover_batch.export.qupath import write_qupath

            return write_qupath
        case Format.annotation_store:
            from hover_batch.export.annotation_store import sqlite_store, write_annotation_store

            sqlite_store()
            return write_annotation_store
        case Format.hovernet:
            from hover_batch.export.hovernet_json import write_hovernet_json

            return write_hovernet_json
        case Format.spatialdata:
            from hover_batch.export.spatial import require_extra, write_spatialdata

            require_extra()
            return write_spatialdata
        case Format.anndata:
            from hover_batch.export.spatial import require_extra, write_anndata

            require_extra()
            return write_anndata
        case Format.ome_zarr:
            from hover_batch.export.ome_zarr import write_ome_zarr

            return write_ome_zarr
        case Format.dicom:
            from hover_batch.export.dicom import write_dicom

            return write_dicom
        case Format.csv:
            from hover_batch.export.flat_csv import write_csv

            return write_csv
