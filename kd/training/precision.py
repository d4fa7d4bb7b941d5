"""Precision in which networks are trained: bfloat16 where the hardware computes it, else float32."""

from __future__ import annotations

import torch

BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Capabilities of CPUs, by torch's names, with which they compute in bfloat16; the last one is ARM's."""


def training_autocast(device: torch.device) -> torch.autocast:
    """Return a context manager in which torch computes convolutions and matrix products in bfloat16.

    It has no effect on devices that do not compute bfloat16 themselves. There, torch would emulate it, and a step would
    take about ten times as long as in float32.

    `device`: device of the network.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = any(torch.cpu.get_capabilities().get(name) for name in BFLOAT16)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)
