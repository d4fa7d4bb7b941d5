"""Draw random views of an annotated image.

Geometry changes the image, the labels and a teacher's output in the same way; appearance changes only the image.

========== ============================================== ===========================================
kind       geometry                                       appearance
========== ============================================== ===========================================
full       position, any rotation, flip, scale            stain, color, tone, sharpness, noise, JPEG
turns      position, right-angle rotation, flip           color and blur
color      position                                       color and blur
none       position                                       unchanged
========== ============================================== ===========================================

The ranges are meant to cover scanners and stains: 20× slides are upsampled for the network (hence the loss of
resolution), JPEG tiles are common (hence recompression), hematoxylin and eosin vary independently between laboratories
(hence stain jitter), and some scanners sharpen and darken until nuclei are black (hence gamma and unsharp masks).

A teacher's h and v can be rotated by right angles only. Each is scaled by the extent of the nucleus along its own axis,
so h and v of a rotated nucleus are not a mixture of the original two. Right-angle rotations and flips swap and negate
them, and scaling leaves them unchanged; with a teacher, `full` is limited to these.
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
"""Smallest and largest magnification of `full`."""
RIGHT = math.pi / 2
"""A right angle in radians."""


class View(NamedTuple):
    """Training crop before its targets are computed. Labels have the side size + 2 × LABEL_MARGIN."""

    image: NDArray[np.uint8]
    """Image (size, size, 3) uint8 RGB."""
    instances: NDArray[np.int32]
    """Ids of nuclei (side, side) int32, 0 = background."""
    types: NDArray[np.uint8]
    """Class ids (side, side) uint8; 0 everywhere if the sample has no types."""
    planes: NDArray[np.float32] | None
    """Teacher's output (channel, size, size) float32, as in `hover_batch.model.heads`; None without a teacher."""


def random_view(
    sample: Sample,
    size: int,
    rng: np.random.Generator,
    kind: str = "full",
    planes: NDArray[np.float16] | None = None,
) -> View:
    """Return a random crop of `size` × `size` pixels with random geometry and appearance.

    `sample`: annotated image, at least `size` pixels high and wide. `rng`: generator of all random numbers; it is
    advanced. `kind`: augmentation, which is "full", "turns", "color" or "none" (see the module's table). `planes`: the
    teacher's output (channel, y, x) float16 for the whole image, as in `hover_batch.model.heads`; None without a
    teacher.
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
    """Return a random crop of `size` × `size` pixels with the geometry of `kind`; the appearance is unchanged.

    It is made by one affine map. The image is interpolated linearly; labels and `planes` are taken from the nearest
    pixel. The image of the view lies inside the sample's image. If the sample's image is too small for the rotated
    view, the angle is rounded to a right angle and, with the kind "full", the scale is increased until the crop fits.
    Labels outside the sample's image are 0.

    `sample`: annotated image, at least `size` pixels high and wide. `rng`: generator of all random numbers; it is
    advanced. `kind`: augmentation, which is "full", "turns", "color" or "none" (see the module's table). `planes`: the
    teacher's output (channel, y, x) float16 for the whole image, as in `hover_batch.model.heads`; None without a
    teacher.
    """
    scale, angle, flip = 1.0, 0.0, 1
    if kind == "full":
        scale = math.exp(rng.uniform(math.log(SCALE[0]), math.log(SCALE[1])))
        any_angle = planes is None and rng.random() < 0.5
        angle = rng.uniform(0, 2 * math.pi) if any_angle else rng.integers(4) * RIGHT
    elif kind == "turns":
        angle = rng.integers(4) * RIGHT
    if kind in ("full", "turns"):
        flip = 1 if rng.random() < 0.5 else -1
    height, width = sample.instances.shape
    small = 2 * _reach(size, angle, scale) > min(height, width)
    if small:
        # The image is hardly larger than the view, as in PanNuke. There are no labels outside it, so the
        # view stays inside.
        angle = round(angle / RIGHT) * RIGHT
        if kind == "full":
            scale = max(scale, size / min(height, width))
    # Columns: the offset in the source of one view pixel along x, and along y.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    step = np.array([[cos, -sin * flip], [sin, cos * flip]])
    reach = _reach(size, angle, scale)
    centre = np.array([_uniform_inside(width, reach, rng), _uniform_inside(height, reach, rng)])
    if small or kind != "full":
        centre -= 0.5  # from pixel edges to pixel centres: a view that just fits must not be off by half a pixel
    if kind != "full":  # align the pixel grids, so that nothing is interpolated
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
    label_side = size + 2 * LABEL_MARGIN
    # OpenCV cannot warp int32; float32 represents ids up to 2^24 exactly.
    instances = warp(sample.instances.astype(np.float32), label_side, cv2.INTER_NEAREST).astype(np.int32)
    types = np.zeros(instances.shape, np.uint8)
    if sample.types is not None:
        types = warp(sample.types, label_side, cv2.INTER_NEAREST).astype(np.uint8)
    if planes is None:
        return View(image.astype(np.uint8), instances, types, None)
    # Nearest neighbour, as for labels: where nuclei touch, h and v jump from 1 to -1 without values in between.
    warped = np.stack([warp(plane.astype(np.float32), size, cv2.INTER_NEAREST) for plane in planes])
    warped[HV] = turn_hv(warped[HV], np.rint(step * scale))
    return View(image.astype(np.uint8), instances, types, warped)


def turn_hv(hv: NDArray[np.float32], step: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return h and v (2, y, x) float32 relative to the axes of a rotated or flipped view.

    `hv` (2, y, x): h and v relative to the axes of the source image. `step` (2, 2): column k is the step (x, y) in the
    source for one pixel along the view's x (k = 0) or y (k = 1). It must be a right-angle rotation or flip: each row
    and each column has one entry of 1 or -1, and the other is 0.
    """
    turned = [step[0, k] * hv[0] + step[1, k] * hv[1] for k in range(2)]
    return np.stack(turned).astype(np.float32)


def _reach(size: int, angle: float, scale: float) -> float:
    """Return the distance in source pixels from the centre of a view to its farthest edge along each axis."""
    return (abs(math.cos(angle) / scale) + abs(math.sin(angle) / scale)) * size / 2


def _uniform_inside(extent: int, reach: float, rng: np.random.Generator) -> float:
    low, high = reach, extent - reach
    return rng.uniform(low, high) if low < high else extent / 2
