"""Reopen a slide of a finished run for viewing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.errors import SlideError
from hover_batch.slide.survey import read_info

if TYPE_CHECKING:
    from hover_batch.slide.reader import SlideReader


def open_again(record: SlideRecord, survey: Path) -> SlideReader:
    """Open for reading. SlideError where it is missing or in a bucket, cannot be read, or is not the slide of the
    run's `survey` (survey.json)."""
    if isinstance(record.path, Url):
        raise SlideError(f"{record.path} is not fetched to be looked at")
    if not record.path.exists():
        raise SlideError(f"{record.path} is not there")
    from hover_batch.slide.reader import open_slide  # takes seconds: only when the slide is there

    reader = open_slide(record)
    if reader.info.fingerprint != read_info(survey).fingerprint:
        reader.close()
        raise SlideError(f"{record.path} is another file than was segmented")
    return reader
