"""Precision in which networks are trained: bfloat16 where the hardware computes it, else float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Capabilities of CPUs, by torch's names, with which they compute in bfloat16; the last one is ARM's."""


@contextmanager
def training_autocast(device: torch.device) -> Iterator[None]:
    """Return a context manager in which torch computes convolutions and matrix products in bfloat16.

    It has no effect on devices that do not compute bfloat16 themselves. There, torch would emulate it, and a step would
    take about ten times as long as in float32. On a CPU, depthwise convolutions stay in float32: their gradients take
    several times as long in bfloat16, about half of a training step of the starter.

    `device`: device of the network.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = any(torch.cpu.get_capabilities().get(name) for name in BFLOAT16)
    with torch.autocast(device.type, torch.bfloat16, enabled=native):
        if native and device.type == "cpu":
            with _DepthwiseInFloat32():
                yield
        else:
            yield


class _DepthwiseInFloat32(TorchFunctionMode):
    """Compute grouped convolutions, such as depthwise ones, in float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        # torch.nn.Conv2d passes the number of groups as the seventh positional argument.
        if func is torch.conv2d and len(args) == 7 and args[6] > 1:
            with torch.autocast("cpu", enabled=False):
                return func(args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))
