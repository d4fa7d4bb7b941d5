"""Draw images, annotations and predictions of models side by side (as Figure 2 of arXiv 2311.12553)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hover_batch.config import PostSettings
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.components import Splitter
from hover_batch.nuclei.image import nuclei_of, types_by_id
from hover_batch.taxonomy import NUCLEI, Rgb, Taxonomy
from kd.data.datasets import Data, Sample
from kd.evaluation.evaluate import MapsOf
from kd.evaluation.remap import Remap, remaps_of
from kd.panels import GAP, UNTYPED, outlined, panel

SIDE = 256
"""Side in pixels of the central crops that are shown."""
SCALE = 2
"""Magnification of the crops, so that an outline of one pixel covers little of the nucleus."""
ROWS = 4
"""Number of images in the picture."""


@dataclass(frozen=True)
class Shown:
    """Model to show in the picture."""

    name: str
    """Title of its column."""
    maps_of: MapsOf
    """Function from an image to the model's stored maps (see `MapsOf`)."""
    splitter: Splitter | None
    """Post-processing of its maps; None: HoVerNet's with Sobel maps scaled by the extremes of each image."""
    taxonomy: Taxonomy
    """Classes of the model."""
    min_area_px: int = PostSettings.min_area_px
    """Smallest area in pixels of a predicted nucleus."""


def figure(data: Data, models: Sequence[Shown], n: int = ROWS) -> NDArray[np.uint8]:
    """Return a picture (y, x, 3) uint8 RGB with one row per image, at most `n`, and a colour key below.

    `fullest` selects images with many nuclei. Of each, the central SIDE × SIDE (256 × 256) pixels are shown, magnified
    SCALE (2) times; smaller images are padded with white. Columns are the image, the annotations, and the predictions
    of each model in the classes that it has in common with the data. The annotations are drawn in the common classes of
    the last model.

    `data`: annotated images, at least one. `models`: models to show, at least one. `n`: largest number of rows.

    Raises InputError if the common classes of a source are unknown.
    """
    remaps_by_model = [remaps_of(data, model.taxonomy) for model in models]
    rows, drawn_classes = [], list[Taxonomy]()
    for sample in fullest(data.samples, n):
        remaps = [remap_of_source[sample.source] for remap_of_source in remaps_by_model]
        truth = remaps[-1].sample(sample)
        plain = replace(truth, instances=np.zeros_like(truth.instances))
        predicted = [_predicted(sample, model, remap) for model, remap in zip(models, remaps, strict=True)]
        classes = [remaps[-1].taxonomy] * 2 + [remap.taxonomy for remap in remaps]
        rows.append(
            [_drawn(cell, taxonomy) for cell, taxonomy in zip((plain, truth, *predicted), classes, strict=True)]
        )
        drawn_classes += classes
    picture = panel(["image", "truth", *(model.name for model in models)], rows)
    return np.vstack([picture, _key(drawn_classes, picture.shape[1])])


def fullest(samples: Sequence[Sample], n: int) -> list[Sample]:
    """Return up to `n` samples with many nuclei, taken from all sources in turn.

    In the first round, each source gives the sample with the most nuclei in its central SIDE × SIDE (256 × 256) pixels,
    in the second round the next one, and so on. Within a round, samples with more nuclei come first.
    """
    ranked: list[tuple[int, int, int]] = []
    for source in {s.source for s in samples}:
        most_first = sorted((-_nuclei_shown(s), i) for i, s in enumerate(samples) if s.source == source)
        ranked += [(turn, count, i) for turn, (count, i) in enumerate(most_first)]
    return [samples[i] for _, _, i in sorted(ranked)[:n]]


def _nuclei_shown(sample: Sample) -> int:
    return int(np.count_nonzero(np.unique(sample.instances[_middle(sample)])))


def _middle(sample: Sample) -> tuple[slice, slice]:
    height, width = sample.instances.shape
    top, left = max(0, height - SIDE) // 2, max(0, width - SIDE) // 2
    return slice(top, top + SIDE), slice(left, left + SIDE)


def _predicted(sample: Sample, model: Shown, common: Remap) -> Sample:
    """Return the sample with predicted nuclei; without types if data and model have no classes in common."""
    maps = common.maps(model.maps_of(sample.image))
    layout = MapLayout(len(common.taxonomy.classes))
    found, nuclei = nuclei_of(maps, model.splitter, layout, model.min_area_px)
    types = None
    if common.taxonomy is not NUCLEI:
        types = np.concatenate([np.zeros(1, np.uint8), types_by_id(found, nuclei)])[found]
    return replace(sample, instances=found, types=types)


def _drawn(sample: Sample, taxonomy: Taxonomy) -> NDArray[np.uint8]:
    """Return the magnified central crop with outlined nuclei; smaller images are padded with white."""
    part = _middle(sample)
    height, width = sample.instances[part].shape
    lacking = ((0, SIDE - height), (0, SIDE - width))

    def large(labels: NDArray[Any]) -> NDArray[Any]:
        return np.pad(labels, lacking).repeat(SCALE, 0).repeat(SCALE, 1)

    image = np.pad(sample.image[part], (*lacking, (0, 0)), constant_values=255)
    image = np.asarray(cv2.resize(image, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_CUBIC), np.uint8)
    types = None if sample.types is None else large(sample.types[part])
    return outlined(image, large(sample.instances[part]), types, taxonomy)


def _key(taxonomies: Sequence[Taxonomy], width: int) -> NDArray[np.uint8]:
    """Return a strip (y, width, 3) with the colour and the name of each class, in as many lines as needed."""
    colors: dict[str, Rgb] = {}
    for taxonomy in taxonomies:
        colors |= {"no class": UNTYPED} if taxonomy is NUCLEI else {c.name: c.color for c in taxonomy.nuclei}
    lines, x = [_line(width)], GAP
    for name, color in colors.items():
        (length, _), _ = cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)
        if x > GAP and x + 20 + length > width:
            lines.append(_line(width))
            x = GAP
        lines[-1][4:18, x : x + 14] = color
        cv2.putText(lines[-1], name, (x + 20, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        x += length + 40
    return np.vstack(lines)


def _line(width: int) -> NDArray[np.uint8]:
    return np.full((22, width, 3), 255, np.uint8)
