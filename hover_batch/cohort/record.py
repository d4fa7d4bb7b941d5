"""Record of a slide, as its row in the cohort describes it; URLs of slides; what looks like a slide in a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from hover_batch.files import is_dicom
from hover_batch.geometry import Mpp

SLIDE_SUFFIXES = frozenset(
    ".svs .tif .tiff .ndpi .mrxs .scn .bif .svslide .vms .vmu .qptiff .png .jpg .jpeg".split()  # noqa: SIM905
)
"""Suffixes, in lower case, of files that are taken for slides when a folder is listed."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]*@")
_SECRETS = re.compile(rf"{_USER_INFO.pattern}|[?#][^\s'\"]*")
_NO_FRAGMENT = ("s3", "s3a", "gs", "gcs")
"""Schemes of URLs without a fragment: # is a character of the file's name."""
_NO_FRAGMENT_SECRETS = re.compile(rf"{_USER_INFO.pattern}|[?][^\s'\"]*")
_CONTAINER = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes of URLs in which the name before the @ is the container, not a user."""
_CONTAINER_SECRETS = re.compile(r"(?<=://)([^/@:\s]*):[^/@\s]*(?=@)|[?#][^\s'\"]*")


@dataclass(frozen=True, repr=False)
class Url:
    """URL of a slide in storage that fsspec can open.

    `str()` and `repr()` redact credentials: user, password, query and fragment. In S3 and Google Cloud Storage, # is
    part of a file's name, and stays.
    """

    text: str
    """Complete URL, credentials included, for opening it."""

    @classmethod
    def of(cls, text: str) -> Url | None:
        """Return `text`, a cell of the cohort, as a URL; None if it does not begin with a scheme, such as s3://."""
        return cls(text) if _SCHEME.match(text) else None

    @property
    def protocol(self) -> str:
        """Scheme of the URL in lower case, such as s3."""
        return self.text.split("://", 1)[0].lower()

    def __str__(self) -> str:
        return self.without_secrets(self.text)

    __repr__ = __str__

    @property
    def has_unsupported_query(self) -> bool:
        """Whether a URL in S3 or Google Cloud Storage has a ?, which may begin a query or be part of the name."""
        return self.protocol in _NO_FRAGMENT and "?" in self.text

    def without_secrets(self, text: str) -> str:
        """Return `text`, such as an error message about this URL, with the credentials in its URLs removed.

        These are the user and password before an @, and everything from a ? or # to the next space or quotation mark.
        In abfs and wasb URLs, the name before the @ stays, since it is the container. If this URL is in S3 or Google
        Cloud Storage, its # and what follows stay, since they are part of the name.
        """
        if self.protocol in _CONTAINER:
            return _CONTAINER_SECRETS.sub(r"\1", text)
        if "://" not in text:
            return text
        if self.protocol in _NO_FRAGMENT:
            own = _NO_FRAGMENT_SECRETS.sub("", self.text)
            return own.join(_SECRETS.sub("", part) for part in text.split(self.text))
        return _SECRETS.sub("", text)

    @property
    def name(self) -> str:
        """Name of the file or folder to which the URL refers: the last part of its path."""
        return PurePosixPath(str(self).split("://", 1)[1]).name

    @property
    def stem(self) -> str:
        """Name of the file at the URL without its last suffix; if the URL ends with /, the whole name of the folder."""
        return self.name if str(self).endswith("/") else PurePosixPath(self.name).stem


class Stage(StrEnum):
    """Stage of a slide, by its name in failures.csv, the event log and timings.json."""

    CHECK = "check"
    """Check its row in the cohort."""
    OPEN = "open"
    """Open its file and its folder."""
    SURVEY = "survey"
    """Find the tissue and cut it into units."""
    READ = "read"
    """Read pixels of a unit."""
    INFER = "infer"
    """Predict a unit."""
    WRITE = "write"
    """Write the maps of a unit."""
    POST = "post"
    """Find the nuclei of a region."""
    FINALIZE = "finalize"
    """Merge the tables and draw the pictures."""
    QUALITY = "quality"
    """Check the finished slide for the flags of --fail-on."""


@dataclass(frozen=True)
class SlideRecord:
    """Valid row of a cohort."""

    slide_id: str
    """Unique name of the slide, which is also the name of its folder in the results."""
    path: Path | Url
    """Absolute path of the slide, or its URL in cloud storage."""
    row: int
    """Line of the CSV (the header is line 1), or position in the listing of a folder or glob."""
    mpp: Mpp | None = None
    """Pixel size of level 0 in µm; takes precedence over the file's. None to use the file's."""
    magnification: float | None = None
    """Objective's power, such as 40; only used to check the pixel size."""
    mask_path: Path | None = None
    """Absolute path of the tissue mask; None to detect the tissue."""
    patient_id: str | None = None
    """Patient, for the summary; None if the cohort gives none."""
    group: str | None = None
    """Group of slides, for the summary; None if the cohort gives none."""
    extra: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Other columns of the cohort by name, which are only copied to the results."""

    @property
    def file(self) -> Path:
        """Path of the slide on this machine. AssertionError if it is at a URL: enter `Copies.staged` first."""
        assert isinstance(self.path, Path)
        return self.path


def looks_like_slide(path: Path) -> bool:
    """Return whether `path`, which exists, is a DICOM folder, or a file with one of SLIDE_SUFFIXES.

    False for a folder that this user has no permission to list. OSError if listing a folder fails in another way.
    """
    try:
        return is_dicom_folder(path) if path.is_dir() else path.suffix.lower() in SLIDE_SUFFIXES
    except PermissionError:  # a folder of another user, such as lost+found
        return False


def is_dicom_folder(path: Path) -> bool:
    """Return whether the folder `path` directly contains a DICOM file. OSError if the folder cannot be listed."""
    return any(map(is_dicom, path.iterdir()))
