"""Prepare annotated images: read all known layouts, and write one cache and a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from hover_batch.errors import InputError
from hover_batch.taxonomy import Taxonomy
from kd.data.cache import writing
from kd.data.classes import TAXONOMIES
from kd.data.contact_sheet import ContactSheet, is_contact_sheet
from kd.data.findings import Findings
from kd.data.layouts import Layout, recognise
from kd.data.layouts.consep import Consep
from kd.data.layouts.qupath import Qupath
from kd.data.samples import Sample

Watch = Callable[[Iterable[Sample], int], Iterable[Sample]]
"""Function from samples and their number to the same samples, which shows progress while they are iterated."""


def prepare(
    folders: Sequence[Path],
    out: Path,
    sheet: Path,
    classes: str | None,
    val: int,
    class_map: Mapping[str, str],
    watch: Watch,
) -> Findings:
    """Write the images of all folders to a cache, and some to a contact sheet. Return counts and irregularities.

    Images are read one at a time. An older cache and contact sheet are replaced.

    `folders`: folders with annotated images. `out`: cache to write. `sheet`: contact sheet to write, a PNG. `classes`:
    name in TAXONOMIES of the classes to map types to; None for pannuke if the types of a folder fit it best, else
    consep. `val`: number of CoNSeP's last training tiles to use as fold val. `class_map`: meanings of QuPath's classes
    (see `Qupath`), by class in lower or upper case. `watch`: shows progress.

    Raises InputError if `classes` is unknown, `val` or `class_map` applies to none of the folders, the folders have no
    images, a folder or an image cannot be read, a file cannot be written, or `sheet` exists and is not a contact sheet.
    `out` is then unchanged, unless only the contact sheet could not be written. Raises OSError if `sheet` cannot be
    read, the folder of `out` cannot be opened, or the complete cache cannot be moved to `out`.
    """
    lowered = {name.lower(): value.lower() for name, value in class_map.items()}
    layouts = [recognise(folder, val, lowered) for folder in folders]
    if val and not any(isinstance(layout, Consep) for layout in layouts):
        raise InputError(f"--val {val}: is for CoNSeP (Train, Test), but none of the folders is CoNSeP; leave it out")
    if class_map and not any(isinstance(layout, Qupath) for layout in layouts):
        raise InputError(
            f"--map {next(iter(class_map))}: is for QuPath's classes, but no folder has GeoJSON; leave it out"
        )
    if not sheet.parent.is_dir():
        raise InputError(f"--sheet {sheet}: the folder {sheet.parent} does not exist; create it first")
    if sheet.exists() and not (sheet.is_file() and is_contact_sheet(sheet)):
        raise InputError(
            f"--sheet {sheet}: exists and is not a contact sheet of `kd prepare`; give another file, or remove it"
        )
    if sheet.resolve() == out.resolve():
        raise InputError(f"--sheet {sheet}: is also --out; give another file")
    taxonomy = _taxonomy(classes, layouts)
    findings, pictures = Findings(taxonomy), ContactSheet(taxonomy)
    # The calls check all classes before the first image is read.
    samples = chain.from_iterable([layout.samples(taxonomy) for layout in layouts])
    with writing(out, taxonomy) as cache:
        for sample in watch(samples, sum(len(layout) for layout in layouts)):
            cache.add(sample)
            findings.add(sample)
            pictures.add(sample)
        if not findings.parts:
            raise InputError(f"{', '.join(map(str, folders))}: no images found; give folders with annotated images")
    findings.notes = [note for layout in layouts for note in layout.notes]
    pictures.write(sheet)
    return findings


def _taxonomy(classes: str | None, layouts: Sequence[Layout]) -> Taxonomy:
    if classes is None:
        classes = "pannuke" if any(layout.classes == "pannuke" for layout in layouts) else "consep"
    if classes not in TAXONOMIES:
        raise InputError(f"--classes {classes}: unknown; give one of {', '.join(TAXONOMIES)}")
    return TAXONOMIES[classes]
