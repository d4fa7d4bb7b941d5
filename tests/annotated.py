"""Nuclei as post-processing passes them to the tables, made from an annotated instance map."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage


class Annotated(SimpleNamespace):
    """The fields of `Nuclei`. Hypothesis asks for the text of a test's arguments, and that of all arrays is long."""

    def __repr__(self) -> str:
        return f"{len(self.contours)} nuclei"


def nuclei_from(
    instances: NDArray[np.integer], types: NDArray[np.uint8] | None, n_types: int, seed: int = 0
) -> Annotated:
    """Instance map (y, x), 0 = background, and type map (y, x) → the fields of `Nuclei`, sorted by anchor.

    Positions, areas and contours are the map's own; what an annotation does not have (probabilities, shape, stain) is
    drawn at random. Without a type map every nucleus is of class 1.
    """
    rows = []
    for label, where in enumerate(ndimage.find_objects(instances), start=1):
        if where is None:
            continue
        mask = np.asarray(instances[where] == label)
        dy, dx = where[0].start, where[1].start
        y, x = np.nonzero(mask)
        kind = 1 if types is None else int(np.bincount(types[where][mask], minlength=n_types)[1:].argmax()) + 1
        box = (dx, dy, where[1].stop, where[0].stop)
        rows.append(
            (y[0] + dy, x[0] + dx, x.mean() + dx + 0.5, y.mean() + dy + 0.5, len(y), box, kind, ring(mask, box))
        )
    rows.sort(key=lambda row: row[:2])
    n = len(rows)
    random = np.random.default_rng(seed)

    def unit() -> NDArray[np.float32]:
        return random.random(n, np.float32)

    column = list(zip(*rows, strict=True)) if rows else [()] * 8
    probs = random.random((n, n_types - 1), np.float32)
    return Annotated(
        anchor_y=np.array(column[0], np.int64),
        anchor_x=np.array(column[1], np.int64),
        centroid_x=np.array(column[2], np.float64),
        centroid_y=np.array(column[3], np.float64),
        area_px=np.array(column[4], np.int64),
        bbox=np.array(column[5], np.int64).reshape(-1, 4),
        perimeter_px=100 * unit(),
        major_axis_px=20 * unit(),
        minor_axis_px=10 * unit(),
        eccentricity=unit(),
        solidity=0.9 + 0.1 * unit(),
        type_id=np.array(column[6], np.uint8),
        type_prob=unit(),
        class_probs=probs / probs.sum(axis=1, keepdims=True),
        seg_score=unit(),
        h_od=unit(),
        e_od=unit(),
        seam_uncertain=random.random(n) < 0.1,
        contours=list(column[7]),
    )


def ring(mask: NDArray[np.bool_], box: tuple[int, int, int, int]) -> NDArray[np.float64]:
    """Closed ring (k, 2) of x, y through the centres of the outermost pixels, or the box where that is no polygon."""
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    points = max(found, key=len)[:, 0].astype(np.float64) + np.array(box[:2]) + 0.5
    if len(points) >= 3 and shapely.Polygon(points).is_valid:
        return np.concatenate([points, points[:1]])
    return np.array([(box[i], box[j]) for i, j in ((0, 1), (2, 1), (2, 3), (0, 3), (0, 1))], np.float64)


def take(nuclei: SimpleNamespace, rows: NDArray[np.bool_]) -> Annotated:
    """The nuclei where `rows` is true."""
    picked = {name: value[rows] for name, value in vars(nuclei).items() if name != "contours"}
    return Annotated(contours=[c for c, kept in zip(nuclei.contours, rows, strict=True) if kept], **picked)
