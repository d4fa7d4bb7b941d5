"""Published data sets as they lie on disk, each layout in a file. Whose layout a folder has is seen, not asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from hover_batch.errors import InputError
from hover_batch.taxonomy import Taxonomy
from kd.data.layouts.consep import Consep
from kd.data.layouts.folder import TABLE, InstanceFolder
from kd.data.layouts.pannuke import PanNuke
from kd.data.samples import Sample


class Layout(Protocol):
    """Annotated images in one folder; their number is its length."""

    @property
    def classes(self) -> str:
        """The taxonomy of `kd.data.classes.TAXONOMIES` that is nearest to its types."""

    def __len__(self) -> int: ...

    def samples(self, taxonomy: Taxonomy) -> Iterator[Sample]:
        """The images one after the other, types mapped to `taxonomy`. InputError where one is faulty."""


def recognise(folder: Path, val: int = 0) -> Layout:
    """What lies in `folder`. `val`: tiles of CoNSeP's training part that become the fold val.

    Raises InputError where there is no such folder, its layout is not known, or it is incomplete.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / TABLE).is_file():
        return InstanceFolder(folder)
    if Consep.recognises(folder):
        return Consep(folder, val)
    if PanNuke.recognises(folder):
        return PanNuke(folder)
    raise InputError(
        f"{folder}: not a layout that is known; give a folder with dataset.csv, with Train/Images and Train/Labels "
        "(CoNSeP), or with Fold 1/images/fold1 and Fold 1/masks/fold1 (PanNuke)"
    )
