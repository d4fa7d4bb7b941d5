"""A network as OpenVINO runs it on a processor: fused and laid out for it, which torch's eager mode does not do."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hover_batch.errors import InputError, PackageError


class OpenVinoNetwork(nn.Module):
    """`network`, compiled for the processor and images (b, 3, y, x) float32 of `shape`; takes and gives what it does,
    within float32's rounding. `threads`: 0 = as many as torch takes. Nothing is written to disk.

    Each thread takes an image of the batch by itself: they never wait for one another inside of a layer, and no more
    maps are held than there are threads.

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
        threads = threads or torch.get_num_threads()
        options: dict[str, Any] = {
            # What is faster and less exact it would choose by itself.
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            # Several networks share a machine: each would be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        one = (1, *shape[1:])
        try:
            # Not by `openvino.convert_model`, which reports its use to OpenVINO's makers.
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch deprecates tracing, which OpenVINO builds on
                decoder = TorchScriptPythonDecoder(network.eval().float(), example_input=torch.zeros(one))
            frontend = FrontEndManager().load_by_framework("pytorch")
            model = frontend.convert(frontend.load(decoder))
            model.reshape(one)
            compiled = openvino.Core().compile_model(model, "CPU", options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise PackageError(f"OpenVINO cannot run this network ({reason}); use --runtime torch") from error
        self._requests = [compiled.create_infer_request() for _ in range(shape[0])]

    def forward(self, image: Tensor) -> Tensor:
        """The network's output, (b, channels, y, x) float32."""
        pixels = image.contiguous().numpy()
        for request, one in zip(self._requests, pixels, strict=True):
            request.start_async({0: one[None]}, share_inputs=True)
        for request in self._requests:
            request.wait()
        return torch.from_numpy(np.concatenate([request.get_output_tensor(0).data for request in self._requests]))
