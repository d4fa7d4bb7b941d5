"""Map the class codes of published annotations to the class ids of one taxonomy.

Classes are mapped by name, although the same cells may have another name in another data set: what one data set calls
epithelial may be neoplastic in the other.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from hover_batch.errors import InputError
from hover_batch.taxonomy import CONSEP, PANNUKE, Taxonomy
from kd.data.samples import Sample

TAXONOMIES = {"consep": CONSEP, "pannuke": PANNUKE}
"""Taxonomies to which annotations can be mapped, by their names in `kd prepare --classes`."""

CODES: dict[str, dict[str, tuple[str, str]]] = {
    "consep": {
        "other": ("miscellaneous", ""),
        "inflammatory": ("inflammatory", "inflammatory"),
        "healthy epithelial": ("epithelial", "epithelial"),
        "malignant epithelial": ("epithelial", "neoplastic"),
        "fibroblast": ("spindle", "connective"),
        "muscle": ("spindle", "connective"),
        "endothelial": ("spindle", "connective"),
    },
    "monusac": {
        "epithelial": ("epithelial", ""),
        "lymphocyte": ("inflammatory", "inflammatory"),
        "macrophage": ("", ""),
        "neutrophil": ("inflammatory", "inflammatory"),
    },
    "pannuke": {
        "neoplastic": ("epithelial", "neoplastic"),
        "inflammatory": ("inflammatory", "inflammatory"),
        "connective": ("spindle", "connective"),
        "dead": ("miscellaneous", "dead"),
        "epithelial": ("epithelial", "epithelial"),
    },
}
"""Source → its classes in the order of their codes from 1 on → their names in CONSEP and in PANNUKE.

The mapping to CONSEP is HoVerNet's (Graham et al. 2019, section 4.1). An empty name means that the taxonomy has no such
class; nothing is learned about the class of these nuclei. CoNSeP's `other` (dead, dividing, unclear) is none of
PANNUKE's classes. MoNuSAC's epithelial nuclei are benign or malignant, which are two classes in PANNUKE; its
macrophages are outlined as whole cells. Types of sources that are not listed are not read."""

PARTIAL = frozenset({"monusac", "nucls"})
"""Sources that outline only some of the nuclei: MoNuSAC only four cell types, NuCLS a selection, many as rectangles.

Their other pixels may be nuclei, so they are used to train classes only. A prediction without an annotated partner may
be correct, so Dice, AJI, PQ, F_d and precision are meaningless, but not the recall of the outlined nuclei and the
accuracy of their types."""

SLIDES_UNKNOWN = frozenset({"consep", "cpm15", "gbm40", "nuinsseg"})
"""Sources whose groups are neither slides nor patients. CoNSeP and GBM40 do not say which slide an image is from; the
groups of CPM-15 are guessed, and those of NuInsSeg are organs. They only keep similar images in one fold."""


def fully_annotated(samples: Iterable[Sample]) -> list[Sample]:
    """Return the samples from sources that outline every nucleus. These are all sources that are not in PARTIAL.

    Only these can be scored with PQ.
    """
    return [sample for sample in samples if sample.source not in PARTIAL]


def slide_of(sample: Sample) -> str:
    """Return the slide or patient of `sample`; the sample's own id if it is unknown."""
    return sample.id if sample.source in SLIDES_UNKNOWN else sample.group or sample.id


def sources_by_class(taxonomy: Taxonomy, sources: Iterable[str]) -> dict[str, list[str]]:
    """Return the sources that annotate nuclei of each class, by the class's name.

    The background is left out. Sources that are not in CODES are in no list. The result is empty if `taxonomy` is not
    one of TAXONOMIES.

    `taxonomy`: classes. `sources`: names of the sources.
    """
    if taxonomy not in TAXONOMIES.values():
        return {}
    column = list(TAXONOMIES.values()).index(taxonomy)
    names_of = {source: {names[column] for names in CODES.get(source, {}).values()} for source in sources}
    return {c.name: [source for source, names in names_of.items() if c.name in names] for c in taxonomy.nuclei}


def class_ids(codes: NDArray[np.integer], source: str, taxonomy: Taxonomy, where: str) -> NDArray[np.uint8] | None:
    """Return the class ids (y, x) uint8 of a source's class codes; None if `source` is not in CODES.

    0 is the background in both. Nuclei without a class in `taxonomy` also become 0.

    `codes`: class codes (y, x). `source`: name of the source. `taxonomy`: one of TAXONOMIES. `where`: file or image,
    for messages.

    Raises InputError if a code does not exist in the source.
    """
    classes = CODES.get(source)
    if classes is None:
        return None
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    if low < 0 or high > len(classes):
        raise InputError(
            f"{where}: class code {high if low >= 0 else low} is not one of {source}'s, which are 1 to {len(classes)} "
            f"({', '.join(classes)}); correct it"
        )
    column = list(TAXONOMIES.values()).index(taxonomy)
    id_of = {c.name: c.id for c in taxonomy.nuclei} | {"": 0}
    id_by_code = np.array([0, *(id_of[names[column]] for names in classes.values())], np.uint8)
    return np.asarray(id_by_code[codes])
