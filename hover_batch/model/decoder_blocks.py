"""Parts that CellViT and NuLite share: blocks of their decoders, under the names in their state dicts, and the input.

Source: the released code of CellViT (TIO-IKIM/CellViT, 05097e1), on which NuLite's is based.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hover_batch.errors import PackageError

MEAN = STD = 0.5
"""Mean and standard deviation by which all three colours in [0, 1] are normalised in training."""


class ConvBlock(nn.Module):
    """Convolution of 3 × 3 pixels, normalisation and ReLU; with `upsample`, after a transposed convolution by 2."""

    def __init__(self, inputs: int, outputs: int, *, upsample: bool = False) -> None:
        super().__init__()
        first = [upsampling(inputs, outputs)] if upsample else []
        convolution = nn.Conv2d(outputs if upsample else inputs, outputs, 3, padding=1)
        self.block = nn.Sequential(*first, convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (b, outputs, y, x) float, or (b, outputs, 2 y, 2 x) with `upsample`.

        `maps`: (b, inputs, y, x) float.
        """
        result: Tensor = self.block(maps)
        return result


def upsampling(inputs: int, outputs: int) -> nn.Module:
    """Return a transposed convolution that doubles the sides of maps.

    It maps (b, inputs, y, x) to (b, outputs, 2 y, 2 x). `inputs`, `outputs`: numbers of channels.
    """
    return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)


def normalised(image: Tensor) -> Tensor:
    """Return (image - MEAN) / STD, the normalisation of the training. `image`: float RGB in [0, 1] of any shape."""
    return (image - MEAN) / STD


def check_normalisation(record: Mapping[str, Any]) -> None:
    """Check that a checkpoint was trained with the normalisation MEAN and STD, both 0.5.

    A checkpoint that states no normalisation is accepted.

    `record`: content of the checkpoint besides its tensors. Its entry `config` may state
    `transformations.normalize.mean` and `transformations.normalize.std`. PackageError if one of them has another value.
    """
    settings = record.get("config")
    if not isinstance(settings, Mapping):
        return
    for name, value in (("mean", MEAN), ("std", STD)):
        stated = settings.get(f"transformations.normalize.{name}", [value] * 3)
        if stated != [value] * 3:
            raise PackageError(
                f"its settings normalise the input with {name} {str(stated)[:60]}; only {[value] * 3} can be imported"
            )
