"""Nuclei of one region, independent of where the seams between regions fall.

Invariant: the result for a component of the foreground depends only on that component and the maps within MARGIN of
it, not on the core, the halo or the window. So the nuclei of the cores of any tiling, taken together, are those of the
whole slide, bit for bit. This holds for every `Splitter`, hence for fixed Sobel constants; `window` normalisation uses
the extremes of each region's window and is not invariant.

- A component with pixels in the core that does not touch the window's margin is processed in place.
- One that touches the margin is read until it is complete, and processed on its own around its bounding box.
- One with a side above `PostSettings.max_component` is cut, to bound memory, along the cells of that side in a grid
  that starts at (0, 0), so that the cuts are the same for every tiling. Each cell reports the instances anchored in
  it, with SEAM_VIEW pixels of context, so nuclei at the cuts are found once unless the two views disagree. All
  instances of such a component are flagged `seam_uncertain`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hover_batch.config import PostSettings
from hover_batch.geometry import Box, cell_box
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.components import Components, Splitter
from hover_batch.nuclei.measure import Nuclei, concatenate, measure, no_nuclei
from hover_batch.nuclei.regions import MARGIN, clear_of_margin, owned
from hover_batch.nuclei.watershed import SobelConstants

SEAM_VIEW = 80
"""Context in pixels around a cell of a component that is cut: a large nucleus and MARGIN."""
FIRST_STEP = 128
"""First step in pixels of the search for a component's end; later steps are half of its extent so far."""

Read = Callable[[Box], NDArray[np.uint8]]
"""Function from a box in absolute inference pixels to its maps (plane, y, x) uint8."""


def nuclei_of_region(
    read: Read, core: Box, layout: MapLayout, settings: PostSettings, splitter: Splitter | None
) -> Nuclei:
    """Return the nuclei that the region `core` owns, in absolute pixels of the inference grid, sorted by anchor.

    More than `core` and its halo is read if a component of the foreground continues beyond it.

    `read`: returns the maps (plane, y, x) uint8 of any box, in the planes of `layout`, with zeros outside of the canvas
    and where nothing was predicted; its exceptions propagate. `core`: box in absolute inference pixels. `settings`:
    halo, largest component, and number of pixels below which nuclei are dropped. `splitter`: post-processing of the
    model's system; None for HoVerNet's with the extremes of this region's window, for `--sobel-norm window`.
    """
    view = _View.of(read, core.expand(settings.halo), layout)
    if splitter is None:
        splitter = SobelConstants.of_window(view.maps[layout.H], view.maps[layout.V])
    in_core = view.components_in(core)
    whole = in_core & clear_of_margin(view.components.bounds, view.window) & (view.sides <= settings.max_component)
    parts = [view.nuclei(whole, splitter)]
    oversized = np.zeros_like(in_core)
    pending = in_core & ~whole
    while pending.any():
        followed, component = _follow(read, view, int(pending.argmax()), settings.max_component)
        # Parts that are separate in the region's window may join outside of it and are then one component.
        joined = np.zeros_like(pending)
        for candidate in np.flatnonzero(pending).tolist():
            joined[candidate] = followed.component_at(*view.pixel_of(candidate)) == component
        pending &= ~joined
        if followed.sides[component] > settings.max_component:
            oversized |= joined
        else:
            parts.append(followed.nuclei_alone(component, splitter))
    if oversized.any():
        for column, row in core.cells(settings.max_component):
            cell = cell_box(column, row, settings.max_component)
            parts.append(_nuclei_of_cell(read, view, oversized, core, cell, splitter))
    nuclei = owned(core, concatenate(parts))
    return nuclei.take(nuclei.area_px >= settings.min_area_px)


def load_kernels(layout: MapLayout, splitter: Splitter | None) -> None:
    """Run post-processing once on a small artificial region, to load its compiled functions into memory.

    Otherwise, each process would wait for them at its first region. If numba's cache does not have them, they are
    compiled; this takes longer.

    `layout`: planes of the maps that will be processed. `splitter`: post-processing of the model's system; None for
    HoVerNet's with each window's extremes.
    """

    def square(box: Box) -> NDArray[np.uint8]:
        maps = np.zeros((layout.planes, box.height, box.width), np.uint8)
        maps[:, 80:100, 80:100] = MapLayout.NP_NUCLEUS
        return maps

    nuclei_of_region(square, Box(0, 0, 64, 64), layout, PostSettings(), splitter)


