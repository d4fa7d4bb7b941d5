"""Change the appearance of images: stain, colour, tone, sharpness, resolution, noise, JPEG.

Images are (y, x, 3) uint8 RGB. All functions return an image of the same shape and dtype, and do not modify the one
that is passed. Training draws the changes at random; `kd.evaluation.shifts` applies fixed ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from skimage.color import hed_from_rgb, rgb_from_hed

RGB_TO_HED: NDArray[np.float32] = hed_from_rgb.astype(np.float32)
"""Matrix (3, 3) from optical densities of red, green and blue to hematoxylin, eosin and the residual."""
HED_TO_RGB: NDArray[np.float32] = rgb_from_hed.astype(np.float32)
"""Inverse of RGB_TO_HED."""


def random_appearance(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return an image (y, x, 3) uint8 RGB with randomly changed appearance.

    The changes are made in this order, each with its own probability and a random strength: stain (0.7), colour (0.5),
    gamma (0.5), sharpening (0.15), loss of resolution (0.25), blur (0.15), noise (0.15) and JPEG compression (0.2). If
    none is made, the result is `image` itself, not a copy.

    `image`: square image. `rng`: generator of the random numbers; it is advanced.
    """
    if rng.random() < 0.7:
        image = jitter_stain(image, rng)
    if rng.random() < 0.5:
        image = jitter_color(image, rng)
    if rng.random() < 0.5:  # the dark results resemble old scanners and thick sections, where nuclei are black
        image = change_gamma(image, math.exp(rng.uniform(math.log(0.6), math.log(2.5))))
    if rng.random() < 0.15:
        image = sharpen(image, rng)
    if rng.random() < 0.25:
        image = lose_resolution(image, rng)
    if rng.random() < 0.15:
        image = blur(image, rng.uniform(0.4, 1.3))
    if rng.random() < 0.15:
        noise = rng.normal(0, rng.uniform(2, 8), image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        image = jpeg(image, int(rng.integers(35, 90)))
    return image


def color_and_blur(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return an image (y, x, 3) uint8 RGB, randomly recoloured and blurred as in HoVer-UNet's released code.

    With probability 0.5, brightness, contrast, saturation and hue change in random order, each by up to 0.1 (see
    `change_color`). With probability 0.5, a Gaussian of 3 × 3 pixels with a standard deviation of 1 to 2 pixels blurs
    the image. If neither is applied, the result is `image` itself, not a copy.

    `rng`: generator of the random numbers; it is advanced.
    """
    if rng.random() < 0.5:
        names = rng.permutation(["brightness", "contrast", "saturation", "hue"])
        image = change_color(image, {str(name): rng.uniform(-0.1, 0.1) for name in names})
    if rng.random() < 0.5:
        image = np.asarray(cv2.GaussianBlur(image, (3, 3), rng.uniform(1, 2)), np.uint8)
    return image


def change_color(image: NDArray[np.uint8], amounts: Mapping[str, float]) -> NDArray[np.uint8]:
    """Return an image (y, x, 3) uint8 RGB with changed brightness, contrast, saturation or hue.

    On values from 0 to 1, an amount a of brightness adds a, and an amount a of contrast multiplies by 1 + a. Saturation
    is multiplied by 1 + a, and the hue is rotated by a·360°. Values are clipped after each change. These are the
    definitions of kornia's ColorJiggle, which HoVer-UNet's released code uses.

    `amounts`: amount of each change by its name: brightness, contrast, saturation or hue. The changes are made in the
    order of this mapping.
    """
    pixels = image.astype(np.float32) / np.float32(255)
    for name, amount in amounts.items():
        if name == "brightness":
            pixels = pixels + np.float32(amount)
        elif name == "contrast":
            pixels = pixels * np.float32(1 + amount)
        else:
            hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)  # hue in degrees
            if name == "saturation":
                hsv[..., 1] = np.minimum(hsv[..., 1] * (1 + amount), 1)
            else:
                hsv[..., 0] = (hsv[..., 0] + 360 * amount) % 360
            pixels = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.float32)
        pixels = np.clip(pixels, np.float32(0), np.float32(1))
    return np.asarray(np.rint(pixels * 255), np.uint8)


def blur(image: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Return an image (y, x, 3) uint8, blurred by a Gaussian.

    `sigma`: standard deviation of the Gaussian in pixels, above 0.
    """
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.uint8)


def jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Return an image (y, x, 3) uint8 RGB after JPEG compression and decompression.

    `quality`: quality of the compression, from 0 to 100.
    """
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]  # OpenCV expects BGR
    return np.ascontiguousarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1], np.uint8)


def jitter_stain(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return an image (y, x, 3) uint8 RGB with randomly changed stains (Tellez et al. 2018).

    The densities of hematoxylin, eosin and the residual are independently multiplied by 0.65 to 1.6 and shifted by up
    to 0.03 (see `change_stain`).

    `rng`: generator of the random numbers; it is advanced.
    """
    return change_stain(image, rng.uniform(0.65, 1.6, 3), rng.uniform(-0.03, 0.03, 3))


def change_stain(image: NDArray[np.uint8], factors: ArrayLike, offsets: ArrayLike = (0, 0, 0)) -> NDArray[np.uint8]:
    """Return an image (y, x, 3) uint8 RGB with the densities of its stains scaled and shifted.

    The optical density of an intensity I is -ln((I + 1) / 256). The density of each stain is multiplied by its factor,
    and then its offset is added. Results outside 0 to 255 are clipped.

    `factors`, `offsets`: three values, for hematoxylin, eosin and the residual (stain vectors of Ruifrok & Johnston
    2001); offsets are in units of this density.
    """
    density = -np.log((image.astype(np.float32) + 1) / 256)
    stains: NDArray[np.float32] = density @ RGB_TO_HED
    stains = stains * np.asarray(factors, np.float32) + np.asarray(offsets, np.float32)
    rgb: NDArray[np.float32] = np.exp(-(stains @ HED_TO_RGB)) * 256 - 1
    return np.clip(rgb, 0, 255).astype(np.uint8)


def jitter_color(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return an image (y, x, 3) uint8 RGB with randomly changed contrast, brightness, saturation and hue.

    Contrast about the image's mean is multiplied by 0.8 to 1.25 and saturation by 0.75 to 1.25; brightness changes by
    up to 20 of 255 levels, and hue by up to 12°.

    `rng`: generator of the random numbers; it is advanced.
    """
    pixels = image.astype(np.float32)
    pixels = (pixels - pixels.mean()) * rng.uniform(0.8, 1.25) + pixels.mean() + rng.uniform(-20, 20)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.75, 1.25)
    hsv = cv2.cvtColor(np.clip(pixels, 0, 255).astype(np.uint8), cv2.COLOR_RGB2HSV)
    shift = int(rng.integers(-6, 7))  # OpenCV's hue has 180 steps
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + shift) % 180
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


def change_gamma(image: NDArray[np.uint8], exponent: float) -> NDArray[np.uint8]:
    """Return an image (y, x, 3) uint8 in which each value v is replaced by 255·(v / 255)^exponent, rounded.

    `exponent`: above 0; above 1, midtones become darker.
    """
    table = np.rint(255 * (np.arange(256) / 255) ** exponent).astype(np.uint8)
    return table[image]


def sharpen(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return an image (y, x, 3) uint8, sharpened by a random unsharp mask, as some scanners do.

    The difference between the image and a blurred copy is multiplied by 0.3 to 1.5 and added to the image. The blur is
    a Gaussian with a standard deviation of 0.8 to 2 pixels.

    `rng`: generator of the random numbers; it is advanced.
    """
    amount = rng.uniform(0.3, 1.5)
    blurred = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.8, 2.0))
    return np.asarray(cv2.addWeighted(image, 1 + amount, blurred, -amount, 0), np.uint8)


def lose_resolution(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return an image (y, x, 3) uint8 as if it had been scanned with pixels 1.3 to 2.2 times as large.

    The image is reduced by area averages, then enlarged to its old size by bilinear or bicubic interpolation.

    `image`: square image. `rng`: generator of the random numbers; it is advanced.
    """
    side = image.shape[0]
    reduced_side = int(side / rng.uniform(1.3, 2.2))
    reduced = cv2.resize(image, (reduced_side, reduced_side), interpolation=cv2.INTER_AREA)
    interpolation = cv2.INTER_LINEAR if rng.random() < 0.5 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(reduced, (side, side), interpolation=interpolation), np.uint8)
