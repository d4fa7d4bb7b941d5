"""Run a network by OpenVINO on the CPU, which fuses operations, as torch's eager mode does not.

The conversion of a package's network is cached, since the libraries that it needs take seconds to import:

    HOVER_BATCH_CACHE/openvino/KEY/network.xml  network.bin  *.sha256

KEY depends on the package, the code in this folder and the versions of the libraries. The folder may be removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hover_batch.errors import InputError, PackageError
from hover_batch.files import replacing_folder, sha256_file
from hover_batch.model.cache import cache_folder, check_download

XML, WEIGHTS = "network.xml", "network.bin"
LIBRARIES = ("openvino", "torch", "segmentation-models-pytorch", "timm")
"""Packages whose versions can change a converted network."""


@cache
def core() -> Any:
    """Return the OpenVINO core of this process. It is never destroyed. ImportError if OpenVINO is not installed.

    On CPUs with AMX a core gives its thread another signal stack, and its destruction frees that stack and restores the
    one before. If two cores do this out of order, the restored stack is freed memory, and the next signal, such as
    Ctrl-C, crashes the process (seen with OpenVINO 2026).
    """
    import openvino

    return openvino.Core()


class OpenVinoNetwork(nn.Module):
    """Network compiled for the CPU, with the same input and output as in torch up to float32's rounding.

    `model`: openvino.Model for one image. `batch`: number of images per call. `threads`: number of threads; 0 for as
    many as torch uses. Each thread processes one image of the batch, so threads do not wait for each other within a
    layer, and the maps of at most as many images as threads are in memory.

    PackageError if OpenVINO cannot compile it. Call it from one thread at a time.
    """

    def __init__(self, model: Any, batch: int, threads: int) -> None:
        super().__init__()
        threads = threads or torch.get_num_threads()
        options: dict[str, Any] = {
            # By default it may choose a faster, less exact precision.
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            # Several networks may share a machine and would all be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        with as_package_error():
            compiled = core().compile_model(model, "CPU", options)
        self._requests = [compiled.create_infer_request() for _ in range(batch)]

    def forward(self, image: Tensor) -> Tensor:
        """Return the network's output (b, channels, y, x) float32 for a batch of RGB in [0, 1].

        `image`: (b, 3, y, x) float32 on the CPU, where b is `batch`, and y and x are the sides of the model's image.
        ValueError if b is not `batch`; errors of OpenVINO propagate.
        """
        pixels = image.contiguous().numpy()
        for request, one_image in zip(self._requests, pixels, strict=True):
            request.start_async({0: one_image[None]}, share_inputs=True)
        for request in self._requests:
            request.wait()
        return torch.from_numpy(np.concatenate([request.get_output_tensor(0).data for request in self._requests]))


class StoredNetwork(nn.Module):
    """Network that is an OpenVINO model, stored as bytes in two buffers. It runs on the CPU, whatever the device.

    `xml`, `weights`: uint8 (n), the two files of OpenVINO's format.
    """

    xml: Tensor
    weights: Tensor

    def __init__(self, xml: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("xml", xml)
        self.register_buffer("weights", weights)
        self._compiled: Any = None

    def model(self) -> Any:
        """Return the network as a new openvino.Model, read from the stored bytes.

        PackageError if the bytes are not an OpenVINO model, ImportError if OpenVINO is not installed.
        """
        with as_package_error():
            return core().read_model(self.xml.cpu().numpy().tobytes(), self.weights.cpu().numpy().tobytes())

    def forward(self, image: Tensor) -> Tensor:
        """Return the network's output (b, channels, y, x) float32 on the device of `image`.

        The first call compiles the network. It is computed on the CPU, whatever the device of `image`.

        `image`: RGB in [0, 1], (b, 3, side, side) float, where `side` is that of the stored model. PackageError if the
        network cannot be compiled, ImportError if OpenVINO is not installed.
        """
        if self._compiled is None:
            with as_package_error():
                self._compiled = core().compile_model(self.model(), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        request = self._compiled.create_infer_request()
        outputs = [request.infer({0: one[None]})[0].copy() for one in image.float().cpu().contiguous().numpy()]
        return torch.from_numpy(np.concatenate(outputs)).to(image.device)


def convert(network: nn.Module, side: int) -> Any:
    """Convert a network to an openvino.Model for one image (1, 3, side, side) float32.

    `network` itself is set to evaluation mode and float32. The model of a StoredNetwork is returned as it is stored.
    Python's warnings are suppressed in the whole process during the conversion.

    `side`: side of the image in pixels.

    InputError if OpenVINO is not installed, PackageError if it cannot convert the network.
    """
    try:
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    except ImportError as error:
        raise InputError(
            "--runtime openvino: OpenVINO is not installed; pip install openvino, or leave --runtime out"
        ) from error
    if isinstance(network, StoredNetwork):
        return network.model()
    shape = (1, 3, side, side)
    # `openvino.convert_model` would send telemetry.
    with as_package_error(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates tracing, which OpenVINO builds on
        decoder = TorchScriptPythonDecoder(
            network.eval().float(), example_input=torch.zeros(shape), trace_kwargs={"check_trace": False}
        )
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
        model.reshape(shape)
    return model


def cached_conversion(package_sha256: str, side: int, code: Path | None, load: Callable[[], nn.Module]) -> Any:
    """Return the package's network as an openvino.Model, from the cache or else from `convert(load(), side)`.

    A new conversion is saved in the cache. A cache that cannot be read or written is ignored.

    `package_sha256`: hash of the package. `side`: side of the image in pixels. `code`: Python file of the architecture,
    on which the conversion depends; None if it has no file. `load`: loads the network if it is not in the cache; its
    errors propagate.

    InputError if OpenVINO is not installed, PackageError if it cannot convert the network.
    """
    folder = cache_folder() / "openvino" / _key(package_sha256, side, code)
    with contextlib.suppress(OSError, PackageError, RuntimeError, ImportError):
        for name in (XML, WEIGHTS):
            check_download(folder / name, (folder / f"{name}.sha256").read_text().split()[0])
        return core().read_model(folder / XML)
    model = convert(load(), side)
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(folder) as temporary:
            import openvino

            temporary.mkdir()
            openvino.save_model(model, temporary / XML, compress_to_fp16=False)
            for name in (XML, WEIGHTS):
                check_download(temporary / name)  # records the hash
    return model


def _key(package_sha256: str, side: int, code: Path | None) -> str:
    files = [*sorted(Path(__file__).parent.glob("*.py")), *([code] if code else [])]
    hashes = [sha256_file(path) for path in files]
    versions = [version(name) for name in LIBRARIES]
    return hashlib.sha256(" ".join([package_sha256, str(side), *hashes, *versions]).encode()).hexdigest()[:16]


@contextlib.contextmanager
def as_package_error() -> Iterator[None]:
    """Return a context manager that converts a RuntimeError to a PackageError with the advice --runtime torch."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise PackageError(f"OpenVINO cannot run this network ({reason}); use --runtime torch") from error


def model_macs(model: Any) -> tuple[int, int]:
    """Return (macs, constants) of an openvino.Model.

    macs: number of multiply-accumulates of its convolutions and matrix products. constants: number of values in its
    constants.

    `model`: openvino.Model with static shapes.
    """
    macs = constants = 0
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind == "Constant":
            constants += int(np.prod(node.get_output_shape(0)))
        elif kind in ("Convolution", "GroupConvolution"):
            weights = list(node.get_input_shape(1))[1 if kind == "Convolution" else 2 :]
            macs += int(np.prod(node.get_output_shape(0))) * int(np.prod(weights))
        elif kind in ("ConvolutionBackpropData", "GroupConvolutionBackpropData"):
            weights = list(node.get_input_shape(1))[1 if kind == "ConvolutionBackpropData" else 2 :]
            macs += int(np.prod(node.get_input_shape(0))) * int(np.prod(weights))
        elif kind == "MatMul":
            summed = -2 if node.get_attributes()["transpose_a"] else -1
            macs += int(np.prod(node.get_output_shape(0))) * node.get_input_shape(0)[summed]
    return macs, constants
