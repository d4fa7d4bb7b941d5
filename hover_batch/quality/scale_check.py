"""Check a slide's pixel size by its nuclei: run the model on the densest field as if its pixels had other sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from hover_batch.cohort.record import SlideRecord
from hover_batch.config import TissueSettings
from hover_batch.geometry import Box, Grid, Mpp
from hover_batch.model.images import predict_image
from hover_batch.nuclei.image import nuclei_of
from hover_batch.nuclei.systems import splitter_of
from hover_batch.quality.flags import LIMITS
from hover_batch.slide.pixel_size import USUAL_MPP
from hover_batch.slide.reader import SlideReader, open_slide, whole_grid
from hover_batch.slide.tissue import TissueMask, tissue_mask

if TYPE_CHECKING:  # it imports torch
    from hover_batch.model.predict import Predictor

FIELD = 512
"""Side in inference pixels of the field."""
_FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0)
"""Multiples of the given pixel size that are tried: wrong magnifications are powers of two, wrong units of ten."""
_PICTURE_SIDE = 1024
"""Longer side of the picture on which the densest field is found."""
_MIN_NUCLEI = 5
_USUAL_UM2 = 23.0
"""Area of the median nucleus in a usual field; 14 to 42 µm² were measured."""
_SIZE_WEIGHT = 0.04
"""Reduction of the fit for a factor of two in that area: the mean seg_score alone rises when groups of nuclei are taken
for one. Chosen on images that trained nothing (see tests/quality/test_scale_check.py)."""
_CLOSE = 0.01
"""Difference in fit below which two pixel sizes are about equally likely."""


@dataclass(frozen=True)
class Trial:
    """Result of one prediction, for an assumed pixel size."""

    mpp: Mpp
    """Pixel size of level 0 that was assumed, in µm."""
    nuclei: int
    """Number of nuclei."""
    seg_score: float
    """Mean seg_score of the nuclei; 0 without nuclei."""
    area_um2: float
    """Area of the median nucleus in µm² at this pixel size; without nuclei, that of one pixel."""

    @property
    def plausible(self) -> bool:
        """Whether the area of the median nucleus lies within LIMITS["area_um2"]."""
        low, high = LIMITS["area_um2"]
        return low <= self.area_um2 <= high

    @property
    def fit(self) -> float:
        """Measure of how well the nuclei fit the pixel size, at most 1; higher is better.

        It is seg_score − 0.04 · log2(area_um2 / 23)², where 23 µm² is the area of the median nucleus in a usual field.
        The value is meaningless without nuclei.
        """
        return self.seg_score - _SIZE_WEIGHT * math.log2(self.area_um2 / _USUAL_UM2) ** 2


def check_scale(record: SlideRecord, predictor: Predictor, tissue: TissueSettings) -> str:
    """Return a sentence that says which pixel size the nuclei of a slide on disk fit best.

    The model is run on the field with the most stained tissue, at the given size and at those multiples of it, from 0.1
    to 10, that are usual for slides (USUAL_MPP). Sizes with fewer than 5 nuclei do not count. The sentence begins with
    "warning:" if the nuclei fit another size better than the given one, or if no usual size gives nuclei of a plausible
    area. Without tissue, it says that the size was not checked. If no size counts, it says the same, or it is a warning
    if the given size is not usual.

    `record`: row of the slide in the cohort. `predictor`: network, with its card. `tissue`: settings of the tissue
    mask, in which the field is searched for.

    InputError if the pixel size is unknown, or a DICOM folder holds several slides. SlideError if the slide or its mask
    cannot be used. Errors of the network propagate.
    """
    with open_slide(record) as reader:
        mask = tissue_mask(reader, record, tissue)
        if not mask.array.any():
            return "pixel size not checked, because no tissue was found"
        given = reader.info.mpp
        trials = [trial for trial in _trials(reader, mask, predictor) if trial.nuclei >= _MIN_NUCLEI]
    if not trials and not _usual(given):
        low, high = USUAL_MPP
        return (
            f"warning: the pixel size of {given} µm is not confirmed: it gives fewer than {_MIN_NUCLEI} nuclei, and "
            f"slides have {low:g} to {high:g} µm as a rule; check it in the scanner's software"
        )
    if not trials:
        return f"pixel size not checked, because the densest field has fewer than {_MIN_NUCLEI} nuclei"
    usual = [trial for trial in trials if _usual(trial.mpp)] or trials
    plausible = [trial for trial in usual if trial.plausible] or usual
    highest = max(trial.fit for trial in plausible)
    likely = [trial for trial in plausible if highest - trial.fit < _CLOSE]
    # The given size is preferred to others that are about as likely.
    best = max(likely, key=lambda trial: (trial.mpp == given, trial.fit))
    evidence = f"{best.nuclei:,} nuclei, mean seg_score {best.seg_score:.2f}, median {best.area_um2:.3g} µm²"
    if not (_usual(best.mpp) and best.plausible):
        return (
            f"warning: the pixel size of {given} µm is not confirmed: no usual one gives enough nuclei of a usual size "
            f"(best at {best.mpp} µm: {evidence}); check it in the scanner's software"
        )
    others = " and ".join(str(trial.mpp) for trial in likely if trial is not best)
    doubt = f"; {others} µm fits about as well: check the magnification of the scan" if others else ""
    if best.mpp == given:
        return f"the nuclei fit the pixel size of {given} µm ({evidence}){doubt}"
    return (
        f"warning: the nuclei fit {best.mpp} µm better than the given {given} ({evidence}){doubt}; if the "
        f"magnification of the scan agrees, put {best.mpp} into the column mpp of the cohort"
    )


def _trials(reader: SlideReader, mask: TissueMask, predictor: Predictor) -> list[Trial]:
    """Predict the same place at each pixel size that a slide may have, the given one included."""
    info, card = reader.info, predictor.card
    x, y = _densest(reader, mask, card.mpp)
    trials = []
    for factor in _FACTORS:
        mpp = Mpp(info.mpp.x * factor, info.mpp.y * factor)
        if factor != 1 and not _usual(mpp):
            continue
        grid = Grid.over(info.level0, mpp, card.mpp)
        left, top = round(x / grid.scale_x) - FIELD // 2, round(y / grid.scale_y) - FIELD // 2
        field = Box(left, top, left + FIELD, top + FIELD).intersect(grid.size.box)
        maps = predict_image(predictor, reader.read(field, grid))
        _, nuclei = nuclei_of(maps, splitter_of(card), card.layout)
        score, area = (float(np.mean(nuclei.seg_score)), float(np.median(nuclei.area_px))) if len(nuclei) else (0, 1)
        trials.append(Trial(mpp, len(nuclei), score, area * grid.mpp.x * grid.mpp.y))
    return trials


def _usual(mpp: Mpp) -> bool:
    """Return whether slides usually have pixels of this size."""
    return all(USUAL_MPP[0] <= side <= USUAL_MPP[1] for side in (mpp.x, mpp.y))


def _densest(reader: SlideReader, mask: TissueMask, mpp: float) -> tuple[float, float]:
    """Return the centre (x, y) in level-0 pixels of the field with most stained tissue.

    `mpp`: size of an inference pixel in µm, which determines the size of the field.
    """
    level0 = reader.info.level0
    grid = whole_grid(reader.info, max(1.0, max(level0.width, level0.height) / _PICTURE_SIDE))
    picture = reader.read(grid.size.box, grid)
    size = (grid.size.width, grid.size.height)
    tissue = cv2.resize(mask.array.astype(np.float32), size, interpolation=cv2.INTER_NEAREST)
    # Hematoxylin absorbs red, which eosin lets pass.
    stain = np.pad((255.0 - picture[..., 0]) * tissue, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    width, height = (
        max(1, min(extent, round(FIELD * mpp / side)))
        for extent, side in zip(size, (grid.mpp.x, grid.mpp.y), strict=True)
    )
    inside = stain[height:, width:] - stain[:-height, width:] - stain[height:, :-width] + stain[:-height, :-width]
    row, column = np.unravel_index(int(inside.argmax()), inside.shape)
    return (column + width / 2) * grid.scale_x, (row + height / 2) * grid.scale_y
