"""Prepare annotated images: read all known layouts, and write one cache and a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from hover_batch.errors import InputError
from hover_batch.taxonomy import Taxonomy
from kd.data.cache import writing
from kd.data.classes import TAXONOMIES
from kd.data.contact_sheet import ContactSheet
from kd.data.findings import Findings
from kd.data.layouts import Layout, recognise
from kd.data.layouts.consep import Consep
from kd.data.layouts.folder import InstanceFolder
from kd.data.samples import Sample

Watch = Callable[[Iterable[Sample], int], Iterable[Sample]]
"""Function from samples and their number to the same samples, which shows progress while they are iterated."""


def prepare(folders: Sequence[Path], out: Path, sheet: Path, classes: str | None, val: int, watch: Watch) -> Findings:
    """Write the images of all folders to the cache `out` and some of them to the PNG `sheet`.

    Return their counts and irregularities. `classes`: name in TAXONOMIES of the classes to map types to; None for
    pannuke if a folder has PanNuke's types, else consep. `val`: number of CoNSeP's last training tiles to use as fold
    val. `watch`: shows progress. Images are read one at a time. Raises InputError if an argument is invalid, the
    folders have no images, a folder or an image cannot be read, or a file cannot be written; `out` is unchanged unless
    only the contact sheet could not be written.
    """
    layouts = [recognise(folder, val) for folder in folders]
    if val and not any(isinstance(layout, Consep) for layout in layouts):
        raise InputError(f"--val {val}: is for CoNSeP (Train, Test), but none of the folders is CoNSeP; leave it out")
    if not sheet.parent.is_dir():
        raise InputError(f"--sheet {sheet}: the folder {sheet.parent} does not exist; create it first")
    taxonomy = _taxonomy(classes, layouts)
    findings, pictures = Findings(taxonomy), ContactSheet(taxonomy)
    with writing(out, taxonomy) as cache:
        for sample in watch(_samples(layouts, taxonomy), sum(len(layout) for layout in layouts)):
            cache.add(sample)
            findings.add(sample)
            pictures.add(sample)
        if not findings.parts:
            raise InputError(f"{', '.join(map(str, folders))}: no images found; give folders with annotated images")
    findings.unread_types = [s for layout in layouts if isinstance(layout, InstanceFolder) for s in layout.unread_types]
    pictures.write(sheet)
    return findings


def _taxonomy(classes: str | None, layouts: Sequence[Layout]) -> Taxonomy:
    if classes is None:
        classes = "pannuke" if any(layout.classes == "pannuke" for layout in layouts) else "consep"
    if classes not in TAXONOMIES:
        raise InputError(f"--classes {classes}: unknown; give one of {', '.join(TAXONOMIES)}")
    return TAXONOMIES[classes]


def _samples(layouts: Sequence[Layout], taxonomy: Taxonomy) -> Iterator[Sample]:
    for layout in layouts:
        yield from layout.samples(taxonomy)
