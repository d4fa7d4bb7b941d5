"""A quick look at the network while it trains: scores of the central part of each validation image, by source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from hover_batch.metrics import mean_defined
from hover_batch.model.heads import MapLayout
from hover_batch.model.predict import quantise
from hover_batch.nuclei.watershed import SobelConstants
from hover_batch.taxonomy import Taxonomy
from kd.augment import LABEL_MARGIN
from kd.datasets import Sample
from kd.evaluate import evaluate

SIDE = 512
"""Side in pixels of what is scored of each image."""

TYPICAL = SobelConstants(h_min=-1.785e10, h_max=1.33e10, v_min=-1.68e10, v_max=1.3125e10)
"""What calibration of a briefly trained student gave: 0.15 times the medians over real tiles. Those of a package are
found by `kd.calibrate` once training has ended."""


def validate(model: nn.Module, samples: Sequence[Sample], device: torch.device, taxonomy: Taxonomy) -> dict[str, float]:
    """Scores `val_pq_<source>`, `val_dice_<source>`, `val_f_d_<source>` and, where types are annotated,
    `val_f_c_<source>`: the mean F_c over the classes.

    `model` must be in evaluation mode. The central SIDE × SIDE pixels of each image are looked at, or what the image
    has of them in steps of 32, with LABEL_MARGIN mirrored pixels around them.
    """
    layout = MapLayout(len(taxonomy.classes))

    @torch.inference_mode()
    def maps_of(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        rgb = torch.from_numpy(image).to(device).permute(2, 0, 1).unsqueeze(0)
        around = F.pad(rgb.float().div(255), [LABEL_MARGIN] * 4, mode="reflect")
        with torch.autocast(device.type, torch.bfloat16):
            output = model(around.contiguous(memory_format=torch.channels_last)).float()
        inner = slice(LABEL_MARGIN, -LABEL_MARGIN)
        return quantise(output[..., inner, inner], rgb, layout)[0].cpu().numpy()

    row: dict[str, float] = {}
    for scores in evaluate(maps_of, [_central(s) for s in samples], TYPICAL, taxonomy):
        row |= {f"val_{name}_{scores.source}": getattr(scores, name) for name in ("pq", "dice", "f_d")}
        if scores.f_c:
            row[f"val_f_c_{scores.source}"] = mean_defined(scores.f_c.values())
    return row


def _central(sample: Sample) -> Sample:
    height, width = (min(SIDE, extent // 32 * 32) for extent in sample.instances.shape)
    y, x = (sample.instances.shape[0] - height) // 2, (sample.instances.shape[1] - width) // 2
    part = slice(y, y + height), slice(x, x + width)
    return replace(
        sample,
        image=np.ascontiguousarray(sample.image[part]),
        instances=np.ascontiguousarray(sample.instances[part]),
        types=None if sample.types is None else np.ascontiguousarray(sample.types[part]),
    )
