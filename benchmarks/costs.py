"""Count the weights and multiply-accumulates of all published models, for `COSTS` in `hover_batch/model/published.py`.

    uv run python -m benchmarks.costs

Only shapes are computed, so it needs neither weights nor memory for them.
"""

from __future__ import annotations

import torch

from hover_batch.model.architectures import architecture
from hover_batch.model.checkpoint import card_of
from hover_batch.model.cost import cost_of
from hover_batch.model.published import KINDS


def cost(name: str) -> tuple[int, int]:
    """Return the number of weights of a published model, and its multiply-accumulates for each kept pixel."""
    found = architecture(KINDS[name].architecture)
    card = card_of(name, found)
    # segmentation-models-pytorch computes with values while it builds an encoder.
    with torch.device("cpu" if card.architecture == "unet" else "meta"):
        network = found.build(card, None)
    counted = cost_of(network, card)
    return counted.parameters, round(counted.macs_per_kept_pixel)


if __name__ == "__main__":
    for name in KINDS:
        print(f'    "{name}": {cost(name)},', flush=True)
