"""Precision in which networks are trained: bfloat16 where the hardware computes it, else float32."""

from __future__ import annotations

import torch


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return a context manager in which torch computes convolutions and matrix products in bfloat16.

    It has no effect on CPUs without instructions for bfloat16, where torch emulates them at a fraction of float32's
    speed.

    `device`: device of the network.
    """
    capabilities = torch.cpu.get_capabilities().items()
    native = device.type != "cpu" or any(has for name, has in capabilities if name.endswith("bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=native)
