"""Random views of an annotated image.

Geometry changes image, labels and a teacher's output alike, appearance only the image.

========== ============================================== ===========================================
kind       geometry                                       appearance
========== ============================================== ===========================================
full       place, any turn, flip, scale                   stain, color, tone, sharpness, noise, JPEG
turns      place, right-angle turn, flip                  color and blur
color      place                                          color and blur
none       place                                          as it is
========== ============================================== ===========================================

The ranges are meant to cover scanners and stains: 20× slides are seen upsampled (hence the loss of resolution), JPEG
tiles are common (hence recompression), H and E vary independently between laboratories (hence stain jitter), and
some scanners sharpen and darken until nuclei are black (hence gamma and unsharp masks).

A teacher's h and v can be turned by right angles only. Each is scaled by the extents of the nucleus along its own axis,
so those of a turned nucleus are not a mixture of the two. Right-angle turns and flips swap and negate them, and scaling
leaves them unchanged; with a teacher, `full` is limited to these.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from hover_batch.model.heads import HV
from kd.data.appearance import color_and_blur, random_appearance
from kd.data.datasets import Sample

LABEL_MARGIN = 32
"""Pixels by which labels extend beyond the image on each side, so that a nucleus at the edge of the crop has the
distances of the whole nucleus, as when tiles are predicted with a margin."""

SCALE = (0.8, 1.25)
RIGHT = math.pi / 2


class View(NamedTuple):
    """A training crop before its targets are computed.

    `image`: (size, size, 3) uint8 RGB. `instances` int32 and `types` uint8: square, size + 2 × LABEL_MARGIN; types are
    0 if the sample has none. `planes`: the teacher's output (c, size, size) float32, or None.
    """

    image: NDArray[np.uint8]
    instances: NDArray[np.int32]
    types: NDArray[np.uint8]
    planes: NDArray[np.float32] | None


def random_view(
    sample: Sample,
    size: int,
    rng: np.random.Generator,
    kind: str = "full",
    planes: NDArray[np.float16] | None = None,
) -> View:
    """Return a crop of `size` pixels a side, changed at random as `kind` says (see the table above).

    `planes`: the teacher's output (c, y, x) for the whole image, as in `hover_batch.model.heads`.
    """
    view = random_geometry(sample, size, rng, kind, planes)
    if kind == "full":
        return view._replace(image=random_appearance(view.image, rng))
    if kind != "none":
        return view._replace(image=color_and_blur(view.image, rng))
    return view


def random_geometry(
    sample: Sample,
    size: int,
    rng: np.random.Generator,
    kind: str = "full",
    planes: NDArray[np.float16] | None = None,
) -> View:
    """Crop, turn, flip and scale by one affine map; the image part of the view lies inside the source.

    The image must be at least `size` pixels a side.
    """
    scale, angle, flip = 1.0, 0.0, 1
    if kind == "full":
        scale = math.exp(rng.uniform(math.log(SCALE[0]), math.log(SCALE[1])))
        free = planes is None and rng.random() < 0.5
        angle = rng.uniform(0, 2 * math.pi) if free else rng.integers(4) * RIGHT
    elif kind == "turns":
        angle = rng.integers(4) * RIGHT
    if kind in ("full", "turns"):
        flip = 1 if rng.random() < 0.5 else -1
    height, width = sample.instances.shape
    small = 2 * _reach(size, angle, scale) > min(height, width)
    if small:
        # The image is hardly larger than the view, as in PanNuke; nothing is known beyond it, so the view stays inside.
        angle = round(angle / RIGHT) * RIGHT
        if kind == "full":
            scale = max(scale, size / min(height, width))
    # Source offset of a step of one view pixel along x and along y.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    step = np.array([[cos, -sin * flip], [sin, cos * flip]])
    reach = _reach(size, angle, scale)
    centre = np.array([_uniform_inside(width, reach, rng), _uniform_inside(height, reach, rng)])
    if small or kind != "full":
        centre -= 0.5  # from edges to centres of pixels, so that a view that just fits is not off by half a pixel
    if kind != "full":  # pixels fall on pixels
        step = np.rint(step)
        half = step @ np.array([size / 2 - 0.5, size / 2 - 0.5])
        centre = np.rint(centre - half) + half

    def warp(array: NDArray[Any], side: int, interpolation: int) -> NDArray[Any]:
        offset = centre - step @ np.array([side / 2 - 0.5, side / 2 - 0.5])
        matrix = np.hstack([step, offset[:, None]])
        border = cv2.BORDER_REFLECT_101 if interpolation != cv2.INTER_NEAREST else cv2.BORDER_CONSTANT
        return np.asarray(
            cv2.warpAffine(array, matrix, (side, side), flags=interpolation | cv2.WARP_INVERSE_MAP, borderMode=border)
        )

    image = warp(sample.image, size, cv2.INTER_LINEAR)
    wide = size + 2 * LABEL_MARGIN
    # OpenCV warps no int32; float32 holds ids up to 2^24 exactly.
    instances = warp(sample.instances.astype(np.float32), wide, cv2.INTER_NEAREST).astype(np.int32)
    if sample.types is None:
        types = np.zeros((wide, wide), np.uint8)
    else:
        types = warp(sample.types, wide, cv2.INTER_NEAREST).astype(np.uint8)
    if planes is None:
        return View(image.astype(np.uint8), instances, types, None)
    # Nearest neighbour, as for labels: where nuclei touch, h and v jump from 1 to -1 without values in between.
    warped = np.stack([warp(plane.astype(np.float32), size, cv2.INTER_NEAREST) for plane in planes])
    warped[HV] = turn_hv(warped[HV], np.rint(step * scale))
    return View(image.astype(np.uint8), instances, types, warped)


def turn_hv(hv: NDArray[np.float32], step: NDArray[np.float64]) -> NDArray[np.float32]:
    """Turn h and v (2, y, x) to the axes of a view.

    `step` (2, 2): the source's x and y (rows) of one pixel along the view's x and y (columns). It is a right-angle turn
    or flip: each row and column has a single 1 or -1, else 0.
    """
    h, v = (sum(step[axis, i] * hv[axis] for axis in range(2)) for i in range(2))
    return np.stack([h, v]).astype(np.float32)


def _reach(size: int, angle: float, scale: float) -> float:
    """Return how far, in source pixels, a view extends from its centre along each axis."""
    return (abs(math.cos(angle) / scale) + abs(math.sin(angle) / scale)) * size / 2


def _uniform_inside(extent: int, reach: float, rng: np.random.Generator) -> float:
    low, high = reach, extent - reach
    return rng.uniform(low, high) if low < high else extent / 2
