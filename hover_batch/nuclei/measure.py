"""Measurements of every nucleus in a window: position, shape, class, stain and outline.

Results do not depend on the window: sums are of integers relative to the instance's own anchor, and absolute positions
are added at the end. Shape features are those of the same names in `skimage.measure.regionprops`, computed for all
instances at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.outlines import outlines


@dataclass(frozen=True, eq=False)
class Nuclei:
    """Nuclei as columns of length n, in pixels of the inference grid, sorted by anchor (y, then x); `len` gives n."""

    anchor_y: NDArray[np.int64]
    """(n,): row of the first pixel in raster order, which decides the owning region."""
    anchor_x: NDArray[np.int64]
    """(n,): column of that pixel."""
    centroid_x: NDArray[np.float64]
    """(n,): mean x of the pixel centres, which lie at +0.5."""
    centroid_y: NDArray[np.float64]
    """(n,): mean y of the pixel centres."""
    area_px: NDArray[np.int64]
    """(n,): number of pixels."""
    bbox: NDArray[np.int64]
    """(n, 4): x0, y0, x1, y1 of the pixels, half-open."""
    perimeter_px: NDArray[np.float32]
    """(n,): `perimeter` of regionprops (4-connected border, diagonal steps weighted)."""
    major_axis_px: NDArray[np.float32]
    """(n,): major axis of the ellipse with the same second moments."""
    minor_axis_px: NDArray[np.float32]
    """(n,): minor axis of that ellipse."""
    eccentricity: NDArray[np.float32]
    """(n,): eccentricity of that ellipse, 0 for a circle."""
    solidity: NDArray[np.float32]
    """(n,): area divided by the number of pixels in the convex hull, border included."""
    type_id: NDArray[np.uint8]
    """(n,): class of most pixels; the runner-up if that is background; the most probable if all are background."""
    type_prob: NDArray[np.float32]
    """(n,): probability of that class, from `class_probs`."""
    class_probs: NDArray[np.float32]
    """(n, classes without background): mean softmax, renormalised without background; column k is class k + 1."""
    seg_score: NDArray[np.float32]
    """(n,): mean nucleus probability."""
    h_od: NDArray[np.float32]
    """(n,): mean hematoxylin optical density."""
    e_od: NDArray[np.float32]
    """(n,): mean eosin optical density."""
    seam_uncertain: NDArray[np.bool_]
    """(n,): whether the nucleus lies in a component that was too large to be processed whole."""
    contours: list[NDArray[np.float64]]
    """n rings (k, 2) of x, y through the centres of the border pixels; closed, each a valid polygon."""

    def __len__(self) -> int:
        return len(self.area_px)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Self:
        """Return a selection of the nuclei, in the order of `rows`.

        `rows`: indices (k,) int64, or a mask (n,) bool.
        """
        index = np.arange(len(self))[rows]
        columns = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "contours"}
        return type(self)(**columns, contours=[self.contours[i] for i in index])


def no_nuclei(n_types: int) -> Nuclei:
    """Return an empty `Nuclei`, whose class_probs is (0, n_types - 1).

    `n_types`: number of classes, background included.
    """
    layout = MapLayout(n_types)
    return measure(np.zeros((1, 1), np.int32), np.zeros((layout.planes, 1, 1), np.uint8), layout)


def concatenate(parts: Sequence[Nuclei]) -> Nuclei:
    """Return the nuclei of all `parts` of a slide as one `Nuclei`, sorted by anchor (y, then x).

    ValueError if `parts` is empty.
    """
    columns = {
        f.name: np.concatenate([getattr(part, f.name) for part in parts])
        for f in fields(Nuclei)
        if f.name != "contours"
    }
    unsorted = Nuclei(**columns, contours=[ring for part in parts for ring in part.contours])
    return unsorted.take(np.lexsort((unsorted.anchor_x, unsorted.anchor_y)))


def measure(
    instances: NDArray[np.int32], maps: NDArray[np.uint8], layout: MapLayout, origin: tuple[int, int] = (0, 0)
) -> Nuclei:
    """Return the measurements of every instance of a window, sorted by anchor (y, then x).

    `seam_uncertain` is False for all.

    `instances` (y, x) int32: 0 = background, 1 … n without gaps. `maps` (plane, y, x) uint8: stored maps of the same
    window. `layout`: layout of the planes of `maps`. `origin`: absolute (x, y) of the window's first pixel; it is added
    to all positions.
    """
    n = int(instances.max())
    maps = np.ascontiguousarray(maps)
    anchor, bounds, first_moments, area, votes = _places(instances, maps[layout.tp], n)
    second_moments, sums = _sums(
        instances, maps, anchor, bounds, layout.n_types, layout.NP, layout.tp.start, layout.hematoxylin, layout.eosin
    )
    x0, y0 = origin
    dx, dy = (first_moments / area[:, None]).T  # from the anchor to the centroid
    major, minor, eccentricity = _ellipse(second_moments / area[:, None], dx, dy)
    straight, diagonal, corner = _perimeter_pixels(instances, bounds).T
    type_id, class_probs = _classes(votes, sums[:, 1:-2])
    unsorted = Nuclei(
        anchor_y=anchor[:, 1] + y0,
        anchor_x=anchor[:, 0] + x0,
        centroid_x=anchor[:, 0] + x0 + dx + 0.5,
        centroid_y=anchor[:, 1] + y0 + dy + 0.5,
        area_px=area,
        bbox=bounds + np.array([x0, y0, x0, y0]),
        perimeter_px=_f32(straight + diagonal * math.sqrt(2) + corner * ((1 + math.sqrt(2)) / 2)),
        major_axis_px=_f32(major),
        minor_axis_px=_f32(minor),
        eccentricity=_f32(eccentricity),
        solidity=_f32(area / _hull_pixels(instances, bounds)),
        type_id=type_id.astype(np.uint8),
        type_prob=_f32(class_probs[np.arange(n), type_id - 1]),
        class_probs=_f32(class_probs),
        # A stored step s represents probabilities in [s, s + 1) / 256.
        seg_score=_f32((sums[:, 0] / area + 0.5) / 256),
        h_od=_f32(sums[:, -2] / area / layout.OD_SCALE),
        e_od=_f32(sums[:, -1] / area / layout.OD_SCALE),
        seam_uncertain=np.zeros(n, np.bool_),
        contours=outlines(instances, bounds, anchor[:, 0], area, origin),
    )
    return unsorted.take(np.lexsort((unsorted.anchor_x, unsorted.anchor_y)))


def _f32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return values.astype(np.float32)


def _ellipse(
    second_moments: NDArray[np.float64], dx: NDArray[np.float64], dy: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return major axis, minor axis and eccentricity (n,) from means of dx², dy², dx·dy (n, 3), dx and dy (n,)."""
    xx = second_moments[:, 0] - dx * dx
    yy = second_moments[:, 1] - dy * dy
    xy = second_moments[:, 2] - dx * dy
    middle = (xx + yy) / 2
    spread = np.sqrt(((xx - yy) / 2) ** 2 + xy * xy)
    large = middle + spread
    small = np.maximum(middle - spread, 0)
    ratio = np.divide(small, large, out=np.ones_like(large), where=large > 0)
    return 4 * np.sqrt(large), 4 * np.sqrt(small), np.sqrt(1 - ratio)


