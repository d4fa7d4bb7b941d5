"""Network compiled by torch.compile for one device; the first start takes minutes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from hover_batch.errors import PackageError


class CompiledNetwork(nn.Module):
    """Compiled copy of a network on its device, with the same input and output up to rounding.

    It is compiled at the first call with a shape and a precision. Calling it raises PackageError if it cannot be
    compiled, for example without a C++ compiler.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # Freezing makes the weights constants, laid out for the CPU; without it there is no gain on the CPU.
        self._call = torch.compile(network, dynamic=False, options={"freezing": True})

    def forward(self, image: torch.Tensor) -> Any:
        """Return the network's output for a batch.

        The first call with a shape and precision compiles the network, which takes minutes. During the call, torch's
        setting `torch._dynamo.config.suppress_errors` is False.

        `image`: RGB in [0, 1], float (b, 3, y, x), on the network's device. PackageError if the network cannot be
        compiled.
        """
        try:
            # tiatoolbox sets suppress_errors, so that a failure would only be logged.
            with torch._dynamo.config.patch(suppress_errors=False):
                return self._call(image)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise PackageError(
                f"--runtime compile: torch cannot compile this network here ({reason}); use --runtime torch"
            ) from error
