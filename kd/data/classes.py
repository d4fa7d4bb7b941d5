"""From the class codes of published annotations to the ids of one taxonomy.

Names are mapped, not cells: what one data set calls epithelial may be neoplastic in the other.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from hover_batch.errors import InputError
from hover_batch.taxonomy import CONSEP, PANNUKE, Taxonomy
from kd.data.samples import Sample

TAXONOMIES = {"consep": CONSEP, "pannuke": PANNUKE}
"""What annotations can be mapped to, by the name that `kd prepare --classes` has for it."""

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
"""Source → its classes in the order of their codes from 1 → the name among CONSEP's and among PANNUKE's classes.

To CONSEP as HoVerNet merges (Graham et al. 2019, section 4.1). An empty name: the taxonomy has no class for it, so such
nuclei teach no class. CoNSeP's `other` (dead, dividing, unclear) is none of PANNUKE's classes. MoNuSAC's epithelial
nuclei are benign and malignant alike, which PANNUKE tells apart; its macrophages are outlined as whole cells. Types of
sources that are not listed are not read."""

PARTIAL = frozenset({"monusac", "nucls"})
"""Sources that outline only some of the nuclei: MoNuSAC four cell types and nothing else, NuCLS not all, and many as
rectangles. What they leave out is not background, so they teach classes alone. A prediction without a partner may be
right there, so Dice, AJI, PQ, F_d and precision have no meaning; the recall of the outlined nuclei and the accuracy of
their types do."""


def fully_annotated(samples: Iterable[Sample]) -> list[Sample]:
    """Return the samples of sources that outline every nucleus: only these can be scored by PQ."""
    return [sample for sample in samples if sample.source not in PARTIAL]


def classes_by_source(taxonomy: Taxonomy, sources: Iterable[str]) -> dict[str, list[str]]:
    """Return for each class of `taxonomy` which of the sources teach it; nothing if it is not one of TAXONOMIES."""
    if taxonomy not in TAXONOMIES.values():
        return {}
    column = list(TAXONOMIES.values()).index(taxonomy)
    taught = {source: {names[column] for names in CODES.get(source, {}).values()} for source in sources}
    return {c.name: [source for source, names in taught.items() if c.name in names] for c in taxonomy.nuclei}


def class_ids(codes: NDArray[np.integer], source: str, taxonomy: Taxonomy, where: str) -> NDArray[np.uint8] | None:
    """Class codes (y, x) of a source, 0 = background → ids (y, x) uint8 of `taxonomy`, one of TAXONOMIES.

    None where the source's codes are not known. Raises InputError, naming `where`, for a code that is none of them.
    """
    names = CODES.get(source)
    if names is None:
        return None
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    if low < 0 or high > len(names):
        raise InputError(
            f"{where}: class code {high if low >= 0 else low} is not one of {source}'s, which are 1 to {len(names)} "
            f"({', '.join(names)})"
        )
    column = list(TAXONOMIES.values()).index(taxonomy)
    ids = {c.name: c.id for c in taxonomy.nuclei} | {"": 0}
    table = np.array([0, *(ids[name[column]] for name in names.values())], np.uint8)
    return np.asarray(table[codes])
