"""One slide of a cohort, as its row in the CSV has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from hover_batch.geometry import Mpp


@dataclass(frozen=True)
class SlideRecord:
    """A checked row. `path` and `mask_path` are absolute; `extra` holds the columns that only pass through."""

    slide_id: str
    path: Path
    row: int
    """Line of the CSV, the header being line 1; position in the listing for a folder or glob."""
    mpp: Mpp | None = None
    """Overrides the file's pixel size."""
    magnification: float | None = None
    mask_path: Path | None = None
    patient_id: str | None = None
    group: str | None = None
    extra: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
