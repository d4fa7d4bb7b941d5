"""Pictures of nuclei side by side: crops with outlines in the colours of their classes, captions above the columns."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from hover_batch.taxonomy import NUCLEI, NucleusClass, Taxonomy

SCALE = 2
"""Crops are shown this much larger, so that an outline of one pixel covers little of the nucleus."""
GAP = 8
STRIP = 28
"""Height in pixels of the captions and of the key."""
NO_CLASS = (60, 60, 60)


def outlined(
    image: NDArray[np.uint8],
    instances: NDArray[np.integer],
    types: NDArray[np.integer] | None,
    taxonomy: Taxonomy,
) -> NDArray[np.uint8]:
    """The image (y, x, 3) uint8 RGB, SCALE times as large, with the outermost pixels of each instance coloured.

    instances (y, x), 0 = background; types (y, x): class ids of `taxonomy`, or None where there are none.
    """
    height, width = instances.shape
    large = np.asarray(
        cv2.resize(image, (width * SCALE, height * SCALE), interpolation=cv2.INTER_CUBIC), np.uint8
    ).copy()
    labels = instances.repeat(SCALE, 0).repeat(SCALE, 1)
    around = np.pad(labels, 1, mode="edge")
    same = (
        (around[:-2, 1:-1] == labels)
        & (around[2:, 1:-1] == labels)
        & (around[1:-1, :-2] == labels)
        & (around[1:-1, 2:] == labels)
    )
    edge = (labels > 0) & ~same
    if types is None:
        large[edge] = NUCLEI.classes[1].color
    else:
        colors = np.array([NO_CLASS, *(c.color for c in taxonomy.nuclei)], np.uint8)
        large[edge] = colors[types.repeat(SCALE, 0).repeat(SCALE, 1)[edge]]
    return large


def panel(
    columns: list[str], rows: list[list[NDArray[np.uint8]]], key: Sequence[NucleusClass] = ()
) -> NDArray[np.uint8]:
    """One picture (y, x, 3) uint8 RGB: a caption above each column, the cells of each row side by side, all of one
    size, and below them the key: the names of the classes in their colours."""
    height, width = rows[0][0].shape[:2]
    lines = [_row([_caption(name, width) for name in columns])]
    lines += [_row(cells) for cells in rows]
    if key:
        lines.append(_key(key, lines[0].shape[1]))
    gap = np.full((GAP, lines[0].shape[1], 3), 255, np.uint8)
    return np.vstack([part for line in lines for part in (line, gap)])


def _row(cells: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    gap = np.full((cells[0].shape[0], GAP, 3), 255, np.uint8)
    return np.hstack([gap, *(part for cell in cells for part in (cell, gap))])


def _caption(text: str, width: int) -> NDArray[np.uint8]:
    strip = np.full((STRIP, width, 3), 255, np.uint8)
    (length, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 1)
    _write(strip, text, max(0, (width - length) // 2))
    return strip


def _key(classes: Sequence[NucleusClass], width: int) -> NDArray[np.uint8]:
    """As many lines as it takes."""
    lines, x = [np.full((STRIP, width, 3), 255, np.uint8)], GAP
    for kind in classes:
        (length, _), _ = cv2.getTextSize(kind.name, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 1)
        if x + 20 + length > width and x > GAP:
            lines.append(np.full((STRIP, width, 3), 255, np.uint8))
            x = GAP
        lines[-1][7:21, x : x + 14] = kind.color
        _write(lines[-1], kind.name, x + 20)
        x += length + 44
    return np.vstack(lines)


def _write(strip: NDArray[np.uint8], text: str, x: int) -> None:
    cv2.putText(strip, text, (x, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
