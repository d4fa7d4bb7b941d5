"""Annotated images of all known layouts → one cache, with a contact sheet and what is to be known of them."""

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
"""(samples, their number) → the same samples, while progress is shown."""


def prepare(folders: Sequence[Path], out: Path, sheet: Path, classes: str | None, val: int, watch: Watch) -> Findings:
    """Write the images of all folders to the cache `out` and some of them to the contact sheet `sheet`.

    `classes`: a name in TAXONOMIES; None: PanNuke's if a folder has them, else CoNSeP's. `val`: number of CoNSeP's
    training tiles that become the fold val. `watch`: wraps the samples to show progress. One image at a time is in
    memory. Returns counts and warnings. Raises InputError if a folder or an image is faulty; `out` is then unchanged.
    """
    layouts = [recognise(folder, val) for folder in folders]
    if val and not any(isinstance(layout, Consep) for layout in layouts):
        raise InputError(f"--val {val}: applies to CoNSeP (Train, Test), and none of the folders is one; leave it out")
    if not sheet.parent.is_dir():
        raise InputError(f"--sheet {sheet}: the folder {sheet.parent} does not exist; make it first")
    taxonomy = _taxonomy(classes, layouts)
    findings, pictures = Findings(taxonomy), ContactSheet(taxonomy)
    with writing(out, taxonomy) as cache:
        for sample in watch(_samples(layouts, taxonomy), sum(len(layout) for layout in layouts)):
            cache.add(sample)
            findings.add(sample)
            pictures.add(sample)
        if not findings.parts:
            raise InputError(f"{', '.join(map(str, folders))}: no image found; give folders with annotated images")
    findings.unread_types = [s for layout in layouts if isinstance(layout, InstanceFolder) for s in layout.unread_types]
    pictures.write(sheet)
    return findings


def _taxonomy(classes: str | None, layouts: Sequence[Layout]) -> Taxonomy:
    if classes is None:
        classes = "pannuke" if any(layout.classes == "pannuke" for layout in layouts) else "consep"
    if classes not in TAXONOMIES:
        raise InputError(f"--classes {classes}: give one of {', '.join(TAXONOMIES)}")
    return TAXONOMIES[classes]


def _samples(layouts: Sequence[Layout], taxonomy: Taxonomy) -> Iterator[Sample]:
    for layout in layouts:
        yield from layout.samples(taxonomy)
