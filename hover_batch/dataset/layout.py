"""Paths of a data set, each named once.

::

    dataset/
      slides.parquet      one row per slide and model: what the data set holds, and in which files
      nuclei/model=<name>-<hash>/<slide_id>-<hash>.parquet
                          nuclei of one slide, or of several small ones, the first of which gives the name

Files of nuclei never change. A writer adds them, then replaces slides.parquet, then removes the files that it no longer
names. So readers take the names of files from slides.parquet only; other files are left over from a writer that was
killed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hover_batch.cohort.layout import PathBelow
from hover_batch.cohort.slide_id import suggest

SLIDES_PARQUET = "slides.parquet"
"""Name of the file with one row per slide and model; a folder without it is not a data set."""


@dataclass(frozen=True)
class DatasetLayout:
    """Paths of a data set, whether or not they exist."""

    root: Path
    """Folder of the data set; made absolute."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.absolute())

    slides_parquet = PathBelow("root", SLIDES_PARQUET)
    """Parquet file with one row per slide and model."""
    lock = PathBelow("root", ".lock")
    """Lock file. It is locked while a command writes to the data set, and never removed."""
    nuclei = PathBelow("root", "nuclei")
    """Folder with the files of nuclei, in one subfolder per model."""

    def model_folder(self, model: str) -> Path:
        """Return the folder with the files of the nuclei that a model found. `model`: result of `model_key`."""
        return self.nuclei / f"model={model}"


def model_key(name: str, sha256: str) -> str:
    """Return the value of the column `model` for a model, such as starter-0123abcd.

    It is the model's name, with the characters that file names may have, and the first 8 digits of its hash. `name`:
    name of the model. `sha256`: hash of its package, in hex.
    """
    return f"{suggest(name, ())}-{sha256[:8]}"
