"""Classes that annotations and a model have in common, where theirs are different.

Sources: Tommasino et al. (arXiv 2311.12553), section 3, for a PanNuke model on CoNSeP: neoplastic, inflammatory,
epithelial as they are, all others miscellaneous. CoNSeP's merged classes do not tell healthy from malignant epithelium,
so that with them on either side three classes remain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hover_batch.errors import InputError
from hover_batch.model.heads import MapLayout
from hover_batch.taxonomy import CONSEP, NUCLEI, PANNUKE, NucleusClass, Taxonomy
from kd.data.datasets import Data, Sample

Ids = tuple[int, ...]
"""By class id of one taxonomy, the background's first: the id in another one."""


def _common(name: str, *colors_of: NucleusClass) -> Taxonomy:
    listed = [NucleusClass(i, c.name, c.color) for i, c in enumerate(colors_of, start=1)]
    return Taxonomy(name, (CONSEP.classes[0], *listed))


_CONSEP = {c.name: c for c in CONSEP.classes}
_PANNUKE = {c.name: c for c in PANNUKE.classes}
PAPER_CONSEP = _common(
    "pannuke-consep",
    _PANNUKE["neoplastic"],
    _PANNUKE["inflammatory"],
    _PANNUKE["epithelial"],
    _CONSEP["miscellaneous"],
)
"""The paper's classes for CoNSeP."""
THREE = _common("pannuke-consep-merged", _CONSEP["epithelial"], _CONSEP["inflammatory"], _CONSEP["miscellaneous"])

_PAPER_OF_PANNUKE = {"connective": "miscellaneous", "dead": "miscellaneous"}
_THREE_OF_PANNUKE = {**_PAPER_OF_PANNUKE, "neoplastic": "epithelial"}
_THREE_OF_CONSEP = {"spindle": "miscellaneous"}


@dataclass(frozen=True)
class Remap:
    """The common classes, and the ids in them of the data's classes and of the model's."""

    taxonomy: Taxonomy
    data: Ids
    model: Ids
    unnamed: int = 0
    """The id of nuclei for which the data's taxonomy has no class; 0 where the common one has none, either."""

    def sample(self, sample: Sample) -> Sample:
        """The sample with types of the common classes; without any where only nuclei are common."""
        if sample.types is None or self.taxonomy is NUCLEI:
            return replace(sample, types=None)
        types = np.array(self.data, np.uint8)[sample.types]
        types[(sample.types == 0) & (sample.instances > 0)] = self.unnamed
        return replace(sample, types=types)

    def maps(self, maps: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The model's maps (plane, y, x) uint8 as those of a model of the common classes."""
        return MapLayout(len(self.model)).merge(maps, self.model)


def remap_of(data: Taxonomy, model: Taxonomy, source: str, typed: bool = True) -> Remap:
    """How a model of these classes is judged on annotations of those.

    Equal classes stay as they are; but PanNuke's on the source `consep` become the paper's four, and what PanNuke has
    no class for (CoNSeP's "other") is miscellaneous. `typed`: whether the
    source annotates types; without them, or with a model that has none, only nuclei are common. Raises InputError where
    no common classes are known.
    """
    kinds = (_names(data), _names(model))
    pannuke, consep = _names(PANNUKE), _names(CONSEP)
    if not typed or _names(NUCLEI) in kinds:
        return Remap(NUCLEI, _all_nuclei(data), _all_nuclei(model))
    from_consep = kinds[0] == pannuke and source == "consep"
    if from_consep and kinds[1] == pannuke:
        ids = _ids(PANNUKE, PAPER_CONSEP, _PAPER_OF_PANNUKE)
        return Remap(PAPER_CONSEP, ids, ids, unnamed=_id_in(PAPER_CONSEP, "miscellaneous"))
    if kinds[0] == kinds[1]:
        same = tuple(c.id for c in model.classes)
        return Remap(model, same, same)
    three = {
        pannuke: _ids(PANNUKE, THREE, _THREE_OF_PANNUKE),
        consep: _ids(CONSEP, THREE, _THREE_OF_CONSEP),
    }
    if kinds[0] in three and kinds[1] in three:
        unnamed = _id_in(THREE, "miscellaneous") if from_consep else 0
        return Remap(THREE, three[kinds[0]], three[kinds[1]], unnamed)
    raise InputError(
        f"source {source}: its classes are {', '.join(kinds[0])}, the model's {', '.join(kinds[1])}, and which of them "
        "are the same is not known; choose other sources by --source, or a model of the same classes"
    )


def remaps_of(data: Data, model: Taxonomy) -> dict[str, Remap]:
    """`remap_of` each source of the data, in the order of appearance."""
    typed = {s.source: False for s in data.samples} | {s.source: True for s in data.samples if s.types is not None}
    return {source: remap_of(data.taxonomy, model, source, typed[source]) for source in typed}


def _names(taxonomy: Taxonomy) -> tuple[str, ...]:
    return tuple(c.name for c in taxonomy.nuclei)


def _all_nuclei(taxonomy: Taxonomy) -> Ids:
    return (0, *(1 for _ in taxonomy.nuclei))


def _ids(taxonomy: Taxonomy, common: Taxonomy, renamed: Mapping[str, str]) -> Ids:
    """Of each class of `taxonomy` the id in `common`, where it has the name that `renamed` gives it, or its own."""
    return tuple(_id_in(common, renamed.get(c.name, c.name)) for c in taxonomy.classes)


def _id_in(taxonomy: Taxonomy, name: str) -> int:
    return next(c.id for c in taxonomy.classes if c.name == name)
