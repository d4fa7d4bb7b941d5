"""Random views of an annotated image: geometry on image and labels alike, appearance on the image alone.

The ranges are meant to cover scanners and stains: 20× slides are seen upsampled (hence the loss of resolution), JPEG
tiles are common (hence recompression), H and E vary independently between laboratories (hence stain jitter), and
some scanners sharpen and darken until nuclei are black (hence gamma and unsharp masks).
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.color import hed_from_rgb, rgb_from_hed

from kd.datasets import Sample

LABEL_MARGIN = 32
"""Labels are cut this much wider than the image (pixels), so that a nucleus at the crop's edge has the distances of
the whole nucleus, as it will when tiles are predicted with a margin."""

SCALE = (0.8, 1.25)
RGB_TO_HED: NDArray[np.float32] = hed_from_rgb.astype(np.float32)
HED_TO_RGB: NDArray[np.float32] = rgb_from_hed.astype(np.float32)

View = tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.uint8]]


def random_view(sample: Sample, size: int, rng: np.random.Generator) -> View:
    """Cut, turn, flip, scale and recolour.

    Returns image (size, size, 3) uint8 and instances int32 and types uint8, both
    (size + 2·LABEL_MARGIN) square; types are zero where the sample has none.
    """
    image, instances, types = random_geometry(sample, size, rng)
    return random_appearance(image, rng), instances, types


def random_geometry(sample: Sample, size: int, rng: np.random.Generator) -> View:
    """One affine map of the source onto the view, drawn so that the image part lies inside the source."""
    scale = math.exp(rng.uniform(math.log(SCALE[0]), math.log(SCALE[1])))
    angle = rng.uniform(0, 2 * math.pi) if rng.random() < 0.5 else rng.integers(4) * math.pi / 2
    flip = 1 if rng.random() < 0.5 else -1
    # Source offset of a step of one view pixel along x and along y.
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    step = np.array([[cos, -sin * flip], [sin, cos * flip]])
    reach = (abs(cos) + abs(sin)) * size / 2
    height, width = sample.instances.shape
    centre = np.array([_uniform_inside(width, reach, rng), _uniform_inside(height, reach, rng)])

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
    return image.astype(np.uint8), instances, types


def _uniform_inside(extent: int, reach: float, rng: np.random.Generator) -> float:
    low, high = reach, extent - reach
    return rng.uniform(low, high) if low < high else extent / 2


def random_appearance(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Stain, colour, tone, sharpness, resolution, noise, JPEG, each with its own chance. (y, x, 3) uint8 in and out."""
    if rng.random() < 0.7:
        image = jitter_stain(image, rng)
    if rng.random() < 0.5:
        image = jitter_color(image, rng)
    if rng.random() < 0.5:
        image = jitter_gamma(image, rng)
    if rng.random() < 0.15:
        image = sharpen(image, rng)
    if rng.random() < 0.25:
        image = lose_resolution(image, rng)
    if rng.random() < 0.15:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.3)), np.uint8)
    if rng.random() < 0.15:
        noise = rng.normal(0, rng.uniform(2, 8), image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        quality = int(rng.integers(35, 90))
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        image = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)
    return image


def jitter_stain(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Scale and shift hematoxylin, eosin and the residual apart (Tellez et al. 2018; stain vectors of Ruifrok)."""
    density = -np.log((image.astype(np.float32) + 1) / 256)
    stains: NDArray[np.float32] = density @ RGB_TO_HED
    stains = stains * rng.uniform(0.65, 1.6, 3).astype(np.float32) + rng.uniform(-0.03, 0.03, 3).astype(np.float32)
    rgb: NDArray[np.float32] = np.exp(-(stains @ HED_TO_RGB)) * 256 - 1
    return np.clip(rgb, 0, 255).astype(np.uint8)


def jitter_color(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Contrast about the mean, brightness, saturation and hue."""
    pixels = image.astype(np.float32)
    pixels = (pixels - pixels.mean()) * rng.uniform(0.8, 1.25) + pixels.mean() + rng.uniform(-20, 20)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.75, 1.25)
    hsv = cv2.cvtColor(np.clip(pixels, 0, 255).astype(np.uint8), cv2.COLOR_RGB2HSV)
    shift = int(rng.integers(-6, 7))  # OpenCV's hue has 180 steps
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + shift) % 180
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


def jitter_gamma(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Darker or lighter midtones, the exponent from 0.6 to 2.5: old scanners and thick sections show black nuclei."""
    exponent = math.exp(rng.uniform(math.log(0.6), math.log(2.5)))
    table = np.rint(255 * (np.arange(256) / 255) ** exponent).astype(np.uint8)
    return table[image]


def sharpen(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """An unsharp mask, as some scanners apply before they save."""
    amount = rng.uniform(0.3, 1.5)
    soft = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.8, 2.0))
    return np.asarray(cv2.addWeighted(image, 1 + amount, soft, -amount, 0), np.uint8)


def lose_resolution(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """What a slide scanned at 1.3 to 2.2 times the pixel size looks like at this one."""
    side = image.shape[0]
    small = int(side / rng.uniform(1.3, 2.2))
    reduced = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
    up = cv2.INTER_LINEAR if rng.random() < 0.5 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(reduced, (side, side), interpolation=up), np.uint8)
