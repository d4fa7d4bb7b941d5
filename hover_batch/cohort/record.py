"""One slide of a cohort, as its row in the CSV has it; the file, or where in some storage it lies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from hover_batch.geometry import Mpp

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SECRETS = re.compile(r"(?<=://)[^/@\s]*@|[?#][^\s'\"]*", re.IGNORECASE)
_CONTAINER = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes of which what stands before the @ is the container, not a user."""


@dataclass(frozen=True, repr=False)
class Url:
    """Where a slide lies in storage that fsspec reaches. As a text it is without what may be secret: user, password and
    query; `text` is the whole, for opening it."""

    text: str

    @classmethod
    def of(cls, text: str) -> Url | None:
        """None where the text is no URL."""
        return cls(text) if _SCHEME.match(text) else None

    @property
    def protocol(self) -> str:
        return self.text.split("://", 1)[0].lower()

    def __str__(self) -> str:
        return self.without_secrets(self.text)

    __repr__ = __str__

    def without_secrets(self, text: str) -> str:
        """A text that may quote URLs, for people to read."""
        if self.protocol in _CONTAINER:
            return re.sub(r"\?[^\s'\"]*", "", text)
        if "://" not in text:
            return text
        return _SECRETS.sub("", text)

    @property
    def name(self) -> str:
        """Of the file, or of the folder."""
        return PurePosixPath(str(self).split("://", 1)[1]).name

    @property
    def stem(self) -> str:
        """The name without its suffix; whole where it is a folder's."""
        return self.name if str(self).endswith("/") else PurePosixPath(self.name).stem


class Stage(StrEnum):
    """Stages of a slide, as failures.csv, the event log and timings.json name them."""

    CHECK = "check"
    """Its row of the cohort."""
    OPEN = "open"
    SURVEY = "survey"
    """Find the tissue and cut it into units."""
    READ = "read"
    INFER = "infer"
    WRITE = "write"
    POST = "post"
    FINALIZE = "finalize"
    """Merge the tables and draw the pictures."""
    QUALITY = "quality"
    """Check the finished slide for the flags of --fail-on."""


@dataclass(frozen=True)
class SlideRecord:
    """A checked row. `path` and `mask_path` are absolute; `extra` holds the columns that only pass through."""

    slide_id: str
    path: Path | Url
    row: int
    """Line of the CSV, the header being line 1; position in the listing for a folder or glob."""
    mpp: Mpp | None = None
    """Overrides the file's pixel size."""
    magnification: float | None = None
    mask_path: Path | None = None
    patient_id: str | None = None
    group: str | None = None
    extra: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def file(self) -> Path:
        """The path of a slide that lies on this machine, or was copied to it."""
        assert isinstance(self.path, Path)
        return self.path
