"""Map annotations and a model whose classes differ to the classes that they have in common.

Source: Tommasino et al. (arXiv 2311.12553), section 3, for a PanNuke model on CoNSeP: neoplastic, inflammatory and
epithelial stay, and all other classes become miscellaneous. CoNSeP's merged classes do not separate healthy from
malignant epithelium, so with them three common classes remain.
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
"""Ids in another taxonomy, indexed by class id; the first one is the background's."""


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
"""Common classes of PanNuke and of CoNSeP's merged classes."""

_PAPER_OF_PANNUKE = {"connective": "miscellaneous", "dead": "miscellaneous"}
_THREE_OF_PANNUKE = {**_PAPER_OF_PANNUKE, "neoplastic": "epithelial"}
_THREE_OF_CONSEP = {"spindle": "miscellaneous"}


@dataclass(frozen=True)
class Remap:
    """Mapping of the classes of annotations and of a model to common classes."""

    taxonomy: Taxonomy
    """Common classes."""
    data: Ids
    """Common class id by class id of the data."""
    model: Ids
    """Common class id by class id of the model."""
    unnamed: int = 0
    """Common class id of nuclei without a class in the data's taxonomy; 0 if they have no common class either."""

    def sample(self, sample: Sample) -> Sample:
        """Return a copy of `sample` with types in the common classes.

        Nuclei without a class in the data get the class `unnamed`. The result has no types if the common taxonomy is
        NUCLEI or `sample` has none.
        """
        if sample.types is None or self.taxonomy is NUCLEI:
            return replace(sample, types=None)
        types = np.array(self.data, np.uint8)[sample.types]
        types[(sample.types == 0) & (sample.instances > 0)] = self.unnamed
        return replace(sample, types=types)

    def maps(self, maps: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the model's maps with their type planes merged to the common classes, as a copy.

        `maps`: stored maps (plane, y, x) uint8 in the classes of the model (see `MapLayout`).
        """
        return MapLayout(len(self.model)).merge(maps, self.model)


def remap_of(data_taxonomy: Taxonomy, model_taxonomy: Taxonomy, source: str, typed: bool = True) -> Remap:
    """Return the mapping of the data's and the model's classes to common classes, for one source of the data.

    The first rule that applies determines the common classes:

    - NUCLEI if `typed` is False, or if one of the taxonomies has only nuclei without types;
    - PAPER_CONSEP if the source is `consep` and both taxonomies are PanNuke's;
    - the model's classes if both taxonomies have the same classes;
    - THREE if one taxonomy is PanNuke's and the other is CoNSeP's.

    If the source is `consep` and the data has PanNuke's classes, CoNSeP's "other" nuclei have no class in the data.
    With PAPER_CONSEP and THREE, they become miscellaneous.

    `data_taxonomy`, `model_taxonomy`: classes of the data and of the model. `source`: name of the source. `typed`:
    whether the source has annotated types.

    Raises InputError if no rule applies.
    """
    data_names, model_names = _names(data_taxonomy), _names(model_taxonomy)
    pannuke, consep = _names(PANNUKE), _names(CONSEP)
    if not typed or _names(NUCLEI) in (data_names, model_names):
        return Remap(NUCLEI, _all_nuclei(data_taxonomy), _all_nuclei(model_taxonomy))
    consep_as_pannuke = data_names == pannuke and source == "consep"
    if consep_as_pannuke and model_names == pannuke:
        ids = _ids(PANNUKE, PAPER_CONSEP, _PAPER_OF_PANNUKE)
        return Remap(PAPER_CONSEP, ids, ids, unnamed=_id_in(PAPER_CONSEP, "miscellaneous"))
    if data_names == model_names:
        same = tuple(c.id for c in model_taxonomy.classes)
        return Remap(model_taxonomy, same, same)
    three = {
        pannuke: _ids(PANNUKE, THREE, _THREE_OF_PANNUKE),
        consep: _ids(CONSEP, THREE, _THREE_OF_CONSEP),
    }
    if data_names in three and model_names in three:
        unnamed = _id_in(THREE, "miscellaneous") if consep_as_pannuke else 0
        return Remap(THREE, three[data_names], three[model_names], unnamed)
    raise InputError(
        f"source {source}: its classes are {', '.join(data_names)}, the model's {', '.join(model_names)}, and which of "
        "them are the same is not known; choose other sources with --source, or a model with the same classes"
    )


def remaps_of(data: Data, model: Taxonomy) -> dict[str, Remap]:
    """Return the mapping to the common classes of data and model for each source, in the order of appearance.

    A source has types if one of its samples has.

    `data`: annotated images. `model`: classes of the model.

    Raises InputError if no common classes are known for a source.
    """
    typed: dict[str, bool] = {}
    for sample in data.samples:
        typed[sample.source] = typed.get(sample.source, False) or sample.types is not None
    return {source: remap_of(data.taxonomy, model, source, typed[source]) for source in typed}


def _names(taxonomy: Taxonomy) -> tuple[str, ...]:
    return tuple(c.name for c in taxonomy.nuclei)


def _all_nuclei(taxonomy: Taxonomy) -> Ids:
    return (0, *(1 for _ in taxonomy.nuclei))


def _ids(taxonomy: Taxonomy, common: Taxonomy, renamed: Mapping[str, str]) -> Ids:
    """Return for each class of `taxonomy` the id of the class in `common` with the same or the `renamed` name."""
    return tuple(_id_in(common, renamed.get(c.name, c.name)) for c in taxonomy.classes)


def _id_in(taxonomy: Taxonomy, name: str) -> int:
    return next(c.id for c in taxonomy.classes if c.name == name)
