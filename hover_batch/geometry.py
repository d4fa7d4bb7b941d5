"""Sizes, boxes and the two pixel grids: level 0 of the slide and the inference grid.

Axis order: names say x (columns) and y (rows); arrays are always (…, y, x). A pixel (i, j) covers [i, i+1) × [j, j+1),
so its centre lies at +0.5. Both grids start at slide (0, 0), so a level-0 position is an inference position × scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Size in pixels of one grid, level 0 or inference."""

    width: int
    """Number of columns."""
    height: int
    """Number of rows."""

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.width * self.height

    @property
    def box(self) -> Box:
        """Box of this size with its upper left corner at (0, 0)."""
        return Box(0, 0, self.width, self.height)


@dataclass(frozen=True, order=True)
class Box:
    """Half-open rectangle [x0, x1) × [y0, y1) of whole pixels of one grid. It may extend beyond the canvas."""

    x0: int
    """First column."""
    y0: int
    """First row."""
    x1: int
    """Column after the last."""
    y1: int
    """Row after the last."""

    @property
    def width(self) -> int:
        """Number of pixel columns; 0 if the box is empty."""
        return max(0, self.x1 - self.x0)

    @property
    def height(self) -> int:
        """Number of pixel rows; 0 if the box is empty."""
        return max(0, self.y1 - self.y0)

    @property
    def empty(self) -> bool:
        """True if the box holds no pixel."""
        return self.width == 0 or self.height == 0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (height, width) of an array that covers the box."""
        return self.height, self.width

    def intersect(self, other: Box) -> Box:
        """Return the intersection of the box and `other`; empty (width or height 0) if they are disjoint."""
        return Box(max(self.x0, other.x0), max(self.y0, other.y0), min(self.x1, other.x1), min(self.y1, other.y1))

    def expand(self, margin: int) -> Box:
        """Return the box expanded by `margin` pixels on every side; a negative margin shrinks it."""
        return Box(self.x0 - margin, self.y0 - margin, self.x1 + margin, self.y1 + margin)

    def contains(self, x: int, y: int) -> bool:
        """Return whether the pixel (x, y) lies in the box."""
        return self.x0 <= x < self.x1 and self.y0 <= y < self.y1

    def contains_box(self, other: Box) -> bool:
        """Return whether `other` lies entirely in this box; edges may coincide."""
        return self.x0 <= other.x0 and self.y0 <= other.y0 and other.x1 <= self.x1 and other.y1 <= self.y1

    def slices_in(self, frame: Box) -> tuple[slice, slice]:
        """Return the slices (y, x) of this box in an array that covers the box `frame`.

        ValueError if this box extends beyond `frame`.
        """
        if not frame.contains_box(self):
            raise ValueError(f"{self} does not lie inside {frame}")
        return slice(self.y0 - frame.y0, self.y1 - frame.y0), slice(self.x0 - frame.x0, self.x1 - frame.x0)

    def cells(self, side: int) -> Iterator[tuple[int, int]]:
        """Yield the (column, row) of each cell that this box intersects, in raster order; nothing for an empty box.

        The cells are squares of `side` pixels in a grid that starts at (0, 0).
        """
        if self.empty:
            return
        for row in range(self.y0 // side, (self.y1 - 1) // side + 1):
            for column in range(self.x0 // side, (self.x1 - 1) // side + 1):
                yield column, row


def cell_box(column: int, row: int, side: int) -> Box:
    """Return the box of the cell (`column`, `row`) in a grid of squares that starts at (0, 0).

    `side`: side of a square in pixels.
    """
    return Box(column * side, row * side, (column + 1) * side, (row + 1) * side)


@dataclass(frozen=True)
class Mpp:
    """Pixel size in µm. ValueError unless both sizes lie between 0 and 1000, exclusive.

    `str()` gives `x`, or `x × y` if they differ, with four digits.
    """

    x: float
    """Width of a pixel in µm."""
    y: float
    """Height of a pixel in µm."""

    def __post_init__(self) -> None:
        if not (0 < self.x < 1000 and 0 < self.y < 1000):
            raise ValueError(f"a pixel size must lie between 0 and 1000 µm, not {self.x} × {self.y}")

    def __str__(self) -> str:
        return f"{self.x:.4g}" if self.x == self.y else f"{self.x:.4g} × {self.y:.4g}"


def qupath_origin(bounds: Box | None) -> tuple[int, int]:
    """Return the level-0 pixel (x, y) that is QuPath's (0, 0).

    It is the upper left corner of OpenSlide's bounds, to which QuPath crops a slide, or (0, 0) without bounds.

    `bounds`: bounds of the slide in level-0 pixels; None if it has none.
    """
    return (0, 0) if bounds is None else (bounds.x0, bounds.y0)


SNAP = 0.02
"""Relative deviation from a power of two up to which the scale is rounded to that power. The network is insensitive to
2 %, whereas interpolation at a drifting phase would blur some pixels and not others."""


@dataclass(frozen=True)
class Grid:
    """Grid of pixels of the model's size over level 0 of one slide, starting at its upper left corner."""

    level0: Size
    """Size of the canvas in level-0 pixels."""
    scale_x: float
    """Level-0 pixels per inference pixel along x."""
    scale_y: float
    """Level-0 pixels per inference pixel along y."""
    mpp: Mpp
    """Size of an inference pixel in µm, within SNAP of the model's."""
    size: Size
    """Number of inference pixels that cover the canvas; the last ones may extend beyond it."""

    @classmethod
    def over(cls, level0: Size, slide_mpp: Mpp, model_mpp: float) -> Grid:
        """Return the grid of a model over a slide.

        A scale within SNAP of a power of two is rounded to it, separately along x and y. ValueError if a pixel of the
        grid would be 1000 µm or larger.

        `level0`: size of the slide in level-0 pixels. `slide_mpp`: size of a level-0 pixel in µm. `model_mpp`: side of
        the model's pixels in µm.
        """
        return cls.scaled(level0, slide_mpp, _snap(model_mpp / slide_mpp.x), _snap(model_mpp / slide_mpp.y))

    @classmethod
    def scaled(cls, level0: Size, slide_mpp: Mpp, scale_x: float, scale_y: float) -> Grid:
        """Return a grid over a whole slide whose pixels are `scale_x` × `scale_y` level-0 pixels.

        `level0`: size of the slide in level-0 pixels. `slide_mpp`: size of a level-0 pixel in µm.

        ValueError if the size of the grid's pixels is not between 0 and 1000 µm.
        """
        return cls(
            level0=level0,
            scale_x=scale_x,
            scale_y=scale_y,
            mpp=Mpp(slide_mpp.x * scale_x, slide_mpp.y * scale_y),
            size=Size(_cover(level0.width, scale_x), _cover(level0.height, scale_y)),
        )


def _snap(scale: float) -> float:
    power = 2.0 ** round(math.log2(scale))
    return power if abs(scale / power - 1) <= SNAP else scale


def _cover(extent: int, scale: float) -> int:
    # An excess of less than a millionth of a pixel is a rounding error.
    return max(1, math.ceil(extent / scale - 1e-6))
