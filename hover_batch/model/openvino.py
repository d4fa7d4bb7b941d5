"""Network run by OpenVINO on the CPU, with fused operations, which torch's eager mode lacks."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hover_batch.errors import InputError, PackageError


@cache
def _core() -> Any:
    """Return the OpenVINO core of this process, which is never destroyed.

    On CPUs with AMX a core gives its thread another signal stack, and its destruction frees that stack and restores the
    one before. If two cores do this out of order, the restored stack is freed memory, and the next signal, such as
    Ctrl-C, crashes the process (seen with OpenVINO 2026).
    """
    import openvino

    return openvino.Core()


class OpenVinoNetwork(nn.Module):
    """Network compiled for the CPU, with the same input and output up to float32's rounding.

    `shape` (b, 3, y, x): the only shape of its float32 input. `threads`: 0 = as many as torch uses. Nothing is written
    to disk. Each thread processes one image of the batch, so threads do not wait for each other within a layer, and at
    most as many maps as threads are held.

    InputError if OpenVINO is not installed, PackageError if it cannot run the network.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], threads: int) -> None:
        super().__init__()
        try:
            from openvino.frontend import FrontEndManager
            from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
        except ImportError as error:
            raise InputError(
                "--runtime openvino: OpenVINO is not installed; pip install openvino, or leave --runtime out"
            ) from error
        threads = threads or torch.get_num_threads()
        options: dict[str, Any] = {
            # By default it may choose a faster, less exact precision.
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            # Several networks may share a machine and would all be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        one = (1, *shape[1:])
        try:
            # `openvino.convert_model` would send telemetry.
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch deprecates tracing, which OpenVINO builds on
                decoder = TorchScriptPythonDecoder(network.eval().float(), example_input=torch.zeros(one))
            frontend = FrontEndManager().load_by_framework("pytorch")
            model = frontend.convert(frontend.load(decoder))
            model.reshape(one)
            compiled = _core().compile_model(model, "CPU", options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise PackageError(f"OpenVINO cannot run this network ({reason}); use --runtime torch") from error
        self._requests = [compiled.create_infer_request() for _ in range(shape[0])]

    def forward(self, image: Tensor) -> Tensor:
        """Return the network's output (b, channels, y, x) float32.

        `image`: (b, 3, y, x) float32 on the CPU, of the shape given at construction.
        """
        pixels = image.contiguous().numpy()
        for request, one in zip(self._requests, pixels, strict=True):
            request.start_async({0: one[None]}, share_inputs=True)
        for request in self._requests:
            request.wait()
        return torch.from_numpy(np.concatenate([request.get_output_tensor(0).data for request in self._requests]))
