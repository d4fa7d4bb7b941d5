"""Read published data sets in their layouts on disk, one module each. A layout is recognised by its content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from hover_batch.errors import InputError
from kd.data.layouts.consep import Consep
from kd.data.layouts.folder import InstanceFolder
from kd.data.layouts.pannuke import PanNuke
from kd.data.layouts.qupath import Qupath

Layout = InstanceFolder | Consep | PanNuke | Qupath
"""Annotated images in one folder; `len` gives their number.

`classes`: name in `kd.data.classes.TAXONOMIES` of the taxonomy that fits the annotated types best. `notes`: sentences
for the user about what was not read; complete once all images are read.
"""


def recognise(folder: Path, val: int = 0, class_map: Mapping[str, str] = MappingProxyType({})) -> Layout:
    """Return the images in a folder, whose layout is recognised by its content. Pixels are not read yet.

    `folder`: folder with annotated images. `val`: number of CoNSeP's last training tiles to use as fold val; ignored
    for other layouts. `class_map`: meanings of QuPath's classes (see `Qupath`); ignored for other layouts.

    Raises InputError if there is no such folder, its layout is unknown, incomplete or invalid, or a fold occurs twice.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one with annotated images")
    if InstanceFolder.recognises(folder):
        return InstanceFolder(folder)
    if Consep.recognises(folder):
        return Consep(folder, val)
    if PanNuke.recognises(folder):
        return PanNuke(folder)
    if Qupath.recognises(folder):
        return Qupath(folder, class_map)
    raise InputError(
        f"{folder}: unknown layout; give a folder with dataset.csv, with Train/Images and Train/Labels "
        "(CoNSeP), with Fold 1/images/fold1 and Fold 1/masks/fold1 (PanNuke), or with pictures or slides and their "
        "x.geojson (QuPath)"
    )