@dataclass(frozen=True)
class _View:
    """Maps (plane, y, x) of a window and the components of its foreground. Positions are absolute."""

    window: Box
    maps: NDArray[np.uint8]
    layout: MapLayout
    components: Components

    @classmethod
    def of(cls, read: Read, window: Box, layout: MapLayout) -> Self:
        """Read the maps of a window and label their components."""
        maps = read(window)
        return cls(window, maps, layout, Components.of(maps[layout.NP]))

    @property
    def sides(self) -> NDArray[np.int64]:
        """Longer side of each component's bounding box: (n,) int64, in pixels."""
        bounds = self.components.bounds
        return np.asarray((bounds[:, 2:] - bounds[:, :2]).max(axis=1))

    def box(self, component: int) -> Box:
        """Return the bounding box of a component."""
        box = self.components.box(component)
        x, y = self.window.x0, self.window.y0
        return Box(box.x0 + x, box.y0 + y, box.x1 + x, box.y1 + y)

    def component_at(self, x: int, y: int) -> int:
        """Return the component at a pixel; 0 on the background and outside of the window."""
        if not self.window.contains(x, y):
            return 0
        return int(self.components.labels[y - self.window.y0, x - self.window.x0])

    def pixel_of(self, component: int) -> tuple[int, int]:
        """Return (x, y) of the component's first pixel, in raster order, in this window."""
        box = self.box(component)
        x = int((self.components.labels[box.slices_in(self.window)][0] == component).argmax())
        return box.x0 + x, box.y0

    def components_in(self, area: Box) -> NDArray[np.bool_]:
        """Return which components have a pixel in `area`, which lies in the window and is not empty: (n,) bool."""
        x, y = self.window.x0, self.window.y0
        low, high = (area.x0 - x, area.y0 - y), (area.x1 - x, area.y1 - y)
        bounds = self.components.bounds
        present = np.all((bounds[:, :2] >= low) & (bounds[:, 2:] <= high), axis=1)
        # Being connected, any other one has a pixel in the area's outermost rows or columns.
        inside = self.components.labels[area.slices_in(self.window)]
        for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            present[edge] = True
        present[0] = False
        return np.asarray(present, np.bool_)

    def nuclei(self, chosen: NDArray[np.bool_], splitter: Splitter) -> Nuclei:
        """Return the nuclei of the `chosen` (n,) components."""
        if not chosen.any():
            return no_nuclei(self.layout.n_types)
        origin = self.window.x0, self.window.y0
        planes = self.maps[self.layout.H : self.layout.V + 1]
        instances = splitter.split(planes, self.components, chosen)
        return measure(instances, self.maps, self.layout, origin)

    def nuclei_alone(self, component: int, splitter: Splitter) -> Nuclei:
        """Return the nuclei of one component, from the maps within MARGIN of it."""
        window = self.box(component).expand(MARGIN)
        rows, columns = window.slices_in(self.window)
        cropped = _View.of(lambda _: self.maps[:, rows, columns], window, self.layout)
        chosen = np.zeros(len(cropped.components.pixels), np.bool_)
        chosen[cropped.component_at(*self.pixel_of(component))] = True
        return cropped.nuclei(chosen, splitter)


def _follow(read: Read, view: _View, component: int, max_side: int) -> tuple[_View, int]:
    """Grow `view` until a component that touches its margin is complete or has a side above `max_side`.

    Return the grown view and the component's number in it. The view grows geometrically, towards the sides that the
    component reaches.
    """
    pixel = view.pixel_of(component)
    while view.sides[component] <= max_side:
        box, inner = view.box(component), view.window.expand(-MARGIN)
        if inner.contains_box(box):
            break
        step = max(FIRST_STEP, int(view.sides[component]) // 2)
        reach = Box(
            box.x0 - (step if box.x0 < inner.x0 else MARGIN),
            box.y0 - (step if box.y0 < inner.y0 else MARGIN),
            box.x1 + (step if box.x1 > inner.x1 else MARGIN),
            box.y1 + (step if box.y1 > inner.y1 else MARGIN),
        )
        # Any component that contains this box, with sides of at most `max_side`, lies in this frame.
        frame = Box(box.x1 - max_side, box.y1 - max_side, box.x0 + max_side, box.y0 + max_side).expand(MARGIN)
        view = _View.of(read, reach.intersect(frame), view.layout)
        component = view.component_at(*pixel)
    return view, component


def _nuclei_of_cell(
    read: Read, view: _View, oversized: NDArray[np.bool_], core: Box, cell: Box, splitter: Splitter
) -> Nuclei:
    """Return the flagged nuclei that `core` owns in one cell of the `oversized` (n,) components of its `view`."""
    area = cell.intersect(core)
    cut = oversized[view.components.labels[area.slices_in(view.window)]]
    if not cut.any():
        return no_nuclei(view.layout.n_types)
    cell_view = _View.of(read, cell.expand(SEAM_VIEW), view.layout)
    chosen = np.zeros(len(cell_view.components.pixels), np.bool_)
    chosen[cell_view.components.labels[area.slices_in(cell_view.window)][cut]] = True
    nuclei = owned(area, cell_view.nuclei(chosen, splitter))
    return replace(nuclei, seam_uncertain=np.ones(len(nuclei), np.bool_))
