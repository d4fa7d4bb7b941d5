"""Write compare.html: a single file whose text is escaped, and which loads nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

from hover_batch.compare.agreement import CELL, Dispute
from hover_batch.compare.fields import Field
from hover_batch.nuclei.image import types_by_id
from hover_batch.nuclei.measure import Nuclei
from hover_batch.report.pictures import data_uri
from hover_batch.taxonomy import Taxonomy

AROUND = 32
"""Pixels around the cell that a panel shows."""
ZOOM = 2
"""Pixels of the panel for each pixel of the field."""
WIDTH, HEIGHT = 420, 220
"""Size of the chart's plotting area in SVG units."""


@dataclass(frozen=True)
class Panel:
    """Pictures of a cell in which the networks disagree, and its surroundings."""

    slide_id: str
    """Slide of the cell."""
    x: int
    """Left edge of the cell in inference pixels of the slide."""
    y: int
    """Upper edge of the cell in inference pixels of the slide."""
    alone: int
    """Number of nuclei in the cell that only one network found."""
    pictures: tuple[str, ...]
    """PNG data URIs: the plain pixels, then one per network with its contours in the colours of its classes."""

    @classmethod
    def of(cls, field: Field, dispute: Dispute, results: Sequence[tuple[NDArray[np.int32], Nuclei, Taxonomy]]) -> Panel:
        """Return the pictures of `dispute`, a cell of `field`, with AROUND pixels on each side, enlarged ZOOM times.

        `results`: for each network, the instances (y, x) int32 of the field, their measurements, and its classes.
        """
        height, width = field.image.shape[:2]
        rows = slice(max(0, dispute.y - AROUND), min(height, dispute.y + CELL + AROUND))
        columns = slice(max(0, dispute.x - AROUND), min(width, dispute.x + CELL + AROUND))
        plain = _large(field.image[rows, columns])
        pictures = [plain]
        for instances, nuclei, taxonomy in results:
            drawn = plain.copy()
            if len(nuclei):
                ids = np.unique(instances[instances > 0])
                colors = np.zeros((int(ids[-1]) + 1, 3), np.uint8)
                colors[ids] = [taxonomy.classes[t].color for t in types_by_id(instances, nuclei)]
                enlarged = _large(instances[rows, columns])
                edge = find_boundaries(enlarged, mode="inner")  # type: ignore[no-untyped-call]
                drawn[edge] = colors[enlarged[edge]]
            pictures.append(drawn)
        return cls(
            field.slide_id,
            field.box.x0 + dispute.x,
            field.box.y0 + dispute.y,
            dispute.alone,
            tuple(data_uri(picture[..., ::-1], ".png") for picture in pictures),
        )


def _large(image: NDArray[Any]) -> NDArray[Any]:
    """Enlarge an image (y, x, …) ZOOM times, without interpolation."""
    return np.repeat(np.repeat(image, ZOOM, axis=0), ZOOM, axis=1)


def render(content: dict[str, Any], panels: Sequence[Panel]) -> str:
    """Return the page compare.html as HTML text.

    `content`: content of compare.json. `panels`: pictures of disagreements, largest first.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hover_batch.compare"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("compare.html").render(
        found=content, panels=panels, chart=_chart(content["sides"]), width=WIDTH, height=HEIGHT
    )


def _chart(sides: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the chart of seconds per patch over batch size, on logarithmic axes; None if nothing was timed."""
    points = [{int(b): s for b, s in side["seconds_per_patch"].items()} for side in sides]
    seconds = [s for curve in points for s in curve.values()]
    if not seconds:
        return None
    batches = sorted({b for curve in points for b in curve})
    low, high = math.log10(min(seconds)), math.log10(max(seconds))
    span, widest = max(high - low, 1e-9), math.log2(batches[-1]) or 1.0

    def place(batch: int, value: float) -> str:
        return f"{math.log2(batch) / widest * WIDTH:.1f},{HEIGHT * (1 - (math.log10(value) - low) / span):.1f}"

    return {
        "lines": [" ".join(place(b, s) for b, s in sorted(curve.items())) for curve in points],
        "ticks": [(math.log2(b) / widest * WIDTH, b) for b in batches],
        "low": 10**low,
        "high": 10**high,
    }
