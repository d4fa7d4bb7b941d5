"""A network as OpenVINO runs it on a processor: fused and laid out for it, which torch's eager mode does not do."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from hover_batch.errors import InputError, PackageError


class OpenVinoNetwork(nn.Module):
    """`network`, compiled for the processor and one shape of its input, (b, 3, y, x) float32; takes and gives what it
    does, within float32's rounding. `threads`: 0 = as OpenVINO suggests. Nothing is written to disk.

    Raises InputError where OpenVINO is not installed, PackageError where it cannot run the network.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], threads: int) -> None:
        super().__init__()
        try:
            import openvino
            from openvino.frontend import FrontEndManager
            from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
        except ImportError as error:
            raise InputError(
                "--runtime openvino: OpenVINO is not installed; pip install openvino, or leave --runtime out"
            ) from error
        options: dict[str, Any] = {
            # What is faster and less exact it would choose by itself.
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            # Several networks share a machine: each would be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            # Not by `openvino.convert_model`, which reports its use to OpenVINO's makers.
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch deprecates tracing, which OpenVINO builds on
                # It runs the network several times: on one image, whatever the batch.
                decoder = TorchScriptPythonDecoder(network.eval().float(), example_input=torch.zeros((1, *shape[1:])))
            frontend = FrontEndManager().load_by_framework("pytorch")
            model = frontend.convert(frontend.load(decoder))
            model.reshape(shape)
            self._compiled = openvino.Core().compile_model(model, "CPU", options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise PackageError(f"OpenVINO cannot run this network ({reason}); use --runtime torch") from error

    def forward(self, image: Tensor) -> Tensor:
        """The network's output, (b, channels, y, x) float32."""
        return torch.from_numpy(self._compiled(image.contiguous().numpy(), share_inputs=True)[0])