def _classes(votes: NDArray[np.int64], softmax: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return class ids (n,) and probabilities (n, classes - 1) from votes and softmax sums (n, classes)."""
    nuclear = softmax[:, 1:]
    total = nuclear.sum(axis=1, keepdims=True)
    # If the background has probability 1 in every pixel, the class is unknown: all are equally probable.
    equal = np.full(nuclear.shape, 1 / nuclear.shape[1])
    probs = np.divide(nuclear, total, out=equal, where=total > 0)
    voted = votes[:, 1:].max(axis=1) > 0
    # argmax takes the first of equal values, the lower id.
    return np.where(voted, votes[:, 1:].argmax(axis=1), nuclear.argmax(axis=1)) + 1, probs


@njit(cache=True, nogil=True)
def _places(
    instances: NDArray[np.int32], softmax: NDArray[np.uint8], n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return positions and class votes of the instances 1 … n, in rows 0 … n - 1, in one pass over the window.

    `instances` (y, x), `softmax` (class, y, x). Returns the anchor (n, 2) x, y; bounds (n, 4) x0, y0, x1, y1,
    half-open; Σ dx, Σ dy (n, 2) about the anchor; the number of pixels (n,); and for each class the number of pixels of
    which it is the most probable one, the lower id if several are equal (n, classes).
    """
    classes = len(softmax)
    anchor = np.zeros((n, 2), np.int64)
    bounds = np.zeros((n, 4), np.int64)
    first_moments = np.zeros((n, 2), np.int64)
    area = np.zeros(n, np.int64)
    votes = np.zeros((n, classes), np.int64)
    height, width = instances.shape
    for y in range(height):
        for x in range(width):
            i = instances[y, x] - 1
            if i < 0:
                continue
            if area[i] == 0:
                anchor[i, 0], anchor[i, 1] = x, y
                bounds[i, 0], bounds[i, 1], bounds[i, 2] = x, y, x + 1
            bounds[i, 0] = min(bounds[i, 0], x)
            bounds[i, 2] = max(bounds[i, 2], x + 1)
            bounds[i, 3] = y + 1
            first_moments[i, 0] += x - anchor[i, 0]
            first_moments[i, 1] += y - anchor[i, 1]
            area[i] += 1
            likeliest, most = 0, softmax[0, y, x]
            for k in range(1, classes):
                if softmax[k, y, x] > most:
                    likeliest, most = k, softmax[k, y, x]
            votes[i, likeliest] += 1
    return anchor, bounds, first_moments, area, votes


@njit(cache=True, nogil=True)
def _sums(
    instances: NDArray[np.int32],
    maps: NDArray[np.uint8],
    anchor: NDArray[np.int64],
    bounds: NDArray[np.int64],
    n_types: int,
    np_plane: int,
    tp_start: int,
    hematoxylin: int,
    eosin: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sums over the pixels of the instances 1 … n, in rows 0 … n - 1.

    These are Σ dx², Σ dy², Σ dx·dy (n, 3) about the `anchor` (n, 2); and Σ np, Σ of each class's softmax,
    Σ hematoxylin, Σ eosin (n, 3 + n_types). `bounds` (n, 4): boxes of the instances. `np_plane`, `tp_start`,
    `hematoxylin`, `eosin`: planes of `maps`.
    """
    second_moments = np.zeros((len(anchor), 3), np.int64)
    sums = np.zeros((len(anchor), 3 + n_types), np.int64)
    for i in range(len(anchor)):
        x0, y0, x1, y1 = bounds[i]
        for y in range(y0, y1):
            for x in range(x0, x1):
                if instances[y, x] != i + 1:
                    continue
                dx, dy = x - anchor[i, 0], y - anchor[i, 1]
                second_moments[i, 0] += dx * dx
                second_moments[i, 1] += dy * dy
                second_moments[i, 2] += dx * dy
                sums[i, 0] += maps[np_plane, y, x]
                for k in range(n_types):
                    sums[i, 1 + k] += maps[tp_start + k, y, x]
                sums[i, 1 + n_types] += maps[hematoxylin, y, x]
                sums[i, 2 + n_types] += maps[eosin, y, x]
    return second_moments, sums


@njit(cache=True, nogil=True)
def _perimeter_pixels(instances: NDArray[np.int32], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers (n, 3) of border pixels with weights 1, √2 and (1 + √2) / 2 in each instance's perimeter.

    A border pixel has a 4-connected neighbour outside of its instance. Its weight follows the rule of
    `skimage.measure.perimeter` (Benkrid & Crookes), by a code that counts the border pixels of its instance around it:
    1, plus 2 for each 4-connected one and 10 for each diagonal one. `bounds` (n, 4): boxes of the instances.
    """
    counts = np.zeros((len(bounds), 3), np.int64)
    for i in range(len(bounds)):
        x0, y0, x1, y1 = bounds[i]
        height, width = y1 - y0, x1 - x0
        own = np.zeros((height + 2, width + 2), np.uint8)
        for y in range(height):
            for x in range(width):
                own[y + 1, x + 1] = instances[y0 + y, x0 + x] == i + 1
        border = np.zeros((height + 2, width + 2), np.uint8)
        for y in range(1, height + 1):
            for x in range(1, width + 1):
                border[y, x] = own[y, x] & ~(own[y - 1, x] & own[y + 1, x] & own[y, x - 1] & own[y, x + 1])
        for y in range(1, height + 1):
            for x in range(1, width + 1):
                if not border[y, x]:
                    continue
                straight = border[y - 1, x] + border[y, x - 1] + border[y, x + 1] + border[y + 1, x]
                diagonal = border[y - 1, x - 1] + border[y - 1, x + 1] + border[y + 1, x - 1] + border[y + 1, x + 1]
                code = 1 + 2 * straight + 10 * diagonal
                if code in (5, 7, 15, 17, 25, 27):
                    counts[i, 0] += 1
                elif code in (21, 33):
                    counts[i, 1] += 1
                elif code in (13, 23):
                    counts[i, 2] += 1
    return counts


@njit(cache=True, nogil=True)
def _hull_pixels(instances: NDArray[np.int32], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number (n,) of pixels whose centres lie in the convex hull of each instance, border included.

    As in `skimage.morphology.convex_hull_image`, it is the hull of the midpoints of all pixel edges. Coordinates are
    doubled, so that these are integers. The right side of the hull is computed like the left one, from negated x.
    """
    counts = np.zeros(len(bounds), np.int64)
    for i in range(len(bounds)):
        x0, y0, x1, y1 = bounds[i]
        rows = y1 - y0
        far = 4 * (x1 - x0 + 1)
        left = np.full(2 * rows + 1, far, np.int64)
        right = np.full(2 * rows + 1, far, np.int64)
        for y in range(rows):
            for x in range(x1 - x0):
                if instances[y0 + y, x0 + x] == i + 1:
                    for row, reach in ((2 * y, 0), (2 * y + 1, 1), (2 * y + 2, 0)):
                        left[row] = min(left[row], 2 * x - reach)
                        right[row] = min(right[row], -2 * x - reach)
        first = _hull_side(left, far)
        last = _hull_side(right, far)
        for y in range(rows):
            counts[i] += -last[y] - first[y] + 1
    return counts


@njit(cache=True, nogil=True)
def _hull_side(left: NDArray[np.int64], far: int) -> NDArray[np.int64]:
    """Return the first pixel (rows,) of each row whose centre lies in the convex hull.

    `left` (2·rows + 1,): smallest doubled x of the points in each doubled row; `far` where a row has no point. The
    centre of pixel row y is the doubled row 2·y + 1.
    """
    corners = np.zeros(len(left), np.int64)
    n = 0
    for c in range(len(left)):
        if left[c] == far:
            continue
        while n >= 2:
            a, b = corners[n - 2], corners[n - 1]
            if (left[b] - left[a]) * (c - a) < (left[c] - left[a]) * (b - a):
                break
            n -= 1
        corners[n] = c
        n += 1
    first = np.zeros(len(left) // 2, np.int64)
    for k in range(n - 1):
        a, b = corners[k], corners[k + 1]
        for row in range(a, b + 1):
            if row % 2 == 1:
                crossing = left[a] * (b - a) + (left[b] - left[a]) * (row - a)
                first[row // 2] = -((-crossing) // (2 * (b - a)))
    return first
