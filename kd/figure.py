"""The paper's Figure 2: image, truth, and what models make of it, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.watershed import SobelConstants
from hover_batch.taxonomy import NucleusClass, Taxonomy
from kd.datasets import Data, Sample
from kd.evaluate import MapsOf, nuclei_of, types_by_id
from kd.panels import outlined, panel
from kd.remap import remaps_of

SIDE = 256
"""Side in pixels of the crops that are shown, from the middle of the images."""
ROWS = 4


@dataclass(frozen=True)
class Shown:
    """A model in the figure: its name, its maps of an image, the Sobel constants, and its classes."""

    name: str
    maps_of: MapsOf
    constants: SobelConstants | None
    taxonomy: Taxonomy


def figure(data: Data, models: Sequence[Shown], rows: int = ROWS) -> NDArray[np.uint8]:
    """The panel (y, x, 3) uint8 RGB of the fullest images of `data`, each source in turn; a row an image.

    Each model is shown in the classes that it and the data have in common, the truth in those of the last one.
    """
    remaps = [remaps_of(data, model.taxonomy) for model in models]
    pictures = []
    for sample in fullest(data.samples, rows):
        nothing = np.zeros_like(sample.instances)
        truth = remaps[-1][sample.source].sample(sample)
        views = [replace(truth, instances=nothing), truth]
        for model, remap in zip(models, remaps, strict=True):
            views.append(_predicted(sample, model, remap[sample.source].maps(model.maps_of(sample.image))))
        shown = [remaps[-1][sample.source].taxonomy] * 2 + [r[sample.source].taxonomy for r in remaps]
        pictures.append([_drawn(view, taxonomy) for view, taxonomy in zip(views, shown, strict=True)])
    columns = ["image", "truth", *(model.name for model in models)]
    return panel(columns, pictures, _key([r.taxonomy for remap in remaps for r in remap.values()]))


def fullest(samples: Sequence[Sample], n: int) -> list[Sample]:
    """The n images with most nuclei in their middle, taken from each source in turn."""
    ranked: list[tuple[int, int, int]] = []
    for source in {s.source for s in samples}:
        counts = [(_count(s), i) for i, s in enumerate(samples) if s.source == source]
        counts.sort(key=lambda found: (-found[0], found[1]))
        ranked += [(turn, -count, i) for turn, (count, i) in enumerate(counts)]
    return [samples[i] for _, _, i in sorted(ranked)[:n]]


def _count(sample: Sample) -> int:
    return len(np.unique(sample.instances[_middle(sample)]))


def _middle(sample: Sample) -> tuple[slice, slice]:
    height, width = sample.instances.shape
    top, left = max(0, height - SIDE) // 2, max(0, width - SIDE) // 2
    return slice(top, top + SIDE), slice(left, left + SIDE)


def _predicted(sample: Sample, model: Shown, maps: NDArray[np.uint8]) -> Sample:
    """The sample with the model's nuclei in place of the true ones; without types where the sample has none."""
    found, nuclei = nuclei_of(maps, model.constants, MapLayout(len(maps) - MapLayout(0).planes))
    types = None
    if sample.types is not None:
        types = np.concatenate([np.zeros(1, np.uint8), types_by_id(found, nuclei)])[found]
    return replace(sample, instances=found, types=types)


def _drawn(sample: Sample, taxonomy: Taxonomy) -> NDArray[np.uint8]:
    """The middle of the sample with its nuclei outlined; what a smaller image lacks is white."""
    part = _middle(sample)
    height, width = sample.instances[part].shape
    lacking = ((0, SIDE - height), (0, SIDE - width))
    image = np.pad(sample.image[part], (*lacking, (0, 0)), constant_values=255)
    types = None if sample.types is None else np.pad(sample.types[part], lacking)
    return outlined(image, np.pad(sample.instances[part], lacking), types, taxonomy)


def _key(taxonomies: Sequence[Taxonomy]) -> list[NucleusClass]:
    """Each class once."""
    return list({(c.name, c.color): c for taxonomy in taxonomies for c in taxonomy.nuclei}.values())
