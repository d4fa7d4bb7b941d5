"""Reopen a slide of a finished run for viewing, if it is still available."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.errors import SlideError
from hover_batch.slide.survey import read_info

if TYPE_CHECKING:
    from hover_batch.slide.reader import SlideReader


def reopen(record: SlideRecord, survey: Path) -> SlideReader:
    """Open the slide of a finished run for viewing, and return a reader, which the caller closes.

    `record`: row of the slide in the run's slides.csv. `survey`: path of the run's survey.json for this slide.

    SlideError if the slide does not exist, is in cloud storage, cannot be read, or is not the file that was segmented,
    or if survey.json is corrupted. OSError if survey.json is missing or cannot be read. InputError if the pixel size of
    the slide is unknown, or a DICOM folder holds several slides.
    """
    if isinstance(record.path, Url):
        raise SlideError(f"{record.path} is in cloud storage, and is not downloaded for viewing")
    if not record.path.exists():
        raise SlideError(f"{record.path} does not exist")
    from hover_batch.slide.reader import open_slide  # this import takes many seconds

    segmented = read_info(survey).fingerprint
    reader = open_slide(record)
    if reader.info.fingerprint != segmented:
        reader.close()
        raise SlideError(f"{record.path} is not the file that was segmented")
    return reader
