"""A network as torch.compile makes it for one device: its operations fused, which takes minutes at the first start."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from hover_batch.errors import PackageError


class CompiledNetwork(nn.Module):
    """`network`, which is on its device and ready, compiled when it is first called with a shape and a precision; takes
    and gives what it does, within their rounding.

    Calling it raises PackageError where it cannot be compiled, as without a C++ compiler.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # Freezing takes the weights as constants, laid out for the processor: without it nothing is gained there.
        self._call = torch.compile(network, dynamic=False, options={"freezing": True})

    def forward(self, image: torch.Tensor) -> Any:
        try:
            # tiatoolbox has it go on without, and say so in a log.
            with torch._dynamo.config.patch(suppress_errors=False):
                return self._call(image)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise PackageError(
                f"--runtime compile: torch cannot compile this network here ({reason}); use --runtime torch"
            ) from error
